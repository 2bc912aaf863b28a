"""Core ML: packages that follow the contract, executed by the MIL evaluator against PyTorch and the goldens."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pocketsam
from pocketsam.bundle import read_bundle
from pocketsam.errors import MissingDependency, UsageError
from pocketsam.export import coreml, rewrites
from pocketsam.export.graphs import EncoderGraph
from pocketsam.geometry import Frame
from pocketsam.models.efficient_vit import LinearAttention
from pocketsam.models.loading import load_model
from pocketsam.parity import compare
from pocketsam.predictor import Predictor
from pocketsam.runtimes.mil.evaluate import Evaluator
from pocketsam.runtimes.mil.program import Function, Operation, load_package
from pocketsam.specs import GraphSpec, TensorSpec

logging.getLogger("coremltools").setLevel(logging.ERROR)
ct = pytest.importorskip("coremltools")
cto = pytest.importorskip("coremltools.optimize.coreml")

DYNAMIC = {"resize", "resize_bilinear", "resize_nearest_neighbor", "non_zero", "while_loop", "cond", "shape",
           "range_1d"}
LOGITS = 90_000.0


def sam(bundle: Path, precision: str = "fp32") -> Predictor:
    return pocketsam.load(bundle, runtime="coreml", precision=precision, threads=2)


def package(bundle: Path, graph: str, precision: str) -> Path:
    return bundle / f"coreml/{graph}.{precision}.mlpackage"


@pytest.fixture(scope="module")
def reference(toy_checkpoint: Path) -> Predictor:
    return pocketsam.load("toy_sam", checkpoint=toy_checkpoint, runtime="pytorch", threads=2)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_equals_pytorch(toy_everywhere: Path, reference: Predictor, golden_image: np.ndarray[Any, Any], precision: str,
                        limit: float) -> None:
    agreement = compare(reference, sam(toy_everywhere, precision), [golden_image, golden_image[:, ::-1].copy()])
    assert max(agreement.tensor_errors.values()) <= limit
    assert agreement.mean >= {"fp32": 0.9999, "fp16": 0.995}[precision]
    if precision == "fp16":
        assert max(agreement.tensor_errors.values()) > 1e-5, "this is not fp16"


def test_the_contract(toy_everywhere: Path) -> None:
    bundle = read_bundle(toy_everywhere)
    for precision in ("fp32", "fp16"):
        encoder = load_package(bundle.file(bundle.find("coreml", precision, "encoder")))
        assert encoder.image_inputs == {"image": "RGB"}
        assert encoder.version == 8
        assert [i.shape for i in encoder.functions["main"].inputs] == [(1, 3, 128, 128)]
        decoder = load_package(bundle.file(bundle.find("coreml", precision, "decoder")))
        assert decoder.default == "decode_1"
        assert set(decoder.functions) == {"decode_1", "decode_16"}
        for batch in (1, 16):
            function, spec = decoder.functions[f"decode_{batch}"], bundle.spec.decoder_graph(bundle.slots)
            assert {i.name: i.shape for i in function.inputs} == {t.name: t.concrete(batch) for t in spec.inputs}
            assert list(function.outputs) == spec.output_names
        for function in (*encoder.functions.values(), *decoder.functions.values()):
            assert {i.dtype for i in function.inputs} == {"fp32"}
            assert {dtypes(function)[name] for name in function.outputs} == {"fp32"}


def dtypes(function: Function) -> dict[str, str]:
    return {o.name: o.dtype for operation in function.operations for o in operation.outputs}


def test_nothing_dynamic_and_four_dimensions(toy_everywhere: Path) -> None:
    for graph in ("encoder", "decoder"):
        for function in load_package(package(toy_everywhere, graph, "fp32")).functions.values():
            operations = [o for o in function.operations if o.type != "const"]
            assert not {o.type for o in operations} & DYNAMIC
            shapes = [out.shape for o in operations for out in o.outputs]
            assert max(map(len, shapes)) <= 4
            assert all(n > 0 for shape in shapes for n in shape), "a size is not known before the run"


def test_colours_are_not_swapped(toy_everywhere: Path, reference: Predictor) -> None:
    red = np.zeros((96, 128, 3), np.uint8)
    red[20:60, 30:90, 0] = 255
    ours = sam(toy_everywhere).embed(red).features["image_embeddings"]
    swapped = reference.embed(red[..., ::-1].copy()).features["image_embeddings"]
    assert np.abs(ours - reference.embed(red).features["image_embeddings"]).max() < 1e-4
    assert np.abs(ours - swapped).max() > 0.1


def test_batches_equal_single_prompts(toy_everywhere: Path, golden_image: np.ndarray[Any, Any]) -> None:
    predictor = sam(toy_everywhere)
    predictor.set_image(golden_image)
    boxes = np.array([[10 + 20 * i, 5 + 9 * i, 300 + 20 * i, 200 + 9 * i] for i in range(19)])
    together = predictor.predict_boxes(boxes)
    for i in (0, 15, 16, 18):
        alone = predictor.predict(box=boxes[i], multimask=False)
        assert np.abs(alone.logits[0] - together.logits[i]).max() <= 1e-5
        assert abs(alone.scores[0] - together.scores[i]) <= 1e-5


def test_says_what_it_is(toy_everywhere: Path) -> None:
    info = sam(toy_everywhere).runtime.info()
    assert (info["runtime"], info["engine"]) == ("coreml", "mil-evaluator")
    assert "verifies" in info["note"]


def test_the_evaluator_needs_torch(toy_everywhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketsam.runtimes.coreml.ON_MACOS", False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependency, match=r"off a Mac, by the evaluator, needs torch.*pocketsam\[torch\]"):
        pocketsam.load(toy_everywhere, runtime="coreml")


def test_unknown_compute_unit(toy_everywhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETSAM_COREML_UNIT", "TPU")
    with pytest.raises(UsageError, match="choose one of ALL, CPU_ONLY"):
        sam(toy_everywhere)


def producers(function: Function) -> dict[str, Operation]:
    return {out.name: operation for operation in function.operations for out in operation.outputs}


def logit_products(function: Function) -> list[Operation]:
    """The matrix products whose results reach a softmax through arithmetic and reshaping only."""
    by_name, found = producers(function), []
    pending = [o for o in function.operations if o.type == "softmax"]
    assert pending
    while pending:
        for bindings in pending.pop().inputs.values():
            parents = [by_name[b] for b in bindings if isinstance(b, str) and b in by_name]
            found += [p for p in parents if p.type == "matmul"]
            pending += [p for p in parents if p.type in coreml.LOGIT_PATH]
    return found


def check_protected(function: Function) -> None:
    held = [o for o in function.operations if o.type in coreml.ALWAYS_FP32] + logit_products(function)
    assert {o.outputs[0].dtype for o in held} == {"fp32"}
    heavy = [o.outputs[0].dtype for o in function.operations if o.type in ("linear", "conv")]
    assert heavy.count("fp16") > 0.8 * len(heavy)


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_fp16_keeps_what_overflows(toy_everywhere: Path, graph: str) -> None:
    for function in load_package(package(toy_everywhere, graph, "fp16")).functions.values():
        check_protected(function)


@pytest.fixture(scope="module")
def hot_checkpoint(toy_checkpoint: Path) -> Path:
    """The toy model with attention logits of 90,000 more, the same for every key, so that softmax must not care."""
    state = torch.load(toy_checkpoint, weights_only=True)
    for block in ("0", "1"):
        weight, bias = (state[f"image_encoder.blocks.{block}.attn.qkv.{n}"] for n in ("weight", "bias"))
        # Rows of q, then k, two heads of width 16 each; the first channel of each head becomes a constant.
        for row in (0, 16, 32, 48):
            weight[row], bias[row] = 0, (LOGITS * 16 ** 0.5) ** 0.5
    path = toy_checkpoint.parent / "hot.pt"
    torch.save(state, path)
    return path


class Hybrid:
    """Encodes with a Core ML package in fp16 and decodes with PyTorch, so that only the encoder is on trial."""

    def __init__(self, checkpoint: Path, path: Path) -> None:
        model = rewrites.prepare(load_model("toy_sam", checkpoint))
        coreml.CoreMlExporter.export(EncoderGraph(model).eval(), model.spec.encoder_graph(), "fp16", path)
        self.encoder = Evaluator(path)
        self.reference = pocketsam.load("toy_sam", checkpoint=checkpoint, runtime="pytorch", threads=2)
        self.spec, self.slots = self.reference.runtime.spec, self.reference.runtime.slots
        self.decode, self.info = self.reference.runtime.decode, self.reference.runtime.info

    def encode(self, image: np.ndarray[Any, Any], frame: Frame) -> dict[str, Any]:
        return self.encoder.run({"image": np.ascontiguousarray(image.transpose(0, 3, 1, 2), np.float32)})


def test_large_attention_logits_survive_fp16(hot_checkpoint: Path, tmp_path: Path,
                                             golden_image: np.ndarray[Any, Any]) -> None:
    hybrid = Hybrid(hot_checkpoint, tmp_path / "encoder.mlpackage")
    assert compare(hybrid.reference, Predictor(hybrid), [golden_image]).mean >= 0.995


def test_without_the_selector_they_overflow(hot_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            golden_image: np.ndarray[Any, Any]) -> None:
    """Everything in fp16 gives NaN embeddings and empty masks, far below any gate."""
    monkeypatch.setattr(coreml, "fits_fp16", lambda operation: True)
    hybrid = Hybrid(hot_checkpoint, tmp_path / "encoder.mlpackage")
    predictor = Predictor(hybrid)
    embedding = predictor.set_image(golden_image)
    assert np.isnan(embedding.features["image_embeddings"]).all()
    assert not predictor.predict(box=(100, 100, 400, 300), multimask=False).masks.any()
    assert compare(hybrid.reference, predictor, [golden_image]).mean < 0.5


class Deep(nn.Module):
    """A residual stream longer than Python's stack, as of SAM 2.1 large."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(350):
            x = 0.5 * (x + x.sigmoid())
        return x


def test_a_deep_encoder_is_converted_to_fp16(tmp_path: Path) -> None:
    graph, x = Deep().eval(), torch.randn(1, 3, 8, 8)
    spec = GraphSpec("encoder", (TensorSpec("x", "float32", (1, 3, 8, 8)),),
                     (TensorSpec("y", "float32", (1, 4, 8, 8)),))
    coreml.convert(graph, spec, "fp16", 1).save(str(tmp_path / "encoder.mlpackage"))
    with torch.no_grad():
        expected = graph(x).numpy()
    got = Evaluator(tmp_path / "encoder.mlpackage").run({"x": x.numpy()})["y"]
    np.testing.assert_allclose(got, expected, atol=5e-3)


def linear_attention(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Answers of PyTorch and of an fp16 package; large keys, and positions whose queries are all negative."""
    torch.manual_seed(0)
    layer = LinearAttention(32, 5).eval()
    with torch.no_grad():
        layer.qkv.conv.weight.mul_(8)
    graph = nn.Sequential(nn.Conv2d(3, 32, 1), layer).eval()
    spec = GraphSpec("encoder", (TensorSpec("x", "float32", (1, 3, 32, 32)),),
                     (TensorSpec("y", "float32", (1, 32, 32, 32)),))
    x = torch.randn(1, 3, 32, 32) * 8
    x[:, :, :4, :4] = 0
    with torch.no_grad():
        expected = graph(x).numpy()
    coreml.convert(graph, spec, "fp16", 1).save(str(path))
    return expected, Evaluator(path).run({"x": x.numpy()})["y"]


def test_linear_attention_survives_fp16(tmp_path: Path) -> None:
    expected, got = linear_attention(tmp_path / "encoder.mlpackage")
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()


def test_without_the_selector_linear_attention_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml, "_quotient", lambda operation: False)
    assert not np.isfinite(linear_attention(tmp_path / "encoder.mlpackage")[1]).all()


COMPRESSED = [
    ("int8", "linear_quantize_weights", lambda: cto.OpLinearQuantizerConfig(mode="linear_symmetric",
                                                                            weight_threshold=256), 0.05),
    *[(f"palettized-{bits}", "palettize_weights",
       lambda bits=bits: cto.OpPalettizerConfig(mode="uniform", nbits=bits, weight_threshold=256), limit)
      for bits, limit in ((4, 0.9), (6, 0.3), (8, 0.1))],
]


@pytest.mark.parametrize(("how", "config", "limit"), [c[1:] for c in COMPRESSED], ids=[c[0] for c in COMPRESSED])
def test_compressed_encoder(toy_everywhere: Path, tmp_path: Path, how: str, config: Callable[[], Any],
                            limit: float) -> None:
    """The toy encoder with compressed weights equals its decompressed form, and stays near the original."""
    original = package(toy_everywhere, "encoder", "fp32")
    packed = getattr(cto, how)(ct.models.MLModel(str(original), skip_model_load=True),
                               cto.OptimizationConfig(global_config=config()))
    packed.save(str(tmp_path / "packed.mlpackage"))
    cto.decompress_weights(packed).save(str(tmp_path / "plain.mlpackage"))
    x = {"image": np.random.default_rng(0).integers(0, 256, (1, 3, 128, 128)).astype(np.float32)}
    evaluators = [Evaluator(p) for p in (tmp_path / "packed.mlpackage", tmp_path / "plain.mlpackage", original)]
    ours, plain, full = (e.run(x)["image_embeddings"] for e in evaluators)
    constexprs = [o for o in evaluators[0].function.operations if o.type.startswith("constexpr_")]
    assert len(constexprs) >= 8
    assert np.abs(ours - plain).max() <= 1e-4
    assert 1e-3 < np.abs(ours - full).std() <= limit


def test_conversion_is_quiet_and_leaves_no_scraps(toy_checkpoint: Path, toy_everywhere: Path) -> None:
    code = ("import numpy as np; from pocketsam.export.coreml import coremltools; coremltools();"
            "from pocketsam.runtimes.mil.program import load_package; from pathlib import Path;"
            f"load_package(Path({str(package(toy_everywhere, 'encoder', 'fp32'))!r}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "Failed to load" not in done.stderr
    assert "has not been tested" not in done.stderr
    files = {p.name for p in (toy_everywhere / "coreml").rglob("*") if p.is_file()}
    assert files == {"Manifest.json", "model.mlmodel", "weight.bin"}


@pytest.mark.slow
def test_mobile_sam_keeps_attention_in_fp32(golden_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """What it computes is tests/test_matrix.py's matter."""
    model = load_model("mobile_sam", golden_checkpoint("mobile_sam"))
    rewrites.prepare(model)
    path = tmp_path / "encoder.mlpackage"
    coreml.CoreMlExporter.export(EncoderGraph(model).eval(), model.spec.encoder_graph(), "fp16", path)
    function = load_package(path).functions["main"]
    assert len([o for o in function.operations if o.type == "softmax"]) == 10
    assert len(logit_products(function)) == 10
    check_protected(function)
