"""Silence around other packages' tools."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from pocketsam.quiet import quiet


def test_nothing_is_written_and_all_is_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="passes"), quiet():
        sys.stderr.write("a bar")
        sys.stdout.write("a pass")
        warnings.warn("advice", stacklevel=1)
        logging.getLogger("tool").warning("advice")
        made_meanwhile = logging.StreamHandler(sys.stderr)
        raise ValueError("passes")
    assert capsys.readouterr() == ("", "")
    made_meanwhile.emit(logging.LogRecord("tool", logging.ERROR, "", 0, "later", None, None))
    sys.stdout.write("printed again")
    assert capsys.readouterr().out == "printed again"
    assert logging.root.manager.disable == logging.NOTSET
