"""What ``tune`` remembers, and what it must not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import pocketsam
from pocketsam.bundle import MANIFEST, read_bundle
from pocketsam.errors import BundleError
from pocketsam.tune import tune


def test_a_damaged_copy_does_not_spoil_the_whole_one(toy_bundle: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have the same manifest, so the same place in the cache."""
    monkeypatch.setenv("POCKETSAM_CACHE", str(tmp_path / "cache"))
    copy = Path(shutil.copytree(toy_bundle, tmp_path / "copy.bundle"))
    target = copy / "onnx/encoder.fp32.onnx"
    target.write_bytes(target.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match="does not match its recorded sha256"):
        pocketsam.load(copy, threads=1)
    assert pocketsam.load(toy_bundle, threads=1).info()["runtime"] == "onnxruntime"
    stored = list((tmp_path / "cache/tune").glob("*.json"))
    assert len(stored) == 1
    before = stored[0].read_bytes()
    assert not any(c.problem for c in tune(read_bundle(toy_bundle), 1))
    assert stored[0].read_bytes() == before, "measured once"


@pytest.fixture
def copy(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POCKETSAM_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(toy_bundle, tmp_path / "copy.bundle"))


def test_agreement_may_be_unknown(copy: Path) -> None:
    data = json.loads((copy / MANIFEST).read_text())
    for row in data["artifacts"]:
        del row["measured"]
    (copy / MANIFEST).write_text(json.dumps(data))
    assert [(c.agreement, c.problem) for c in tune(read_bundle(copy), 1)] == [(0, "")]


def test_an_engine_that_cannot_run_a_graph_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own error must not end the choice."""
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel\nand a trace")

    monkeypatch.setattr("pocketsam.tune.time_runtime", fail)
    (found,) = tune(read_bundle(copy), 1)
    assert found.problem.startswith("onnxruntime cannot run the fp32 graphs (")
    with pytest.raises(BundleError, match="no runtime can open this bundle here: onnxruntime cannot run"):
        pocketsam.load(copy, threads=1)
