"""The generated pages of models and benchmarks: which measurements reach them, and what is said without any."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def imported(name: str) -> ModuleType:
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return imported("make_models_doc")


def row(runtime: str, precision: str, ratio: float, size: int = 0) -> dict[str, Any]:
    """A row of a benchmark, as far as the page reads it."""
    format_ = {"onnxruntime": "onnx"}.get(runtime, runtime)
    return {"runtime": runtime, "precision": precision, "status": "ok", "version": "1.2.3",
            "reference": runtime == "pytorch", "format": "" if runtime in ("pytorch", "rival") else format_,
            "bytes": {"encoder": size}, "agreement": {"all": {"mean": 1 - ratio / 1e4}},
            "encoder": {"p50_ms": 1000 / ratio, "times_pytorch": {"value": ratio}}}


def measured(model: str, threads: int = 2) -> dict[str, Any]:
    """A complete benchmark with one format that nobody could time."""
    evaluator = {**row("coreml", "fp32", 1.0, 9_000_000), "status": "only proven here"}
    return {"model": {"name": model}, "complete": True, "settings": {"threads": [threads]},
            "machine": {"cpu": "Some CPU", "cores": 2, "features": ["avx2"], "system": "Linux", "python": "3.11"},
            "refused": {},
            "rows": [row("pytorch", "fp32", 1.0), row("onnxruntime", "fp32", 1.5, 10_000_000),
                     row("litert", "fp32", 2.5, 12_500_000), row("litert", "int8", 4.0, 3_100_000),
                     row("rival", "fp32", 9.0), evaluator,
                     row("openvino", "fp32", 2.0, 9_000_000),
                     {**row("openvino", "fp16", 5.0, 4_500_000), "compute": "bf16"}]}


def test_like_is_compared_with_like(tool: ModuleType) -> None:
    """int8 is faster still and so is bf16, so they stand in columns of their own; rivals are no formats of ours."""
    line = tool.speed_row("edge_sam", measured("edge_sam"))
    assert line == ("| edge_sam | 1000 | litert | 400 | 2.50 | litert int8 | 4.00 | 0.9998 | 5.00 | 0.9995 | "
                    "10.0 / - | 9.0 / - | 12.5 / 3.1 | 9.0 / - |\n")


def test_unmeasured_model_has_dashes(tool: ModuleType) -> None:
    line = tool.speed_row("edge_sam", None)
    assert line.count(" - ") == 13
    assert line.count("|") == tool.speed_row("edge_sam", measured("edge_sam")).count("|")


def test_conditions_are_told_apart(tool: ModuleType) -> None:
    one, two = measured("edge_sam"), measured("edgetam")
    assert tool.conditions({"edge_sam": one, "edgetam": two}, tool.Earlier()).count("Some CPU") == 1
    text = tool.conditions({"edge_sam": one, "edgetam": measured("edgetam", threads=4)}, tool.Earlier())
    assert "for edge_sam with 2 threads" in text
    assert "for edgetam with 4 threads" in text
    assert "litert 1.2.3" in text


def test_folders_are_read_whole_and_refusals_shown(tool: ModuleType, tmp_path: Path) -> None:
    for name, complete in (("edge_sam", True), ("edgetam", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench.json").write_text(json.dumps({**measured(name), "complete": complete}))
    (tmp_path / "edge_sam" / "refused.json").write_text(json.dumps({"openvino int8": "operator Fold is unknown."}))
    found = tool.measurements(tmp_path)
    assert list(found) == ["edge_sam"]
    assert "- edge_sam, openvino int8: operator Fold is unknown." in tool.refusals(found, tool.Earlier())
    (tmp_path / "edge_sam" / "bench.json").write_text(json.dumps(measured("edgetam")))
    with pytest.raises(SystemExit, match="holds measurements of edgetam"):
        tool.measurements(tmp_path)
    with pytest.raises(SystemExit, match="no such model: unheard_of"):
        tool.document(["edge_sam"], {"unheard_of": measured("unheard_of")})


def test_what_is_not_measured_again_stays(tool: ModuleType) -> None:
    names = ["edge_sam", "edgetam", "sam2.1_tiny"]
    refusing = {**measured("edgetam", threads=4), "refused": {"litert int8": "operator Fold is unknown."}}
    before = tool.document(names, {"edge_sam": measured("edge_sam"), "edgetam": refusing})
    assert tool.document(names, {}, before) == before
    page = tool.document(names, {"edge_sam": measured("edge_sam", threads=8)}, before)
    assert [r for r in page.splitlines() if r.startswith("| edgetam")] == [
        r for r in before.splitlines() if r.startswith("| edgetam")]
    assert "for edgetam with 4 threads" in page
    assert "for edge_sam with 8 threads" in page
    assert "with 2 threads" not in page
    assert page.count("- edgetam, litert int8: operator Fold is unknown.") == 1
    again = tool.document(names, {"edgetam": measured("edgetam")}, page)
    assert "Fold" not in again
    assert "for edgetam with 2 threads" in again


@pytest.mark.parametrize("trained", [False, True])
def test_a_benchmark_that_was_stopped_after_its_run_is_not_published(
        trained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rivals and whether the weights are official come after the run, which has called its result complete."""
    monkeypatch.syspath_prepend(str(TOOLS))
    # The tool sets it for its workers.
    monkeypatch.setenv("PYTHONPATH", "")
    bench_docs = imported("bench_docs")

    def measures_again(*args: object) -> None:
        raise InterruptedError

    result = {**measured("edge_sam"), "kind": "pocketsam-bench", "schema": 1, "created": "2026", "device": "Some CPU",
              "pocketsam": "0.1.0"}
    for row_ in result["rows"]:
        row_ |= {"threads": 2, "status": "not timed"}
        del row_["encoder"]
    result["model"] |= {"image_size": 1024, "weights_sha256": "0", **({"trained": True} if trained else {})}
    (tmp_path / "edge_sam").mkdir()
    (tmp_path / "edge_sam" / "bench.json").write_text(json.dumps(result))
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(bench_docs, "ROOT", tmp_path)
    monkeypatch.setattr(bench_docs, "find_checkpoint", measures_again)
    monkeypatch.setattr(sys, "argv", ["bench_docs.py", str(tmp_path), "--write"])
    bench_docs.main()
    assert ("## edge_sam" in (tmp_path / "docs" / "benchmarks.md").read_text("utf-8")) == trained
    monkeypatch.setattr(sys, "argv", ["bench_docs.py", str(tmp_path), "edge_sam"])
    if trained:
        bench_docs.main()
        assert "edge_sam: measured before" in capsys.readouterr().out
    else:
        with pytest.raises(InterruptedError):
            bench_docs.main()
