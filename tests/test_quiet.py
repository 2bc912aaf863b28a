"""Silence around other packages' tools."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from pocketsam.quiet import quiet


def _noise() -> logging.Handler:
    sys.stderr.write("a bar")
    sys.stdout.write("a pass")
    warnings.warn("advice", stacklevel=1)
    logging.getLogger("tool").warning("advice")
    return logging.StreamHandler(sys.stderr)


def test_nothing_is_written_and_all_is_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        made_meanwhile = _noise()
    assert capsys.readouterr() == ("", "")
    made_meanwhile.emit(logging.LogRecord("tool", logging.ERROR, "", 0, "later", None, None))
    sys.stdout.write("printed again")
    assert capsys.readouterr() == ("printed again", "")


def test_errors_pass_and_logs_are_heard_again() -> None:
    with pytest.raises(ValueError, match="passes"), quiet():
        raise ValueError("passes")
    assert logging.root.manager.disable == logging.NOTSET
