"""Ranges of activations by squared error: a few large values are clipped where that makes the steps of all finer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pocketsam.quantize.hooks import Hook

if TYPE_CHECKING:
    from pocketsam.quantize.correction import Layer

UINT8 = 255
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
# Values of a tensor that are looked at; evenly spaced.
VALUES = 2 ** 21
Range = tuple[float, float]


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of 8-bit unsigned codes for a range that contains zero."""
    scale = max((high - low) / UINT8, 1e-12)
    return scale, round(-low / scale)


def round_values(x: Tensor, low: float, high: float) -> Tensor:
    """8-bit affine rounding; values outside the range are clipped."""
    scale, zero = affine(low, high)
    return ((x / scale).round() + zero).clamp(0, UINT8).sub(zero).mul(scale)


def clipped(x: Tensor, span: Range) -> Range:
    """The share of a range that rounds a tensor with the least squared error."""
    x = x.flatten()[::max(1, x.numel() // VALUES)]
    spans = [(span[0] * s, span[1] * s) for s in SHARES]
    return min(spans, key=lambda s: float((round_values(x, *s) - x).square().mean()))


def clip(layers: list[Layer]) -> Iterator[Hook]:
    """Hooks that narrow what layers read, and what those without a fused activation write, on the images that run."""
    def read(layer: Layer, inputs: tuple[Tensor, ...]) -> None:
        layer.reads = clipped(inputs[0], layer.reads)

    def write(layer: Layer, output: Tensor) -> None:
        if not layer.fused:
            layer.writes = clipped(output, layer.writes)

    for layer in layers:
        module: nn.Module = layer.module
        yield module, "before", lambda _, i, layer=layer: read(layer, i)
        yield module, "after", lambda _, i, o, layer=layer: write(layer, o)
