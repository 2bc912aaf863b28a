"""Pages whose sections are made one by one."""

from __future__ import annotations

import re


def sections(page: str) -> dict[str, list[str]]:
    """Title of each second-level section -> its lines, the title's included."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0].removeprefix("## "): part.splitlines() for part in parts}
