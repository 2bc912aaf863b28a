"""The generated page of models: which measurements reach it, and what it says of models without any."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "make_models_doc.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_models_doc", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(model: str, threads: int = 2) -> dict[str, Any]:
    """What ``measure_main_path.py`` prints, as far as the page reads it."""
    ratios = {"pytorch fp32": 1.0, "onnxruntime fp32": 1.5, "litert fp32": 2.5, "litert fp16": 9.0}
    return {"model": model, "threads": threads,
            "machine": {"cpu": "Some CPU", "cores": 2, "features": ["avx2"], "system": "Linux", "python": "3.11"},
            "versions": dict.fromkeys(ratios, "1.2.3"),
            "encoder": {n: {"p50_ms": 1000 / r, "times_faster": r} for n, r in ratios.items()},
            "files": {"onnx fp32": {"mb": 10.0, "mask_agreement": 1.0}, "litert fp32": {"mb": 12.5,
                                                                                       "mask_agreement": 1.0}}}


def test_best_format_is_an_fp32_one(tool: ModuleType) -> None:
    """The fp16 file is faster still, but the page compares like with like."""
    row = tool.speed_row("edge_sam", measured("edge_sam"))
    assert row == "| edge_sam | 1000 | litert | 400 | 2.50 | 10.0 | - | 12.5 | - |\n"


def test_unmeasured_model_has_dashes(tool: ModuleType) -> None:
    row = tool.speed_row("edge_sam", None)
    assert row.count(" - ") == 8
    assert row.count("|") == tool.speed_row("edge_sam", measured("edge_sam")).count("|")


def test_conditions_are_told_apart(tool: ModuleType) -> None:
    one, two = measured("edge_sam"), measured("edgetam")
    assert tool.conditions({"edge_sam": one, "edgetam": two}).count("Some CPU") == 1
    text = tool.conditions({"edge_sam": one, "edgetam": measured("edgetam", threads=4)})
    assert "for edge_sam with 2 threads" in text
    assert "for edgetam with 4 threads" in text
    assert "litert 1.2.3" in text


def test_files_must_match_their_model(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "edge_sam.json").write_text(json.dumps(measured("edgetam")))
    with pytest.raises(SystemExit, match="holds measurements of edgetam"):
        tool.measurements(tmp_path)
    with pytest.raises(SystemExit, match="no such model: unheard_of"):
        tool.document(["edge_sam"], {"unheard_of": measured("unheard_of")})
