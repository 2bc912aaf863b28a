"""Silence while another package's tool runs: they draw bars, print a line for each pass, and log advice."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


class _Nowhere(io.TextIOBase):
    """Takes text and keeps none; never closed, because a logger that was made meanwhile keeps it."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings, logs up to their level, and all that Python prints go nowhere; errors are raised as ever."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    nowhere = _Nowhere()
    try:
        with (warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere)):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
