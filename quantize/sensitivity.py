"""Layers whose rounded activations spoil the features: given a scale for each channel, or left in float.

A few channels can be a hundred times larger than the others, as before the depthwise convolutions of MobileSAM's first
stages, behind GELU; one step for the whole tensor then leaves nothing of the small ones. Such layers are found by
rounding the activations of one layer at a time, and mended from the worst on until the features are good enough: with a
scale for each channel (:mod:`pocketsam.quantize.channels`), or by leaving them in float where they hold little work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pocketsam.quantize.channels import can_scale, plans, put
from pocketsam.quantize.grid import channels_first
from pocketsam.quantize.hooks import Hook, hooked
from pocketsam.quantize.ranges import round_values

if TYPE_CHECKING:
    from pocketsam.quantize.correction import Layer

# Signal to noise of the features in decibels that is good enough, by docs/adr/0006.
ENOUGH = 27.0
# A layer below this, alone, may get scales.
ALONE = 38.0
# A bad layer with fewer products for each value that it moves stays in float: two scales would cost it more.
LIGHT = 64
# Share of the layers that may be left in float; beyond, int8 is not worth its name.
MOST = 0.5


class _Judge:
    """Signal to noise of the features with some layers rounded."""

    def __init__(self, module: nn.Module, batch: Tensor) -> None:
        self.module, self.batch = module, batch
        self.truth = module(batch)

    def activations(self, layers: Sequence[Layer]) -> float:
        """With the activations of these layers rounded."""
        with hooked(_rounding(layers)):
            return min(_decibels(a, b) for a, b in zip(self.truth, self.module(self.batch), strict=True))


@torch.no_grad()
def mend(module: nn.Module, layers: Sequence[Layer], batch: Tensor, images: int) -> list[Layer]:
    """Make the features good enough with the activations of all layers rounded.

    Args:
        module: the encoder, float; scales are inserted in place, which changes nothing in float.
        layers: that would be rounded, with their ranges, which change where scales are inserted.
        batch: uint8 (B, S, S, 3), shows ranges.
        images: of the batch that judge.

    Returns:
        The layers that must stay in float, the worst first; often none. At most half, even if that is not enough.
    """
    judge = _Judge(module, batch[:images])
    if judge.activations(layers) >= ENOUGH:
        return []
    alone = [judge.activations([layer]) for layer in layers]
    order = sorted(range(len(layers)), key=lambda i: alone[i])
    bad = [i for i in order if alone[i] < ALONE]
    heavy = [i for i in bad if can_scale(layers[i].module) and _work(layers[i]) >= LIGHT]
    chosen = dict(zip(heavy, plans(module, [layers[i] for i in heavy], batch), strict=True))
    floats: list[int] = []

    def good() -> bool:
        # Noises add up; the sum only says when it is time to look.
        rest = [i for i in range(len(layers)) if i not in floats]
        likely = _together([alone[i] for i in rest]) >= ENOUGH - 1
        return likely and judge.activations([layers[i] for i in rest]) >= ENOUGH

    for i in bad:
        if i not in chosen:
            floats.append(i)
        elif chosen[i].sides:
            put(module, layers[i], chosen[i])
            alone[i] = judge.activations([layers[i]])
        if good():
            return [layers[i] for i in floats]
    for i in sorted(chosen, key=lambda i: alone[i]):
        floats.append(i)
        if good():
            break
    return [layers[i] for i in floats[:int(MOST * len(layers))]]


def _work(layer: Layer) -> float:
    """Products for each value that a layer reads or writes."""
    weights = channels_first(layer.module)
    inputs = weights.shape[1] * getattr(layer.module, "groups", 1)
    return weights.numel() / (weights.shape[0] + inputs)


def _together(decibels: Sequence[float]) -> float:
    return -10 * math.log10(sum(10 ** (-d / 10) for d in decibels) + 1e-30)


def _decibels(truth: Tensor, other: Tensor) -> float:
    """Signal to noise of one feature map (B, C, ...); what a channel has everywhere is no signal."""
    signal = (truth - truth.mean((0, *range(2, truth.ndim)), keepdim=True)).square().sum()
    return float(10 * torch.log10(signal / (other - truth).square().sum().clamp(min=1e-30)))


def _rounding(layers: Sequence[Layer]) -> Iterator[Hook]:
    """Round what layers read, and what those without a fused activation write."""
    for layer in layers:
        yield layer.module, "before", lambda _, i, layer=layer: (round_values(i[0], *layer.reads),)
        if not layer.fused:
            yield layer.module, "after", lambda _, i, o, layer=layer: round_values(o, *layer.writes)
