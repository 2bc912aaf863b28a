"""Bias correction: rounding shifts the mean of every channel; the biases take it back before anything is quantized.

Nagel et al. 2019 ("Data-free quantization through weight equalization and bias correction", section 4.2, the variant that
measures the means on data). It is done once in PyTorch, on weights and activations rounded as the formats round them,
and every format then quantizes the corrected module; so none depends on what its own tool offers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pocketsam.images import Rgb

Weighted: TypeAlias = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish)
# Pixels of a batch: the activations of all its images are in memory at once.
PIXELS = 8 * 512 ** 2
UINT8 = 255


@dataclass
class Layer:
    """What the float model shows of a weighted layer.

    Attributes:
        module: in the copy that is corrected.
        means: (C,) of the output's channels, one for each image.
        reads, writes: lowest and highest value of its input and output.
        activated: its output goes to an activation, and is rounded only behind it.
    """

    module: Weighted
    means: list[Tensor] = field(default_factory=list)
    reads: tuple[float, float] = (0.0, 0.0)
    writes: tuple[float, float] = (0.0, 0.0)
    activated: bool = False


@torch.no_grad()
def corrected(module: nn.Module, images: Iterable[Rgb], weight_levels: int, activations: bool) -> nn.Module:
    """A copy of an encoder with rounded weights (still in float) and biases that undo the mean shift of quantization.

    Layers are corrected in execution order, each behind those that already are. The format's tool finds the weights on
    its own grid and the activations where they will be.

    Args:
        module: takes uint8 (B, S, S, 3); its normalisations are folded away.
        images: uint8 (1, S, S, 3) each.
        weight_levels: magnitude of the largest weight of a channel, 127 for symmetric int8.
        activations: whether these are rounded to 8 bits too.
    """
    changed = copy.deepcopy(module)
    layers = [Layer(m) for m in changed.modules() if isinstance(m, Weighted)]
    # Ranges must be those that the formats' own calibration finds, so all images are looked at.
    batch: list[Tensor] = []
    with _hooks(_observe(layers), changed):
        for image in images:
            x = torch.from_numpy(image)
            changed(x)
            if (len(batch) + 1) * x.shape[1] ** 2 <= PIXELS or not batch:
                batch.append(x)
    # The first layer stays in float (its input is the image, and it is small).
    rounded = layers[1:]
    for layer in rounded:
        layer.module.weight.data = round_weights(layer.module, weight_levels)
    with _hooks(_correct(rounded, activations, len(batch)), changed):
        changed(torch.cat(batch))
    return changed


def round_weights(module: Weighted, levels: int) -> Tensor:
    """The weights on a symmetric grid with one scale per output channel."""
    weight = module.weight.data
    axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = (weight.abs().amax(others, keepdim=True) / levels).clamp(min=1e-12)
    return (weight / scale).round() * scale


def round_values(x: Tensor, low: float, high: float) -> Tensor:
    """8-bit affine rounding over a range that contains zero; values outside are clipped."""
    scale = max((high - low) / UINT8, 1e-12)
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, UINT8).sub(zero).mul(scale)


def _channel_means(x: Tensor, module: Weighted) -> Tensor:
    """(C,)."""
    return x.flatten(0, -2).mean(0) if isinstance(module, nn.Linear) else x.mean((0, 2, 3))


Hook = tuple[nn.Module, str, Callable[..., Any]]


def _observe(layers: Sequence[Layer]) -> Callable[[nn.Module], Iterator[Hook]]:
    """Means and ranges of every layer, and whether an activation follows."""
    last: dict[str, tuple[Layer, Tensor]] = {}

    def look(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer.means.append(_channel_means(output, layer.module))
        layer.reads = _widened(layer.reads, inputs[0])
        layer.writes = _widened(layer.writes, output)
        last["layer"] = layer, output

    def act(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if last and last["layer"][1] is inputs[0]:
            last["layer"][0].activated = True

    def hooks(module: nn.Module) -> Iterator[Hook]:
        for layer in layers:
            yield layer.module, "after", lambda _, i, o, layer=layer: look(layer, i, o)
        for part in module.modules():
            if isinstance(part, ACTIVATIONS):
                yield part, "before", act

    return hooks


def _correct(layers: Sequence[Layer], activations: bool, images: int) -> Callable[[nn.Module], Iterator[Hook]]:
    """Round what a layer reads, take back the shift of its mean over the first images, and round what it writes."""
    def read(layer: Layer, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (round_values(inputs[0], *layer.reads),) if activations else None

    def write(layer: Layer, output: Tensor) -> Tensor:
        module = layer.module
        if module.bias is not None:
            shift = torch.stack(layer.means[:images]).mean(0) - _channel_means(output, module)
            module.bias.data += shift
            output = output + (shift if isinstance(module, nn.Linear) else shift[:, None, None])
        return round_values(output, *layer.writes) if activations and not layer.activated else output

    def hooks(module: nn.Module) -> Iterator[Hook]:
        for layer in layers:
            yield layer.module, "before", lambda _, i, layer=layer: read(layer, i)
            yield layer.module, "after", lambda _, i, o, layer=layer: write(layer, o)

    return hooks


@contextmanager
def _hooks(make: Callable[[nn.Module], Iterator[Hook]], module: nn.Module) -> Iterator[None]:
    handles = [part.register_forward_pre_hook(call) if when == "before" else part.register_forward_hook(call)
               for part, when, call in make(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widened(known: tuple[float, float], x: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(x)
    return min(known[0], float(low)), max(known[1], float(high))
