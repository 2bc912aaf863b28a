"""Layers that must stay in float: those whose rounded activations alone spoil the features.

A few channels can be a hundred times larger than the others, as before the depthwise convolutions of MobileSAM's first
stages, behind GELU; one step for the whole tensor then leaves nothing of the small ones. Such layers are found by
rounding the activations of one layer at a time, and left in float from the worst on until the features are good enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pocketsam.quantize.hooks import Hook, hooked
from pocketsam.quantize.ranges import round_values

if TYPE_CHECKING:
    from pocketsam.quantize.correction import Layer

# Signal to noise of the features in decibels, by docs/adr/0006: below the first something is wrong, and then mended up
# to the second.
POOR, ENOUGH = 26.0, 30.0
# Share of the layers that may be left in float; beyond, int8 is not worth its name.
MOST = 0.5


@torch.no_grad()
def sensitive(module: nn.Module, layers: Sequence[Layer], batch: Tensor) -> list[Layer]:
    """The layers that must stay in float so that the features are good enough with all other activations rounded.

    Args:
        module: the encoder, float.
        layers: that would be rounded, with their ranges.
        batch: uint8 (B, S, S, 3).

    Returns:
        Often none. At most half of the layers, the worst first, even if that is not enough.
    """
    truth = module(batch)

    def decibels(rounded: Sequence[Layer]) -> float:
        with hooked(_rounding(rounded)):
            return min(_decibels(a, b) for a, b in zip(truth, module(batch), strict=True))

    if decibels(layers) >= POOR:
        return []
    alone = sorted(((decibels([layer]), i) for i, layer in enumerate(layers)))
    order = [layers[i] for _, i in alone]
    noise = [10 ** (-d / 10) for d, _ in alone]
    most = int(MOST * len(layers))
    # Noises add up; the sum is a guess of where to begin.
    count = next((k for k in range(1, most) if -10 * math.log10(sum(noise[k:])) >= ENOUGH), most)
    while count < most and decibels(order[count:]) < ENOUGH:
        count += 1
    return order[:count]


def _decibels(truth: Tensor, other: Tensor) -> float:
    """Signal to noise of one feature map (B, C, ...); what a channel has everywhere is no signal."""
    signal = (truth - truth.mean((0, *range(2, truth.ndim)), keepdim=True)).square().sum()
    return float(10 * torch.log10(signal / (other - truth).square().sum().clamp(min=1e-30)))


def _rounding(layers: Sequence[Layer]) -> Iterator[Hook]:
    """Round what layers read, and what those without an activation write."""
    for layer in layers:
        yield layer.module, "before", lambda _, i, layer=layer: (round_values(i[0], *layer.reads),)
        if not layer.activated:
            yield layer.module, "after", lambda _, i, o, layer=layer: round_values(o, *layer.writes)
