"""Pages whose sections are made one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def sections(page: str) -> dict[str, list[str]]:
    """Title of each second-level section -> its lines, the title's included."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0].removeprefix("## "): part.splitlines() for part in parts}


def page(head: str, parts: Iterable[Sequence[str]]) -> str:
    """A page of sections, one empty line between them."""
    text = "\n".join([head, *(line for part in parts for line in [*part, ""])])
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
