"""Ranges in quantized OpenVINO graphs."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as opset
from torch import nn

from pocketsam.quantize.correction import Layer
from pocketsam.quantize.grid import channels_first, column, nearest, steps
from pocketsam.quantize.openvino import _behind, _flatten, _requantize

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
