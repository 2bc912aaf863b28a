"""Constants of MIL programs: compressed weights as coremltools writes them, packed bits, fp16, and damaged files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketsam.errors import BundleError
from pocketsam.runtimes.mil import constants
from pocketsam.runtimes.mil.arguments import Arguments
from pocketsam.runtimes.mil.blobs import unpack
from pocketsam.runtimes.mil.errors import UnknownOperator
from pocketsam.runtimes.mil.evaluate import Evaluator
from pocketsam.runtimes.mil.program import load_package

logging.getLogger("coremltools").setLevel(logging.ERROR)
mb = pytest.importorskip("coremltools.converters.mil").Builder
ct = pytest.importorskip("coremltools")
cto = pytest.importorskip("coremltools.optimize.coreml")

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((64, 96)).astype(np.float32)
X = RNG.standard_normal((3, 96)).astype(np.float32)
IOS17, IOS18 = ct.target.iOS17, ct.target.iOS18


def model(build: Callable[[Any], Any], target: Any = IOS17, precision: Any = ct.precision.FLOAT32) -> Any:
    program = mb.program(input_specs=[mb.TensorSpec(shape=X.shape)], opset_version=target)(build)
    return ct.convert(program, convert_to="mlprogram", minimum_deployment_target=target, skip_model_load=True,
                      compute_precision=precision)


def linear(x: Any) -> Any:
    return mb.linear(x=x, weight=WEIGHT, name="y")


def evaluate(mlmodel: Any, path: Path) -> tuple[Evaluator, np.ndarray[Any, Any]]:
    mlmodel.save(str(path))
    evaluator = Evaluator(path)
    return evaluator, evaluator.run({"x": X})["y"]


def compress(mlmodel: Any, how: str, config: Any) -> Any:
    return getattr(cto, how)(mlmodel, cto.OptimizationConfig(global_config=config))


COMPRESSIONS = [
    ("affine_dequantize", IOS17, "linear_quantize_weights",
     lambda: cto.OpLinearQuantizerConfig(mode="linear", weight_threshold=0)),
    ("affine_dequantize", IOS17, "linear_quantize_weights",
     lambda: cto.OpLinearQuantizerConfig(mode="linear_symmetric", granularity="per_tensor", weight_threshold=0)),
    *[("lut_to_dense", IOS17, "palettize_weights",
       lambda bits=bits: cto.OpPalettizerConfig(mode="uniform", nbits=bits, weight_threshold=0))
      for bits in (1, 2, 4, 6, 8)],
    ("sparse_to_dense", IOS17, "prune_weights",
     lambda: cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=0)),
    ("blockwise_shift_scale", IOS18, "linear_quantize_weights",
     lambda: cto.OpLinearQuantizerConfig(mode="linear", dtype="int4", granularity="per_block", block_size=32,
                                         weight_threshold=0)),
    ("blockwise_shift_scale", IOS18, "linear_quantize_weights",
     lambda: cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="uint4", weight_threshold=0)),
    *[("lut_to_dense", IOS18, "palettize_weights",
       lambda bits=bits: cto.OpPalettizerConfig(mode="uniform", nbits=bits, granularity="per_grouped_channel",
                                                group_size=16, weight_threshold=0)) for bits in (3, 4)],
    ("sparse_to_dense", IOS18, "prune_weights",
     lambda: cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=0)),
]


@pytest.mark.parametrize(("operator", "target", "how", "config"), COMPRESSIONS,
                         ids=[f"{i}-{c[0]}" for i, c in enumerate(COMPRESSIONS)])
def test_compressed_weights(operator: str, target: Any, how: str, config: Callable[[], Any], tmp_path: Path) -> None:
    """Our decoding of the stored file equals coremltools' own decompression of the model."""
    packed = compress(model(linear, target), how, config())
    evaluator, ours = evaluate(packed, tmp_path / "packed.mlpackage")
    assert {o.type for o in evaluator.function.operations} >= {f"constexpr_{operator}"}
    plain, expected = evaluate(cto.decompress_weights(packed), tmp_path / "plain.mlpackage")
    assert not any(o.type.startswith("constexpr_") for o in plain.function.operations)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(ours - X @ WEIGHT.T).max() > 1e-4, "nothing was compressed"


def test_constexpr_cast(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        return mb.linear(x=x, weight=mb.constexpr_cast(source_val=WEIGHT.astype(np.float16), output_dtype="fp32"),
                         name="y")

    evaluator, ours = evaluate(model(build), tmp_path / "m.mlpackage")
    assert "constexpr_cast" in {o.type for o in evaluator.function.operations}
    np.testing.assert_allclose(ours, X @ WEIGHT.astype(np.float16).astype(np.float32).T, rtol=1e-5, atol=1e-5)


def lookup(**values: Any) -> np.ndarray[Any, Any]:
    out = constants.TABLE["constexpr_lut_to_dense"](Arguments("lut", {
        k: [torch.as_tensor(v)] for k, v in values.items()}, promote=True))
    assert isinstance(out, torch.Tensor)
    return out.numpy()


def test_lookup_tables_of_the_documentation() -> None:
    """The worked examples of coremltools' ``constexpr_lut_to_dense``: two groups, and vectors along an axis."""
    indices = np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3]).reshape(6, 2)
    lut = np.array([1., 5, 9, 13, 2, 10, 18, 26]).reshape(2, 1, 4, 1)
    assert lookup(indices=indices, lut=lut).tolist() == [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]]
    vectors = np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]])
    table = np.array([1., 2, 3, 7, 8, 9]).reshape(1, 1, 1, 2, 3)
    a, b = [1, 2, 3], [7, 8, 9]
    rows = lookup(indices=vectors, lut=table, vector_axis=np.int32(1))
    assert rows[0].tolist() == [[1, 1], [2, 2], [3, 3], [7, 1], [8, 2], [9, 3]]
    assert lookup(indices=vectors, lut=table, vector_axis=np.int32(2))[0].tolist() == [a + a, b + a]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_packed_bits(bits: int) -> None:
    """Least significant bit first, across byte borders: the numbers written in base two, read back from the end."""
    values = [int(v) for v in RNG.integers(0, 2 ** bits, 37)]
    number = sum(v << (i * bits) for i, v in enumerate(values))
    raw = np.frombuffer(number.to_bytes(-(-37 * bits // 8), "little"), np.uint8)
    assert unpack(raw, bits, 37).tolist() == values
    with pytest.raises(BundleError, match="packed constant"):
        unpack(raw, bits, 37 + 8)


def test_packed_signed_bits() -> None:
    assert unpack(np.array([0x8F, 0x70], np.uint8), 4, 4, signed=True).tolist() == [-1, -8, 0, 7]


def test_fp16_is_rounded_after_each_operator(tmp_path: Path) -> None:
    """x * 400 * 400 / 400 overflows in fp16 and not in fp32; small steps are lost next to large values."""
    def build(x: Any) -> Any:
        big = mb.mul(x=mb.mul(x=x, y=np.float32(400)), y=np.float32(400), name="big")
        return mb.add(x=mb.exp(x=mb.mul(x=x, y=np.float32(-1e3))), y=mb.real_div(x=big, y=np.float32(400)), name="y")

    def run(precision: Any) -> np.ndarray[Any, Any]:
        program = mb.program(input_specs=[mb.TensorSpec(shape=X.shape)], opset_version=IOS17)(build)
        converted = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=IOS17, skip_model_load=True,
                               compute_precision=precision, pass_pipeline=ct.PassPipeline.EMPTY
                               if precision == ct.precision.FLOAT32 else None)
        converted.save(str(tmp_path / f"{precision}.mlpackage"))
        x = np.full(X.shape, 1.5, np.float32)
        x[0] = 1 / 3
        return Evaluator(tmp_path / f"{precision}.mlpackage").run({"x": x})["y"]

    np.testing.assert_allclose(run(ct.precision.FLOAT32)[[0, 1], 0], [400 / 3, 600], rtol=1e-6)
    half = run(ct.precision.FLOAT16)
    assert np.isinf(half[1]).all()
    assert half.dtype == np.float32
    assert 0.01 < abs(float(half[0, 0]) - 400 / 3) < 0.2


def test_unknown_operator_is_named(tmp_path: Path) -> None:
    mlmodel = model(lambda x: mb.cumsum(x=x, axis=1, name="y"))
    mlmodel.save(str(tmp_path / "m.mlpackage"))
    with pytest.raises(UnknownOperator, match="'cumsum'") as error:
        Evaluator(tmp_path / "m.mlpackage")
    assert error.value.operator == "cumsum"


def test_unknown_variant_is_named(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        return mb.concat(values=[x, x], axis=1, interleave=True, name="y")

    model(build).save(str(tmp_path / "m.mlpackage"))
    with pytest.raises(UnknownOperator, match="'concat' with interleave"):
        Evaluator(tmp_path / "m.mlpackage").run({"x": X})


def test_wrong_input(tmp_path: Path) -> None:
    evaluator, _ = evaluate(model(linear), tmp_path / "m.mlpackage")
    with pytest.raises(BundleError, match=r"expects x of shape \(3, 96\), got \(1, 96\)"):
        evaluator.run({"x": X[:1]})
    with pytest.raises(BundleError, match="functions main, not decode_4"):
        Evaluator(tmp_path / "m.mlpackage", "decode_4")


def test_damaged_packages(tmp_path: Path) -> None:
    good = tmp_path / "good.mlpackage"
    model(linear).save(str(good))
    with pytest.raises(BundleError, match="not a Core ML package"):
        load_package(tmp_path)

    def copy(name: str) -> tuple[Path, Path]:
        path = tmp_path / f"{name}.mlpackage"
        shutil.copytree(good, path)
        return path, path / "Data/com.apple.CoreML"

    path, inner = copy("cut")
    weights = inner / "weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:4096])
    with pytest.raises(BundleError, match="damaged record"):
        load_package(path)
    path, inner = copy("noise")
    (inner / "model.mlmodel").write_bytes(b"\xff" * 100)
    with pytest.raises(BundleError, match="no readable Core ML model"):
        load_package(path)
    path, _ = copy("outside")
    text = (path / "Manifest.json").read_text()
    (path / "Manifest.json").write_text(text.replace("com.apple.CoreML/model.mlmodel", "../../secret"))
    (tmp_path / "secret").write_bytes(b"")
    with pytest.raises(BundleError, match="not inside it"):
        load_package(path)
