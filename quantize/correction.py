"""Preparing an encoder for int8, once in PyTorch, for all formats: ranges, rounded weights, corrected biases.

Rounding shifts the mean of every channel, and the biases take it back: Nagel et al. 2019 ("Data-free quantization
through weight equalization and bias correction", section 4.2, the variant that measures the means on data). Weights and
activations are rounded as the formats round them, and every format then quantizes the corrected module on the grid and
the ranges found here; so none depends on what its own tool offers.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketsam.images import Rgb
from pocketsam.quantize.channels import (
    Channels,
    Form,
    channels_of,
    fold_behind,
    has_scales,
    span_of,
    write_scales,
)
from pocketsam.quantize.equalize import equalize
from pocketsam.quantize.grid import Grid, Weighted
from pocketsam.quantize.hooks import Hook, hooked
from pocketsam.quantize.ranges import Range, clip, round_values
from pocketsam.quantize.rounding import round_weights
from pocketsam.quantize.sensitivity import mend

# The first two become part of an 8-bit layer everywhere; ONNX Runtime and LiteRT round what goes into the others.
FUSED = (nn.ReLU, nn.ReLU6)
ACTIVATIONS = (*FUSED, nn.GELU, nn.SiLU, nn.Hardswish)
# Images that show ranges, and of a batch; bytes that all layers may write for a batch, 0.9 GB an image in MobileSAM.
BATCH_IMAGES = 8
BATCH_BYTES = 2 << 30
# Part of every int8 artifact's key: raise it when what this package computes changes.
METHOD = 20
# Share of the weights that the leading layers in float may hold, the first one apart: lite0's stem and two blocks.
FLOAT_SHARE = 0.002
# Images that show which layers are sensitive.
JUDGES = 2


@dataclass
class Layer:
    """What the float model shows of a weighted layer.

    Attributes:
        module: in the copy that is corrected.
        means: (C,) of the output's channels, one for each image.
        reads, writes: lowest and highest value of its input and output; with 8-bit activations, the range they are
            clipped to.
        read_channels, write_channels: lowest and highest value of each channel of them, on all images.
        unscaled: what ``writes`` was before a scale was put behind the layer.
        activated: its output goes to an activation.
        fused: to one that it is one operator with, so that it is rounded only behind that.
        order: of execution.
        written: bytes of its output for one image.
        scales: (O,) of its rounded weights; None while they are float.
    """

    module: Weighted
    means: list[Tensor] = field(default_factory=list)
    reads: Range = (0.0, 0.0)
    writes: Range = (0.0, 0.0)
    read_channels: Channels | None = None
    write_channels: Channels | None = None
    unscaled: Range = (0.0, 0.0)
    activated: bool = False
    fused: bool = False
    order: int = 0
    written: int = 0
    scales: Tensor | None = None


@dataclass(frozen=True)
class Prepared:
    """An encoder that is ready to be quantized by a format's tool.

    Attributes:
        module: float, with rounded weights and corrected biases.
        layers: what was seen of the weighted layers, in execution order, the first one included.
        leading: how many of the first ones stay in float.
        sensitive: others that do.
    """

    module: nn.Module
    layers: list[Layer]
    leading: int
    sensitive: list[Layer]

    def layer_of(self, weights: NDArray[Any]) -> Layer | None:
        """The rounded layer with these weights, in whatever layout a format keeps them; None if there is none."""
        return self._rounded.get(_digest(weights))

    def in_float(self, names: dict[str, NDArray[Any]]) -> list[str]:
        """The names of layers that stay in float.

        Args:
            names: a format's layers in execution order, with their weights in any layout.
        """
        others = {_digest(layer.module.weight.numpy()) for layer in self.sensitive}
        return [name for i, (name, weights) in enumerate(names.items())
                if i < self.leading or (others and _digest(weights) in others)]

    def written(self, form: Form, rounds_outputs: bool) -> Prepared:
        """The same for a format's converter.

        Args:
            form: how scales of channels are written.
            rounds_outputs: whether the format rounds what layers write; scales behind them are of no use to others.
        """
        found = self
        if not rounds_outputs and has_scales(self.module):
            module, layers, sensitive = copy.deepcopy((self.module, self.layers, self.sensitive))
            fold_behind(module, layers)
            found = Prepared(module, layers, self.leading, sensitive)
        write_scales(found.module, form)
        return found

    @functools.cached_property
    def _rounded(self) -> dict[str, Layer]:
        return {_digest(layer.module.weight.numpy()): layer for layer in self.layers if layer.scales is not None}


@torch.no_grad()
def prepare(module: nn.Module, images: Sequence[Rgb], grid: Grid, activations: bool) -> Prepared:
    """Equalize, round the weights, and correct the biases, on a copy.

    Layers are rounded and corrected in execution order, each behind those that already are. The weights stay rounded,
    so that the format's tool finds them on its own grid, and the activations where they will be. The first layers stay
    as they are: on the largest maps there are few weights, and their errors go through everything behind them. So do
    layers that no range suits, while others get a scale for each channel (:mod:`pocketsam.quantize.sensitivity`).

    Args:
        module: takes uint8 (B, S, S, 3); its normalisations are folded away.
        images: uint8 (1, S, S, 3) each.
        grid: of the weights.
        activations: whether these are rounded to 8 bits too.
    """
    changed = copy.deepcopy(module)
    if activations:
        equalize(changed, images)
    layers = [Layer(m) for m in changed.modules() if isinstance(m, Weighted)]
    with hooked(_observe(layers, changed)):
        for image in images:
            changed(torch.from_numpy(image))
    # A module may hold layers that it does not run, such as a classifier.
    layers = sorted((layer for layer in layers if layer.means), key=lambda layer: layer.order)
    leading = _leading(layers)
    rounded, floats = layers[leading:], []
    count = min(BATCH_IMAGES, len(images), max(1, BATCH_BYTES // sum(layer.written for layer in layers)))
    if activations:
        # One at a time, so that ranges are not those of the few images that fit into memory at once.
        seen = [torch.from_numpy(image) for image in images[::math.ceil(len(images) / BATCH_IMAGES)]]
        clip(changed, rounded, seen)
        floats = mend(changed, rounded, seen, min(JUDGES, count))
        rounded = [layer for layer in rounded if not any(layer is f for f in floats)]
    for layer in rounded:
        if layer.module.bias is None:
            # Where there is no bias nothing would take the shift back, which rounding counts on.
            layer.module.bias = nn.Parameter(torch.zeros(len(layer.means[0])), requires_grad=False)
    with hooked(_correct(rounded, grid, activations, count)):
        changed(torch.from_numpy(np.concatenate(images[:count])))
    return Prepared(changed, layers, leading, floats)


def _leading(layers: Sequence[Layer]) -> int:
    """How many layers stay in float: the first one, which reads the image, and those after it that are small."""
    sizes = [layer.module.weight.numel() for layer in layers]
    held = itertools.accumulate(sizes)
    return max(1, sum(h <= FLOAT_SHARE * sum(sizes) for h in held))


def _channel_means(x: Tensor, module: Weighted) -> Tensor:
    """(C,)."""
    return x.flatten(0, -2).mean(0) if isinstance(module, nn.Linear) else x.mean((0, 2, 3))


def _observe(layers: Sequence[Layer], module: nn.Module) -> Iterator[Hook]:
    """Means and ranges of every layer, and whether an activation follows."""
    last: dict[str, tuple[Layer, Tensor]] = {}
    count = itertools.count()

    def look(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer.order = next(count)
        layer.written = output.nbytes
        layer.means.append(_channel_means(output, layer.module))
        layer.read_channels = channels_of(layer.module, inputs[0], layer.read_channels)
        layer.write_channels = channels_of(layer.module, output, layer.write_channels)
        layer.reads, layer.writes = span_of(layer.read_channels), span_of(layer.write_channels)
        last["layer"] = layer, output

    def act(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if last and last["layer"][1] is inputs[0]:
            layer = last["layer"][0]
            layer.activated, layer.fused = True, isinstance(part, FUSED)

    for layer in layers:
        yield layer.module, "after", lambda _, i, o, layer=layer: look(layer, i, o)
    for part in module.modules():
        if isinstance(part, ACTIVATIONS):
            yield part, "before", act


def _correct(layers: Sequence[Layer], grid: Grid, activations: bool, images: int) -> Iterator[Hook]:
    """Round what a layer reads and its weights, take back the shift of its mean over the first images, and round what
    it writes.
    """
    generator = torch.Generator().manual_seed(0)

    def read(layer: Layer, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = round_values(inputs[0], *layer.reads) if activations else inputs[0]
        if layer.scales is None:
            layer.module.weight.data, layer.scales = round_weights(layer.module, x, grid, generator)
        return (x,)

    def write(layer: Layer, output: Tensor) -> Tensor:
        module = layer.module
        assert module.bias is not None
        shift = torch.stack(layer.means[:images]).mean(0) - _channel_means(output, module)
        module.bias.data += shift
        output = output + (shift if isinstance(module, nn.Linear) else shift[:, None, None])
        return round_values(output, *layer.writes) if activations and not layer.fused else output

    for layer in layers:
        yield layer.module, "before", lambda _, i, layer=layer: read(layer, i)
        yield layer.module, "after", lambda _, i, o, layer=layer: write(layer, o)


def _digest(weights: NDArray[Any]) -> str:
    """Of the values alone, whatever their layout."""
    # Zeros lose their sign, by which sorting would not order them.
    values = np.asarray(weights, np.float32) + np.float32(0)
    return hashlib.sha256(np.sort(values, axis=None).tobytes()).hexdigest()
