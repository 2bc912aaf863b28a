"""The export pipeline: gates, atomic writes, reuse, and ONNX files that are clean and equal the goldens."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from goldens import Golden

import pocketsam
from pocketsam import registry
from pocketsam.bundle import MANIFEST, read_bundle
from pocketsam.errors import (
    BundleError,
    CheckpointError,
    MissingDependency,
    OutputError,
    ParityError,
    UnknownName,
    UnsupportedModel,
    UsageError,
    WorkerError,
)
from pocketsam.export import onnx as onnx_export
from pocketsam.export.conversions import Conversion, Source, convert_all
from pocketsam.export.graphs import EncoderGraph
from pocketsam.models.loading import load_model
from pocketsam.photos import photo_paths
from pocketsam.quantize.onnx import OnnxQuantizer

# Operators that a finished graph must not hold: layers to fold, and leftovers of tracing.
UNFINISHED = {"BatchNormalization", "Identity", "Dropout", "Resize", "If", "Loop", "GatherND", "Constant"}


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_onnx_graphs_are_clean(toy_bundle: Path, graph: str) -> None:
    bundle = read_bundle(toy_bundle)
    model = onnx.load(str(bundle.file(bundle.find("onnx", "fp32", graph))))
    operators = {n.op_type for n in model.graph.node}
    assert not operators & UNFINISHED
    assert {n.domain for n in model.graph.node} <= {"", "ai.onnx"}
    spec = bundle.spec.encoder_graph() if graph == "encoder" else bundle.spec.decoder_graph(bundle.slots)
    for info, tensor in zip([*model.graph.input, *model.graph.output], [*spec.inputs, *spec.outputs], strict=True):
        shape = tuple(d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim)
        assert (info.name, shape) == (tensor.name, tensor.shape)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info}
    assert len(ranks) > 20
    assert max(ranks.values()) <= 4


@pytest.mark.slow
def test_weights_too_large_for_one_onnx_file(toy_checkpoint: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """As ViT-H's are, with a lower limit: they lie beside the graph, run, and are covered by the recorded sha256."""
    monkeypatch.setattr(onnx_export, "LARGEST", 1000)
    out = tmp_path / "large.bundle"
    bundle = pocketsam.export("toy_sam", checkpoint=toy_checkpoint, formats=["onnx", "openvino"], out=out, clicks=False)
    held = {p.relative_to(out / "onnx").as_posix() for p in (out / "onnx").rglob("*") if p.is_file()}
    assert held == {f"{g}.fp32.onnx/{f}" for g in ("encoder", "decoder") for f in ("model.onnx", "model.onnx.data")}
    assert all(a.measured["all"]["mean"] >= 0.999 for a in bundle.artifacts)
    with pytest.raises(UnsupportedModel, match="below 2 GiB"):
        OnnxQuantizer(SimpleNamespace(source=out / "onnx/encoder.fp32.onnx"))  # type: ignore[arg-type]
    with (out / "onnx/decoder.fp32.onnx/model.onnx.data").open("r+b") as f:
        f.write(b"\1\1\1\1")
    with pytest.raises(BundleError, match="does not match"):
        pocketsam.load(out, runtime="onnxruntime")


def test_weights_too_large_for_a_format(toy_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FORMAT_LIMITS, "litert", 1000)
    with pytest.raises(UnsupportedModel, match="a file for litert holds; choose of onnx, openvino, coreml"):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, formats=["onnx", "litert"], out=tmp_path / "no.bundle")
    assert list(tmp_path.iterdir()) == []


def test_failed_gate_leaves_nothing(toy_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that computes something else must be caught by the mask gate."""
    original = EncoderGraph.forward

    def wrong(self: EncoderGraph, image: Any) -> Any:
        return tuple(f * 0.5 for f in original(self, image))

    monkeypatch.setattr(EncoderGraph, "forward", wrong)
    with pytest.raises(ParityError, match=r"below the gate of 0\.999"):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=tmp_path / "bad.bundle", clicks=False)
    assert list(tmp_path.iterdir()) == []


def test_failed_gate_keeps_the_old_bundle(toy_bundle: Path, toy_checkpoint: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(shutil.copytree(toy_bundle, tmp_path / "toy.bundle"))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr("pocketsam.export.pipeline._key", lambda *args: "changed")
    monkeypatch.setattr("pocketsam.export.onnx.OnnxExporter.export", staticmethod(_fail))
    with pytest.raises(OutputError, match="No space left"):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["toy.bundle"]


def _fail(*args: object) -> None:
    raise OSError(28, "No space left on device")


def test_unchanged_artifacts_are_kept(toy_bundle: Path, toy_checkpoint: Path, tmp_path: Path) -> None:
    out, lines = Path(shutil.copytree(toy_bundle, tmp_path / "toy.bundle")), []
    first = json.loads((out / MANIFEST).read_text())
    pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=out, report=lines.append)
    assert sum(line.startswith("kept") for line in lines) == len(first["artifacts"])
    assert json.loads((out / MANIFEST).read_text()) == first
    (out / "onnx/decoder.fp32.onnx").write_bytes(b"damaged")
    pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=out, report=lines.append)
    assert "exporting onnx/decoder.fp32.onnx" in lines
    pocketsam.load(out)


def test_a_folder_that_is_no_bundle_is_not_replaced(toy_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="is not a bundle"):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


FULL_DISK = """
import resource, sys
sys.path.insert(0, {tests!r})
import conftest
from pocketsam import registry
from pocketsam.models import catalog
from pocketsam.specs import ModelSpec
catalog.SPECS["toy_sam"] = ModelSpec(name="toy_sam", family="sam", image_size=128, embed_dim=32, embed_size=8)
registry.MODELS["toy_sam"] = "toy_model:build"
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.argv = ["pocketsam", "export", "toy_sam", "--checkpoint", {checkpoint!r}, "-o", {out!r}]
from pocketsam.cli import main
main()
"""


def test_full_disk(toy_checkpoint: Path, tmp_path: Path) -> None:
    """A file that cannot grow, as on a full disk: one sentence, exit code 2, nothing left."""
    out = tmp_path / "toy.bundle"
    code = FULL_DISK.format(tests=str(Path(__file__).parent), checkpoint=str(toy_checkpoint), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_exported_bundle_equals_the_goldens(golden_checkpoint: Callable[[str], Path], tmp_path: Path,
                                            golden_image: np.ndarray[Any, Any]) -> None:
    """Logits too; the matrix test holds masks and scores of every model and format to the goldens."""
    model = "mobile_sam"
    golden = Golden.of(model)
    pocketsam.export(model, checkpoint=golden_checkpoint(model), out=tmp_path / "b", images=[golden_image],
                     clicks=False)
    sam = pocketsam.load(tmp_path / "b", runtime="onnxruntime", threads=2)
    sam.set_image(golden_image)
    for name, p in golden.manifest["prompts"].items():
        mask = golden.arrays["mask_input"] if p["mask"] else None
        for mode in ("single", "multi"):
            result = sam.predict(p["points"], p["labels"], p["box"], mask, multimask=mode == "multi")
            wrong = (golden.masks(name, mode) != result.masks).sum(axis=(1, 2))
            assert wrong.max() <= 10, (name, mode, wrong)
            assert np.abs(result.scores - golden.arrays[f"{name}/{mode}/iou"]).max() <= 2e-5
            low = result.logits[:, 1::4, 2::4][:, ::2, ::2]
            assert np.abs(low - golden.arrays[f"{name}/{mode}/low_sub"]).max() <= 1e-4


def test_several_processes_make_the_same_bundle(tmp_path: Path) -> None:
    options: dict[str, Any] = {"formats": ["onnx", "openvino"], "image_size": 128, "clicks": False}
    lines: list[str] = []
    one = pocketsam.export("lite0", out=tmp_path / "one.bundle", **options)
    two = pocketsam.export("lite0", out=tmp_path / "two.bundle", jobs=2, report=lines.append, **options)
    assert [(a.path, a.key) for a in two.artifacts] == [(a.path, a.key) for a in one.artifacts]
    assert all(a.measured["all"]["mean"] > 0.999 for a in two.artifacts)
    assert read_bundle(two.root) == two
    assert "exporting 4 graphs in 2 processes" in lines


class Dying(Source):
    """A model that takes its process with it."""

    def load(self) -> Any:
        os._exit(1)


@pytest.mark.parametrize(("source", "error", "words"), [
    (Dying, WorkerError, "nothing was written, try again with --jobs 1"),
    (Source, CheckpointError, "does not exist"),
])
def test_what_goes_wrong_in_a_process_is_one_sentence(tmp_path: Path, source: type[Source], error: type[Exception],
                                                      words: str) -> None:
    tasks = [Conversion("onnx", g, "fp32", tmp_path / f"{g}.fp32.onnx") for g in ("encoder", "decoder")]
    missing = source("lite0", tmp_path / "none.safetensors", 128, 8)
    with pytest.raises(error, match=words):
        convert_all(tasks, None, missing, 2, lambda text: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [MissingDependency("onnx", "onnx", "this"), UnknownName("model", "x", ["y"]),
                                   OutputError("a sentence.")])
def test_errors_travel_between_processes(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize("format_", ["openvino", "litert"])
def test_a_graph_is_made_from_its_own_bundle_only(toy_checkpoint: Path, tmp_path: Path, format_: str) -> None:
    """A file that happens to lie where a bundle would have it is not what was asked to be converted."""
    model = load_model("toy_sam", toy_checkpoint)
    spec = model.spec.graphs(8)["encoder"]
    exporter = registry.load("format", format_)
    planted = tmp_path / ("onnx/encoder.fp32.onnx" if format_ == "openvino" else "elsewhere/encoder.fp32.tflite")
    planted.parent.mkdir()
    planted.write_bytes(b"planted")
    path = tmp_path / "somewhere" / f"encoder.{exporter.extension}"
    path.parent.mkdir()
    exporter.export(EncoderGraph(model).eval(), spec, "fp32", path)
    assert path.exists()


@pytest.mark.slow
def test_converters_leave_the_process_and_the_temporary_folder_alone(toy_checkpoint: Path, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    # torch would set it to a folder there.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=tmp_path / "b", formats=["litert", "coreml"],
                     precisions=["fp32", "int8"], clicks=False, images=photo_paths()[:1], calibration_images=2,
                     gate=0.0)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert list((tmp_path / "temporary").glob("*.mlpackage")) == []


def test_no_process_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="jobs is 0; expected at least 1"):
        pocketsam.export("lite0", out=tmp_path / "none.bundle", jobs=0)
