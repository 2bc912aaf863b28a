"""Benchmarks of what cannot be had: refused before anything is timed, or left out and told."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pocketsam.benchmarks import accuracy, latency, processes, roofline
from pocketsam.benchmarks.latency import Plan
from pocketsam.benchmarks.options import Options, check_counts
from pocketsam.benchmarks.results import read
from pocketsam.benchmarks.run import _add_agreement, run
from pocketsam.benchmarks.targets import Target
from pocketsam.bundle import read_bundle
from pocketsam.errors import BenchmarkError, CheckpointError, MissingDependency, OutputError, UsageError

Run = Callable[..., Any]
QUICK = Plan(rounds=1, calls=(1, 1), warmup=1, extra=0, cold=False)


def missing(*args: Any, **kwargs: Any) -> Any:
    raise MissingDependency("what", "all", "this")


def test_what_cannot_be_had_is_left_out_and_told(toy_bundle: Path, toy_checkpoint: Path, drawn_pack: Path,
                                                tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that comes after the rounds is worth losing them."""
    for name in ("ceiling", "count", "fallbacks"):
        monkeypatch.setattr(roofline, name, missing)
    monkeypatch.setattr(accuracy, "agreement", missing)
    told: list[str] = []
    options = Options(plan=QUICK, threads=(1,), checkpoint=str(toy_checkpoint), data=drawn_pack, images=1, regions=1)
    run(toy_bundle, options, tmp_path, told.append)
    assert [line.partition(":")[0] for line in told if "this needs what" in line] == [
        "ceilings left out", *(f"{w} of onnxruntime fp32 left out" for w in ("floor", "operators", "accuracy"))]
    result = read(tmp_path / "bench.json")
    assert result["complete"]
    row = next(r for r in result["rows"] if r["runtime"] == "onnxruntime")
    assert row["encoder"]["p50_ms"] > 0
    assert not {"floor", "flops", "operators"} & row["encoder"].keys()
    assert "Partial" not in (tmp_path / "bench.html").read_text("utf-8")
    assert "onnxruntime" in (tmp_path / "bench.csv").read_text("utf-8")


def test_agreement_in_bf16_is_left_out_without_a_reference(toy_bundle: Path) -> None:
    row = {"runtime": "openvino", "precision": "fp32", "compute": "bf16", "status": "ok", "agreement": None}
    told: list[str] = []
    _add_agreement(read_bundle(toy_bundle), {"rows": [row], "settings": {"threads": [1]}}, Options(), told.append)
    assert told == ["agreement in bf16 left out: toy_sam needs its checkpoint; `pocketsam models` lists the file and "
                    "its address."]
    assert row["agreement"] is None


@pytest.mark.parametrize(("name", "least"), [("images", 1), ("prompts", 2), ("regions", 1), ("photos", 1)])
def test_counts_have_a_least(name: str, least: int) -> None:
    check_counts(Options(**{name: least}))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"{name} is {least - 1}; expected at least {least}"):
        check_counts(Options(**{name: least - 1}))  # type: ignore[arg-type]


def test_a_reference_of_other_weights_is_refused(toy_bundle: Path, toy_checkpoint: Path, drawn_pack: Path,
                                                 tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is timed."""
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "toy.bundle"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["weights"]["sha256"] = "0" * 64
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(latency, "measure", missing)
    with pytest.raises(CheckpointError, match="exported from other weights"):
        run(bundle, Options(checkpoint=str(toy_checkpoint), data=drawn_pack), tmp_path / "out", print)


def test_a_place_that_cannot_be_written_is_told_before_timing(toy_bundle: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "measure", missing)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        run(toy_bundle, Options(), tmp_path / "file", print)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is timed there")
def test_nothing_is_compared_with_what_is_not_timed(toy_everywhere: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"coreml is not timed on this machine.* one of litert, onnxruntime"):
        run(toy_everywhere, Options(against="coreml"), tmp_path / "out", print)


def breaks(target: Target) -> Any:
    raise LookupError("no memory for a tensor\nand more")


def test_whatever_an_engine_fails_with_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with closing(processes.Worker(Target("x", "fp32", 1, factory=f"{__name__}:breaks"), tmp_path)) as worker:
        assert worker.facts == {"problem": "LookupError: no memory for a tensor"}


def test_accuracy_without_its_reference_is_refused_before_timing(cli: Run, toy_bundle: Path, drawn_pack: Path,
                                                                tmp_path: Path) -> None:
    got = cli("bench", toy_bundle, "-o", tmp_path / "out", "--data", drawn_pack)
    assert got.code == 2
    assert "toy_sam needs its checkpoint" in got.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("args", "message"), [
    (("--compute", "fp4"), "unknown inference precision 'fp4'"),
    (("--compute", "bf16"), "only OpenVINO can be asked to compute in bf16"),
    (("--threads", "0"), "expected 1 to"), (("--threads", "4096"), "expected 1 to"),
    (("--threads", "two"), "whole numbers"), (("--against", "tensorrt"), "no tensorrt"),
    (("--rounds", "0"), "rounds is 0; expected at least 1"), (("--images", "0"), "images is 0; expected at least 1"),
])
def test_bad_options(cli: Run, toy_bundle: Path, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    got = cli("bench", toy_bundle, "-o", tmp_path / "out", *args)
    assert got.code == 2
    assert message in got.err
    assert not (tmp_path / "out").exists()
