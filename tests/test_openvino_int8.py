"""Ranges in quantized OpenVINO graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
import torch.nn.functional as F
from openvino import opset13 as opset
from torch import Tensor, nn

from pocketsam import registry
from pocketsam.export import rewrites
from pocketsam.export.graphs import EncoderGraph
from pocketsam.models.catalog import spec
from pocketsam.quantize.correction import Layer, prepare
from pocketsam.quantize.grid import channels_first, column, nearest, steps
from pocketsam.quantize.openvino import PASSED, WEIGHTED, OpenVinoQuantizer, _behind, _flatten, _requantize
from pocketsam.quantize.openvino_attention import LOGITS, quantizers
from pocketsam.quantize.recipes import Job

LEVELS = 256


def test_tokens_share_one_range() -> None:
    """A range for each token, as the tool gives before depthwise convolutions, clips what later photos show there."""
    x = opset.parameter([1, 4, 8], np.float32, name="x")
    lows = np.zeros((1, 4, 1), np.float32)
    highs = np.array([1, 2, 3, 4], np.float32).reshape(1, 4, 1)
    rounded = opset.fake_quantize(x, lows, highs, lows, highs, LEVELS)
    model = ov.Model([opset.reshape(rounded, np.array([1, 32]), special_zero=False)], [x])
    _flatten(rounded)
    values = np.random.default_rng(0).uniform(0, 4, (1, 4, 8)).astype(np.float32)
    answer = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([values])[0]
    step = 4 / (LEVELS - 1)
    assert np.abs(answer.reshape(1, 4, 8) - values).max() <= step / 2 * 1.001
    assert all(rounded.input_value(i).get_node().data.size == 1 for i in range(1, 5))


@pytest.mark.parametrize("passes", [0, 2])
def test_reshapes_are_looked_through(passes: int) -> None:
    node = source = opset.parameter([1, 4, 8], np.float32)
    for i in range(passes):
        node = opset.reshape(node, np.array([1, 32] if i else [4, 8]), special_zero=False)
    assert _behind(node).get_friendly_name() == source.get_friendly_name()


@pytest.mark.parametrize("channels", [8, 4], ids=["two of a group", "depthwise"])
def test_grouped_convolutions_keep_their_channels(channels: int) -> None:
    """Their weights are (groups, out, in, h, w): EfficientViT-SAM's encoder has groups of several channels."""
    module = nn.Conv2d(4, channels, 3, groups=4, bias=False)
    module.weight.data *= torch.arange(1, channels + 1).reshape(-1, 1, 1, 1)
    layer = Layer(module)
    layer.scales = steps(module.weight.data, "full")
    rounded = nearest(module.weight.data, layer.scales) * column(layer.scales, 4)
    x = opset.parameter([1, 4, 5, 5], np.float32)
    codes = opset.convert(opset.constant(np.zeros((4, channels // 4, 1, 3, 3), np.int8)), "f32")
    product = opset.multiply(codes, opset.constant(np.ones((4, 1, 1, 1, 1), np.float32)))
    operator = opset.group_convolution(x, product, [1, 1], [0, 0], [0, 0], [1, 1])
    _requantize(operator, rounded.detach().numpy(), layer)
    values = np.random.default_rng(0).standard_normal((1, 4, 5, 5)).astype(np.float32)
    answer = ov.Core().compile_model(ov.Model([operator], [x]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([values])[0]
    want = nn.functional.conv2d(torch.from_numpy(values), rounded, groups=4).detach().numpy()
    assert np.abs(answer - want).max() <= 1e-5


def test_transposed_convolutions_keep_their_channels() -> None:
    """Their weights are (in, out, h, w): SAM-HQ's encoder has them."""
    module = nn.ConvTranspose2d(6, 4, 2, 2, bias=False)
    weight = channels_first(module)
    layer = Layer(module)
    layer.scales = steps(weight, "full")
    rounded = (nearest(weight, layer.scales) * column(layer.scales, 4)).transpose(0, 1)
    x = opset.parameter([1, 6, 3, 3], np.float32)
    codes = opset.convert(opset.constant(np.zeros((6, 4, 2, 2), np.int8)), "f32")
    product = opset.multiply(codes, opset.constant(np.ones((1, 4, 1, 1), np.float32)))
    operator = opset.convolution_backprop_data(x, product, [2, 2])
    _requantize(operator, rounded.numpy(), layer)
    values = np.random.default_rng(0).standard_normal((1, 6, 3, 3)).astype(np.float32)
    answer = ov.Core().compile_model(ov.Model([operator], [x]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([values])[0]
    want = nn.functional.conv_transpose2d(torch.from_numpy(values), rounded, stride=2).numpy()
    assert np.abs(answer - want).max() <= 1e-5


class Windows(nn.Module):
    """A padded map of tokens with positions, a residual stream, attention and norms, as SAM and SAM 2 have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.neck = nn.Conv2d(3, 16, 8, 8), nn.Conv2d(16, 8, 1)
        self.norm, self.last = nn.LayerNorm(16), nn.LayerNorm(16)
        self.positions = nn.Parameter(torch.randn(1, 4, 4, 16))
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        b = len(image)
        x = self.stem(image.permute(0, 3, 1, 2).float() / 64 - 2).permute(0, 2, 3, 1) + self.positions
        tokens = self.norm(F.pad(x, (0, 0, 0, 1, 0, 1))).reshape(b, 25, 16)
        q, k, v = (part(tokens).reshape(b, 25, 2, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 5, 5, 16)
        x = x + self.proj(mixed)[:, :4, :4]
        return (self.neck(self.last(x).permute(0, 3, 1, 2)),)


def quantizer(module: nn.Module, image: tuple[int, ...], output: tuple[int, ...], folder: Path,
              recipe: str = "int8") -> OpenVinoQuantizer:
    """Of an encoder with the contract's names, calibrated on noise."""
    graph = spec("lite0").encoder_graph()
    contract = replace(graph, inputs=(replace(graph.inputs[0], shape=image),),
                       outputs=(replace(graph.outputs[0], shape=output),))
    rng = np.random.default_rng(0)
    images: list[Any] = [rng.integers(0, 256, image, dtype=np.uint8) for _ in range(2)]
    found = prepare(module.eval(), images, "full", activations=recipe == "int8")
    found = found.written("reshape", rounds_outputs=False)
    registry.load("format", "openvino").export(found.module, contract, "fp32", folder / "float.ir")
    return OpenVinoQuantizer(Job(contract, folder / "float.ir", found.module, recipe,
                                 lambda _: ({"image": i} for i in images), 2, found))


def test_only_weighted_layers_read_rounded_activations(tmp_path: Path) -> None:
    """Rounding a residual stream before a norm or padding, or queries and keys, costs masks and gains no time."""
    quantizer(Windows(), (1, 32, 32, 3), (1, 8, 4, 4), tmp_path).write(tmp_path / "int8.ir")
    model = ov.Core().read_model(tmp_path / "int8.ir" / "model.xml")
    rounded = [o for o in model.get_ordered_ops() if o.get_type_name() == "FakeQuantize"]
    assert len(rounded) >= 3
    assert {r.get_type_name() for o in rounded for r in _reads(o)} <= set(WEIGHTED)


def test_weights_alone_keep_the_grid_of_the_preparation(tmp_path: Path) -> None:
    """NNCF rounds to a grid of its own, with 128 steps to the largest weight; twice rounded is worse than once."""
    tool = quantizer(Windows(), (1, 32, 32, 3), (1, 8, 4, 4), tmp_path, "int8-weights")
    assert tool.job.prepared is not None
    tool.write(tmp_path / "int8.ir", frozenset(tool.job.prepared.in_float(tool.layers())))
    image = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    answers = []
    for name in ("float.ir", "int8.ir"):
        model = ov.Core().read_model(tmp_path / name / "model.xml")
        answers.append(ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([image])[0])
    constants = [o for o in model.get_ordered_ops() if o.get_type_name() == "Constant"]
    assert sum(o.get_element_type() == ov.Type.i8 for o in constants) >= 5, "they are stored in 8 bits"
    # The float file holds the prepared weights, which are on the grid already.
    assert np.abs(answers[0] - answers[1]).max() <= 1e-4 * np.abs(answers[0]).max()


def _reads(node: Any) -> list[Any]:
    readers = [t.get_node() for t in node.output(0).get_target_inputs()]
    return [r for n in readers for r in (_reads(n) if n.get_type_name() in PASSED else [n])]


def test_tables_of_relative_positions_are_not_rounded(toy_registered: None, tmp_path: Path) -> None:
    """SAM's ViT multiplies queries with them; the simulation rounds layers only."""
    torch.manual_seed(0)
    model = registry.load("model", "toy_sam")().requires_grad_(False)
    rewrites.prepare(model)
    tool = quantizer(EncoderGraph(model), (1, 128, 128, 3), (1, 32, 8, 8), tmp_path)
    layers = tool.layers()
    known = [name for name, weights in layers.items() if tool.job.layer_of(weights) is not None]
    assert 8 <= len(known) < len(layers) - 1
    tool.write(tmp_path / "int8.ir")
    quantized = ov.Core().read_model(tmp_path / "int8.ir" / "model.xml")
    # The table of positions is added, and stored in 8 bits.
    codes = [o for o in quantized.get_ordered_ops() if o.get_type_name() == "Constant"
             and o.get_element_type() == ov.Type.i8 and o.get_output_shape(0)[0] > 1]
    assert len(codes) == len(known)


class Everywhere(nn.Module):
    """Attention among all 1024 tokens, its queries in two parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.neck = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 8, 1)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        b = len(image)
        x = self.stem(image.permute(0, 3, 1, 2).float() / 64 - 2)
        q, k, v = self.qkv(x.flatten(2).mT).reshape(b, 1024, 3, 2, 8).permute(2, 0, 3, 1, 4)
        parts = [(part @ k.mT).softmax(-1) @ v for part in (q * 0.35).chunk(2, 2)]
        mixed = self.proj(torch.cat(parts, 2).transpose(1, 2).reshape(b, 1024, 16)).mT.reshape(b, 16, 32, 32)
        return (self.neck(x + mixed),)


def test_logits_of_global_attention_in_8_bits(tmp_path: Path) -> None:
    """Both sides signed, for OpenVINO would compute the product in float otherwise; kept names stay in float."""
    tool = quantizer(Everywhere(), (1, 128, 128, 3), (1, 8, 32, 32), tmp_path)
    names = tool.attention()
    assert len(names) == 2
    answers = []
    for keep in (frozenset(names), frozenset[str]()):
        tool.write(tmp_path / "int8.ir", keep)
        model = ov.Core().read_model(tmp_path / "int8.ir" / "model.xml")
        found = {o.get_friendly_name(): list(quantizers(o)) for o in model.get_ordered_ops()
                 if o.get_friendly_name() in {*names, *(n + LOGITS for n in names)}}
        # The product with the values stays in float.
        assert {n: len(f) for n, f in found.items()} == (
            dict.fromkeys(names, 0) if keep else {n: 2 * n.endswith(LOGITS) for n in found})
        assert len(found) == (2 if keep else 4)
        for node in [q for f in found.values() for q in f]:
            low, high = (float(node.input_value(i).get_node().data.item()) for i in (1, 2))
            assert low / high == pytest.approx(-128 / 127)
            assert high > 0
        x = np.random.default_rng(9).integers(0, 256, (1, 128, 128, 3), dtype=np.uint8)
        answers.append(ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])[0])
    plain, rounded = answers
    assert 0 < np.abs(rounded - plain).max() <= 0.05 * np.abs(plain).max()
