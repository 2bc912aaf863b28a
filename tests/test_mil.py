"""The MIL evaluator: every operator of its table against torch, through programs that coremltools wrote."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.runtimes.mil.errors import UnknownOperator
from pocketsam.runtimes.mil.evaluate import OPERATORS, Evaluator

logging.getLogger("coremltools").setLevel(logging.ERROR)
mb = pytest.importorskip("coremltools.converters.mil").Builder
ct = pytest.importorskip("coremltools")

RNG = np.random.default_rng(0)
SHAPE = (2, 4, 6, 8)
W = RNG.standard_normal((4, 2, 3, 3)).astype(np.float32)
WT = RNG.standard_normal((4, 3, 2, 2)).astype(np.float32)
M = RNG.standard_normal((5, 8)).astype(np.float32)
B = RNG.standard_normal(5).astype(np.float32)
G = RNG.standard_normal(4).astype(np.float32)
G8 = RNG.standard_normal(8).astype(np.float32)
V = np.abs(RNG.standard_normal(4)).astype(np.float32)
INDEX = np.array([[3, 0], [1, -1]], np.int32)
ALONG = RNG.integers(0, 4, SHAPE).astype(np.int32)


def t(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array))


def positive(x: Any) -> Any:
    """|x| + 0.5 in the program; ``pos`` is the same in torch."""
    return mb.add(x=mb.abs(x=x), y=np.float32(0.5))


def pos(x: Tensor) -> Tensor:
    return x.abs() + 0.5


def codes(x: Any) -> Any:
    """int8, one scale for each channel, no zero point."""
    return mb.quantize(input=x, scale=V, axis=1, output_dtype="int8")


def depth_to_space(x: Tensor) -> Tensor:
    """The definition: block offsets vary slower than the channel."""
    out = torch.empty(2, 1, 12, 16)
    for i in range(2):
        for j in range(2):
            out[:, 0, i::2, j::2] = x[:, i * 2 + j]
    return out


def same_conv(x: Tensor) -> Tensor:
    # 6 rows in steps of 4: (2 - 1) * 4 + 3 - 6 = 1 too few, so one row below; 8 columns need none.
    return F.conv2d(F.pad(x, (0, 0, 0, 1)), t(W), None, 4, 0, 1, 2)


Case = tuple[str, Callable[[Any, Any], Any], Callable[[Tensor, Tensor], Any]]
SIMPLE: list[Case] = [
    (name, (lambda x, y, n=name: getattr(mb, n)(x=x)), (lambda x, y, f=f: f(x))) for name, f in {
        "abs": torch.abs, "ceil": torch.ceil, "cos": torch.cos, "erf": torch.erf, "exp": torch.exp,
        "exp2": lambda x: 2 ** x, "floor": torch.floor, "identity": torch.clone, "relu": lambda x: x * (x > 0),
        "relu6": lambda x: x.clamp(0, 6), "round": torch.round, "sigmoid": lambda x: 1 / (1 + (-x).exp()),
        "sign": torch.sign, "silu": lambda x: x / (1 + (-x).exp()), "sin": torch.sin,
        "softplus": lambda x: (1 + x.exp()).log(), "softsign": lambda x: x / (1 + x.abs()),
        "square": lambda x: x * x, "tanh": torch.tanh, "shape": lambda x: torch.tensor(x.shape),
    }.items()]
PAIRS: list[Case] = [
    (name, (lambda x, y, n=name: getattr(mb, n)(x=x, y=y)), f) for name, f in {
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
        "real_div": lambda x, y: x / y, "floor_div": lambda x, y: (x / y).floor(),
        "mod": lambda x, y: x - y * (x / y).floor(), "maximum": lambda x, y: torch.where(x > y, x, y),
        "minimum": lambda x, y: torch.where(x < y, x, y), "equal": lambda x, y: x == y,
        "not_equal": lambda x, y: x != y, "greater": lambda x, y: x > y, "greater_equal": lambda x, y: x >= y,
        "less": lambda x, y: x < y, "less_equal": lambda x, y: x <= y,
    }.items()]
OTHERS: list[Case] = [
    ("cast", lambda x, y: mb.cast(x=x, dtype="int32"), lambda x, y: x.trunc()),
    ("cast", lambda x, y: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), lambda x, y: x.half().float()),
    ("clip", lambda x, y: mb.clip(x=x, alpha=-0.5, beta=1.0), lambda x, y: x.clamp(-0.5, 1)),
    ("elu", lambda x, y: mb.elu(x=x, alpha=0.7), lambda x, y: torch.where(x > 0, x, 0.7 * (x.exp() - 1))),
    ("gelu", lambda x, y: mb.gelu(x=x), lambda x, y: x * 0.5 * (1 + torch.erf(x / 2 ** 0.5))),
    ("gelu", lambda x, y: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x, y: F.gelu(x, approximate="tanh")),
    ("gelu", lambda x, y: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda x, y: x * (1.702 * x).sigmoid()),
    ("inverse", lambda x, y: mb.inverse(x=positive(x), epsilon=0.1), lambda x, y: 1 / (pos(x) + 0.1)),
    ("log", lambda x, y: mb.log(x=positive(x)), lambda x, y: pos(x).log()),
    ("rsqrt", lambda x, y: mb.rsqrt(x=positive(x)), lambda x, y: pos(x) ** -0.5),
    ("sqrt", lambda x, y: mb.sqrt(x=positive(x)), lambda x, y: pos(x) ** 0.5),
    ("leaky_relu", lambda x, y: mb.leaky_relu(x=x, alpha=0.2), lambda x, y: torch.where(x > 0, x, 0.2 * x)),
    ("prelu", lambda x, y: mb.prelu(x=x, alpha=G), lambda x, y: torch.where(x > 0, x, x * t(G)[:, None, None])),
    ("sigmoid_hard", lambda x, y: mb.sigmoid_hard(x=x, alpha=0.3, beta=0.4), lambda x, y: (0.3 * x + 0.4).clamp(0, 1)),
    ("pow", lambda x, y: mb.pow(x=positive(x), y=y), lambda x, y: pos(x) ** y),
    ("logical_and", lambda x, y: mb.logical_and(x=mb.greater(x=x, y=np.float32(0)), y=mb.greater(x=y, y=np.float32(0))),
     lambda x, y: (x > 0) & (y > 0)),
    ("logical_or", lambda x, y: mb.logical_or(x=mb.greater(x=x, y=np.float32(0)), y=mb.greater(x=y, y=np.float32(0))),
     lambda x, y: (x > 0) | (y > 0)),
    ("logical_not", lambda x, y: mb.logical_not(x=mb.greater(x=x, y=np.float32(0))), lambda x, y: x <= 0),
    ("select", lambda x, y: mb.select(cond=mb.greater(x=x, y=np.float32(0)), a=x, b=y),
     lambda x, y: torch.where(x > 0, x, y)),
    ("reshape", lambda x, y: mb.reshape(x=x, shape=[0, -1, 12]), lambda x, y: x.reshape(4, 8, 12)),
    ("transpose", lambda x, y: mb.transpose(x=x, perm=[0, 2, 3, 1]), lambda x, y: x.permute(0, 2, 3, 1)),
    ("expand_dims", lambda x, y: mb.expand_dims(x=mb.reduce_sum(x=x, axes=[0]), axes=[0, -1]),
     lambda x, y: x.sum(0)[None, ..., None]),
    ("squeeze", lambda x, y: mb.squeeze(x=mb.reduce_max(x=x, axes=[1, 3], keep_dims=True), axes=[1, 3]),
     lambda x, y: x.amax((1, 3))),
    ("slice_by_index", lambda x, y: mb.slice_by_index(
        x=x, begin=[1, 0, 5, -6], end=[2, 3, 0, -1], stride=[1, 2, -2, 2], begin_mask=[False] * 4,
        end_mask=[False, False, True, False], squeeze_mask=[True, False, False, False]),
     lambda x, y: x[1, 0:3:2].flip(1)[:, ::2, 2:7:2]),
    ("slice_by_size", lambda x, y: mb.slice_by_size(x=x, begin=[0, 1, 2, 3], size=[-1, 2, 3, -1]),
     lambda x, y: x[:, 1:3, 2:5, 3:]),
    ("split", lambda x, y: mb.split(x=x, split_sizes=[1, 3], axis=1)[1], lambda x, y: x[:, 1:]),
    ("split", lambda x, y: mb.split(x=x, num_splits=2, axis=-1)[0], lambda x, y: x[..., :4]),
    ("concat", lambda x, y: mb.concat(values=[x, y, x], axis=2), lambda x, y: torch.cat([x, y, x], 2)),
    ("stack", lambda x, y: mb.stack(values=[x, y], axis=1), lambda x, y: torch.stack([x, y], 1)),
    ("pad", lambda x, y: mb.pad(x=x, pad=[0, 0, 1, 2, 3, 0], constant_val=np.float32(7)),
     lambda x, y: F.pad(x, (3, 0, 1, 2), value=7)),
    ("pad", lambda x, y: mb.pad(x=x, pad=[1, 2, 3, 0], mode="reflect"), lambda x, y: F.pad(x, (3, 0, 1, 2), "reflect")),
    ("tile", lambda x, y: mb.tile(x=x, reps=[1, 2, 1, 3]), lambda x, y: torch.cat([torch.cat([x, x], 1)] * 3, 3)),
    ("fill", lambda x, y: mb.fill(shape=mb.shape(x=x), value=np.float32(3)), lambda x, y: torch.full_like(x, 3)),
    ("reverse", lambda x, y: mb.reverse(x=x, axes=[1, 3]), lambda x, y: x.flip((1, 3))),
    ("range_1d", lambda x, y: mb.range_1d(start=np.int32(2), end=mb.reduce_max(x=mb.shape(x=x)), step=np.int32(3)),
     lambda x, y: torch.tensor([2, 5])),
    ("gather", lambda x, y: mb.gather(x=x, indices=INDEX, axis=1), lambda x, y: x[:, t(INDEX).long()]),
    ("gather_along_axis", lambda x, y: mb.gather_along_axis(x=x, indices=ALONG, axis=1),
     lambda x, y: torch.gather(x, 1, t(ALONG).long())),
    ("pixel_shuffle", lambda x, y: mb.pixel_shuffle(x=x, upscale_factor=2), lambda x, y: F.pixel_shuffle(x, 2)),
    ("pixel_unshuffle", lambda x, y: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
     lambda x, y: F.pixel_unshuffle(x, 2)),
    ("depth_to_space", lambda x, y: mb.depth_to_space(x=x, block_size=2), lambda x, y: depth_to_space(x)),
    ("space_to_depth", lambda x, y: mb.space_to_depth(x=mb.depth_to_space(x=x, block_size=2), block_size=2),
     lambda x, y: x),
    ("linear", lambda x, y: mb.linear(x=x, weight=M, bias=B), lambda x, y: x @ t(M).T + t(B)),
    ("matmul", lambda x, y: mb.matmul(x=x, y=y, transpose_y=True), lambda x, y: torch.einsum("abik,abjk->abij", x, y)),
    ("matmul", lambda x, y: mb.matmul(x=x, y=y, transpose_x=True), lambda x, y: torch.einsum("abki,abkj->abij", x, y)),
    ("conv", lambda x, y: mb.conv(x=x, weight=W, bias=G, strides=[2, 1], pad_type="custom", pad=[1, 0, 2, 1],
                                  dilations=[1, 2], groups=2),
     lambda x, y: F.conv2d(F.pad(x, (2, 1, 1, 0)), t(W), t(G), (2, 1), 0, (1, 2), 2)),
    ("conv", lambda x, y: mb.conv(x=x, weight=W, strides=[4, 4], pad_type="same", groups=2), lambda x, y: same_conv(x)),
    ("conv_transpose", lambda x, y: mb.conv_transpose(x=x, weight=WT, strides=[2, 2]),
     lambda x, y: F.conv_transpose2d(x, t(WT), None, 2)),
    ("conv_transpose", lambda x, y: mb.conv_transpose(x=x, weight=WT, strides=[2, 2], pad_type="custom",
                                                      pad=[1, 1, 0, 0]),
     lambda x, y: F.conv_transpose2d(x, t(WT), None, 2, (1, 0))),
    ("conv_transpose", lambda x, y: mb.conv_transpose(x=x, weight=WT, strides=[2, 2], output_shape=[2, 3, 12, 16]),
     lambda x, y: F.conv_transpose2d(x, t(WT), None, 2)),
    ("avg_pool", lambda x, y: mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom",
                                          pad=[1, 1, 1, 1], exclude_padding_from_average=True),
     lambda x, y: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    ("max_pool", lambda x, y: mb.max_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom",
                                          pad=[1, 1, 1, 1]), lambda x, y: F.max_pool2d(x, 3, 2, 1)),
    ("upsample_nearest_neighbor", lambda x, y: mb.upsample_nearest_neighbor(
        x=x, scale_factor_height=2, scale_factor_width=3), lambda x, y: F.interpolate(x, (12, 24))),
    ("upsample_bilinear", lambda x, y: mb.upsample_bilinear(
        x=x, scale_factor_height=2, scale_factor_width=2, align_corners=False),
     lambda x, y: F.interpolate(x, scale_factor=2, mode="bilinear")),
    ("resize_bilinear", lambda x, y: mb.resize_bilinear(x=x, target_size_height=9, target_size_width=5,
                                                        sampling_mode="STRICT_ALIGN_CORNERS"),
     lambda x, y: F.interpolate(x, (9, 5), mode="bilinear", align_corners=True)),
    ("reduce_sum", lambda x, y: mb.reduce_sum(x=x, axes=[1, -1], keep_dims=True),
     lambda x, y: x.sum((1, 3), keepdim=True)),
    ("reduce_mean", lambda x, y: mb.reduce_mean(x=x, axes=[2]), lambda x, y: x.mean(2)),
    ("reduce_max", lambda x, y: mb.reduce_max(x=x, axes=[0, 1]), lambda x, y: x.amax((0, 1))),
    ("reduce_min", lambda x, y: mb.reduce_min(x=x, axes=[3]), lambda x, y: x.amin(3)),
    ("reduce_l2_norm", lambda x, y: mb.reduce_l2_norm(x=x, axes=[1]), lambda x, y: (x * x).sum(1) ** 0.5),
    ("reduce_argmax", lambda x, y: mb.reduce_argmax(x=x, axis=1), lambda x, y: x.argmax(1)),
    ("reduce_argmin", lambda x, y: mb.reduce_argmin(x=x, axis=2, keep_dims=True),
     lambda x, y: x.argmin(2, keepdim=True)),
    ("softmax", lambda x, y: mb.softmax(x=x, axis=1), lambda x, y: x.exp() / x.exp().sum(1, keepdim=True)),
    ("layer_norm", lambda x, y: mb.layer_norm(x=x, axes=[-1], gamma=G8, beta=G8, epsilon=1e-3),
     lambda x, y: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3) ** 0.5 * t(G8)
     + t(G8)),
    ("layer_norm", lambda x, y: mb.layer_norm(x=x, axes=[1], gamma=G, beta=V, epsilon=1e-3),
     lambda x, y: F.layer_norm(x.permute(0, 2, 3, 1), (4,), t(G), t(V), 1e-3).permute(0, 3, 1, 2)),
    ("batch_norm", lambda x, y: mb.batch_norm(x=x, mean=G, variance=V, gamma=V, beta=G),
     lambda x, y: F.batch_norm(x, t(G), t(V), t(V), t(G))),
    ("instance_norm", lambda x, y: mb.instance_norm(x=x, gamma=V, beta=G), lambda x, y: F.instance_norm(
        x, weight=t(V), bias=t(G))),
    ("scaled_dot_product_attention", lambda x, y: mb.scaled_dot_product_attention(query=x, key=y, value=y),
     lambda x, y: (x @ y.mT / 8 ** 0.5).softmax(-1) @ y),
    ("quantize", lambda x, y: mb.quantize(input=x, scale=np.float32(0.02), zero_point=np.uint8(100),
                                          output_dtype="uint8"),
     lambda x, y: ((x / 0.02).round() + 100).clamp(0, 255)),
    ("dequantize", lambda x, y: mb.dequantize(input=codes(x), scale=V, axis=1),
     lambda x, y: (x / t(V)[:, None, None]).round().clamp(-128, 127) * t(V)[:, None, None]),
]
CASES = [*SIMPLE, *PAIRS, *OTHERS]


def save(build: Callable[..., Any], path: Path, shapes: int = 2, target: Any = None) -> Path:
    """A program without any optimisation, so that each operator arrives as written."""
    target = target or ct.target.iOS18
    specs = [mb.TensorSpec(shape=SHAPE) for _ in range(shapes)]
    program = mb.program(input_specs=specs, opset_version=target)(build)
    ct.convert(program, convert_to="mlprogram", minimum_deployment_target=target, skip_model_load=True,
               compute_precision=ct.precision.FLOAT32, pass_pipeline=ct.PassPipeline.EMPTY).save(str(path))
    return path


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluator, dict[str, Any], Tensor, Tensor]:
    """All cases in one program, evaluated once."""
    def build(x: Any, y: Any) -> Any:
        outputs = []
        for i, (_, make, _) in enumerate(CASES):
            out = make(x, y)
            # Core ML outputs are numbers: truth values and integers leave as float.
            outputs.append(mb.identity(x=mb.cast(x=out, dtype="fp32"), name=f"case_{i}"))
        return tuple(outputs)

    evaluator = Evaluator(save(build, tmp_path_factory.mktemp("ops") / "ops.mlpackage"))
    x, y = (t(RNG.standard_normal(SHAPE).astype(np.float32) * 2) for _ in range(2))
    y[0] = x[0]
    return evaluator, evaluator.run({"x": x.numpy(), "y": y.numpy()}), x, y


@pytest.mark.parametrize("i", range(len(CASES)), ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_operator(computed: tuple[Evaluator, dict[str, Any], Tensor, Tensor], i: int) -> None:
    evaluator, got, x, y = computed
    operator, _, reference = CASES[i]
    assert operator in {o.type for o in evaluator.function.operations}
    expected = torch.as_tensor(reference(x, y)).float().numpy()
    assert got[f"case_{i}"].shape == expected.shape
    np.testing.assert_allclose(got[f"case_{i}"], expected, rtol=2e-5, atol=2e-5)


def test_every_operator_has_a_case() -> None:
    assert {c[0] for c in CASES} == set(OPERATORS)


def test_another_output_shape_is_refused(tmp_path: Path) -> None:
    """A row and a column more than the transposed convolution makes: where they come from is not documented."""
    package = save(lambda x: mb.conv_transpose(x=x, weight=WT, strides=[2, 2], output_shape=[2, 3, 13, 17]),
                   tmp_path / "more.mlpackage", shapes=1)
    with pytest.raises(UnknownOperator, match="output_shape"):
        Evaluator(package).run({"x": np.zeros(SHAPE, np.float32)})
