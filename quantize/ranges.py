"""Ranges of activations by squared error: a few large values are clipped where that makes the steps of all finer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pocketsam.quantize.hooks import Hook, hooked

if TYPE_CHECKING:
    from pocketsam.quantize.correction import Layer

UINT8 = 255
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
# Values of a tensor that are looked at, of all images together; evenly spaced.
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


class Narrowing:
    """Finds the share of a range that rounds a tensor with the least squared error, over all images that it is shown.

    Args:
        span: lowest and highest value.
        images: how many there will be; each shows its part of ``VALUES``.
    """

    def __init__(self, span: Range, images: int = 1) -> None:
        self._spans = [(span[0] * s, span[1] * s) for s in SHARES]
        self._errors = [0.0] * len(SHARES)
        self._most = max(1, VALUES // images)

    def look(self, x: Tensor) -> None:
        """Take in the tensor of one image, (..., channels) or (..., width)."""
        step = max(1, x.numel() // self._most)
        # A step that shares a factor with the last axis would never reach most of its places.
        while math.gcd(step, x.shape[-1]) > 1:
            step += 1
        x = x.flatten()[::step]
        for i, span in enumerate(self._spans):
            self._errors[i] += float((round_values(x, *span) - x).square().mean())

    def best(self) -> Range:
        return self._spans[self._errors.index(min(self._errors))]


def clipped(x: Tensor, span: Range) -> Range:
    """The share of a range that rounds a tensor with the least squared error."""
    found = Narrowing(span)
    found.look(x)
    return found.best()


def clip(module: nn.Module, layers: Sequence[Layer], images: Sequence[Tensor]) -> None:
    """Narrow what layers read, and what those without a fused activation write, by what they do on these images."""
    reads = [Narrowing(layer.reads, len(images)) for layer in layers]
    writes = [Narrowing(layer.writes, len(images)) for layer in layers]
    hooks: list[Hook] = []
    for layer, read, write in zip(layers, reads, writes, strict=True):
        hooks.append((layer.module, "before", lambda _, i, read=read: read.look(i[0])))
        if not layer.fused:
            hooks.append((layer.module, "after", lambda _, i, o, write=write: write.look(o)))
    with hooked(hooks):
        for image in images:
            module(image)
    for layer, read, write in zip(layers, reads, writes, strict=True):
        layer.reads = read.best()
        if not layer.fused:
            layer.writes = write.best()
