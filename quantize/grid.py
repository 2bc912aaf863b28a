"""Grids of symmetric 8-bit weights, one scale per output channel."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Weighted: TypeAlias = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
# ``full``: codes up to 127. ``pairs``: as large as may be without two neighbouring products leaving 16 bits.
Grid = Literal["full", "pairs"]
INT8 = 127
# AVX2 adds two products of u8 and s8 in 16 bits: 255 x (127 + 1) stays below 2 ** 15, one being lost to rounding.
PAIR = 127


class Scales:
    """Rounds weights, and remembers the scale of every channel, so that a format's tool can be told.

    7-bit weights, the usual answer to saturation, lose half of the levels in every channel. But a pair saturates only
    if both codes are large and of one sign, so a scale from the largest sum of neighbours keeps most of them (lite0:
    104 of 127 on average, 71 at least).

    Args:
        grid: which.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._known: dict[str, NDArray[np.float32]] = {}

    def round(self, module: Weighted) -> Tensor:
        """The module's weights on the grid, in float."""
        weight = module.weight.data
        axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
        first = weight.transpose(0, axis)
        scale = self._scale(first).clamp(min=1e-12)
        rounded = ((first / scale.reshape(-1, *[1] * (weight.ndim - 1))).round()
                   * scale.reshape(-1, *[1] * (weight.ndim - 1))).transpose(0, axis).contiguous()
        self._known[_digest(rounded.numpy())] = scale.numpy()
        return rounded

    def of(self, weights: NDArray[Any]) -> NDArray[np.float32] | None:
        """(C,) scales of weights as :meth:`round` returned them; None if it did not."""
        return self._known.get(_digest(weights))

    def _scale(self, weight: Tensor) -> Tensor:
        """(O, I, ...) -> (O,)."""
        peak = weight.abs().flatten(1).amax(1) / INT8
        # Depthwise kernels multiply in 32 bits.
        if self.grid == "full" or weight.shape[1] == 1:
            return peak
        taps = weight.flatten(2) if weight.ndim > 2 else weight[:, :, None]
        sums = [(taps[:, 1:] + taps[:, :-1]).abs().flatten(1).amax(1)]
        if taps.shape[2] > 1:
            sums.append((taps[:, :, 1:] + taps[:, :, :-1]).abs().flatten(1).amax(1))
        return torch.maximum(peak, torch.stack(sums).amax(0) / PAIR)


def _digest(weights: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(weights, np.float32).tobytes()).hexdigest()
