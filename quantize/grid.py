"""Grids of symmetric 8-bit weights, one scale per output channel."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Weighted: TypeAlias = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
# ``full``: codes up to 127. ``pairs``: as large as may be without two neighbouring products leaving 16 bits.
Grid = Literal["full", "pairs"]
INT8 = 127
# AVX2 adds two products of u8 and s8 in 16 bits: 255 x (127 + 1) stays below 2 ** 15, one being lost to rounding.
PAIR = 127


def channels_first(module: Weighted) -> Tensor:
    """The module's weights as a view of (O, I, ...): output channels first."""
    weight = module.weight.data
    return weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else weight


def steps(weight: Tensor, grid: Grid) -> Tensor:
    """Scales of (O, I, ...) weights, (O,): the smallest with which no code leaves the grid.

    7-bit weights, the usual answer to saturation, lose half of the levels in every channel. But a pair saturates only
    if both codes are large and of one sign, so a scale from the largest sum of neighbours keeps most of them (lite0:
    104 of 127 on average, 71 at least).
    """
    peak = weight.abs().flatten(1).amax(1) / INT8
    # Depthwise kernels multiply in 32 bits.
    if grid == "full" or weight.shape[1] == 1:
        return peak.clamp(min=1e-12)
    taps = weight.flatten(2) if weight.ndim > 2 else weight[:, :, None]
    sums = [(taps[:, 1:] + taps[:, :-1]).abs().flatten(1).amax(1)]
    if taps.shape[2] > 1:
        sums.append((taps[:, :, 1:] + taps[:, :, :-1]).abs().flatten(1).amax(1))
    return torch.maximum(peak, torch.stack(sums).amax(0) / PAIR).clamp(min=1e-12)


def column(scales: Tensor, ndim: int) -> Tensor:
    """(O,) -> (O, 1, ...) of that many dimensions."""
    return scales.reshape(-1, *[1] * (ndim - 1))


def nearest(weight: Tensor, scales: Tensor) -> Tensor:
    """(O, I, ...) codes, each the nearest."""
    return (weight / column(scales, weight.ndim)).round().clamp(-INT8, INT8)
