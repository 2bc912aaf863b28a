"""Layers whose rounded activations spoil the features: given a scale for each channel, or left in float.

A few channels can be a hundred times larger than the others, as before the depthwise convolutions of MobileSAM's first
stages, behind GELU; one step for the whole tensor then leaves nothing of the small ones. Such layers are found by
rounding the activations of one layer at a time, and mended until the features are good enough, those first that gain
most for their size and work: with a scale for each channel (:mod:`pocketsam.quantize.channels`), or by leaving them in
float.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pocketsam.quantize.channels import can_scale, plans, put
from pocketsam.quantize.grid import channels_first
from pocketsam.quantize.hooks import Hook, hooked
from pocketsam.quantize.prefix import Prefix
from pocketsam.quantize.ranges import round_values

if TYPE_CHECKING:
    from pocketsam.quantize.correction import Layer

# Signal to noise of the features in decibels that is good enough, by docs/adr/0006.
ENOUGH = 24.5
# A layer below this, alone, may get scales.
ALONE = 38.0
# Neighbours that are rounded at once first; above this they are harmless, and asked one by one when it is their turn.
GROUP, HARMLESS = 4, ALONE
# A layer with fewer products for each value that it moves gets none: two scales would cost it more than float.
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
            return self._worst(self.module(self.batch))

    def alone(self, layers: Sequence[Layer]) -> tuple[list[float], dict[int, range]]:
        """With the activations of one layer rounded at a time, for layers in execution order.

        Neighbours that are harmless together are not asked one by one, which saves most of a large transformer's calls.

        Returns:
            Decibels of each layer, and the groups of those whose decibels are only those of their whole group.
        """
        prefix = Prefix(self.module, self.batch)

        def rounded(chosen: Sequence[Layer]) -> float:
            return self._worst(prefix.run(chosen[0].module, _rounding(chosen)))

        found: list[float] = []
        groups: dict[int, range] = {}
        for start in range(0, len(layers), GROUP):
            group = range(start, min(start + GROUP, len(layers)))
            together = rounded(layers[group.start:group.stop])
            if len(group) == 1 or together < HARMLESS:
                found += [rounded([layers[i]]) for i in group]
            else:
                found += [together] * len(group)
                groups |= dict.fromkeys(group, group)
        return found, groups

    def _worst(self, maps: Sequence[Tensor]) -> float:
        return min(_decibels(a, b) for a, b in zip(self.truth, maps, strict=True))


@torch.no_grad()
def mend(module: nn.Module, layers: Sequence[Layer], images: Sequence[Tensor], judges: int) -> list[Layer]:
    """Make the features good enough with the activations of all layers rounded.

    Args:
        module: the encoder, float; scales are inserted in place, which changes nothing in float.
        layers: that would be rounded, with their ranges, which change where scales are inserted.
        images: uint8 (1, S, S, 3) each; they show ranges.
        judges: how many of them judge, together.

    Returns:
        The layers that must stay in float, often none; at most half of them, even if that is not enough.
    """
    judge = _Judge(module, torch.cat(list(images[:judges])))
    if judge.activations(layers) >= ENOUGH:
        return []
    alone, groups = judge.alone(layers)
    heavy = [i for i, layer in enumerate(layers)
             if alone[i] < ALONE and can_scale(layer.module) and _work(layer) >= LIGHT]
    found = plans(module, [layers[i] for i in heavy], images)
    scales = {i: plan for i, plan in zip(heavy, found, strict=True) if plan.sides}
    costs = _costs(layers)
    rest = list(range(len(layers)))
    floats: list[Layer] = []
    while len(floats) < MOST * len(layers):
        i = max(rest, key=lambda i: _noise(alone[i]) / costs[i])
        if i in groups:
            for k in groups[i]:
                alone[k] = judge.activations([layers[k]])
                del groups[k]
            continue
        if i in scales:
            put(module, layers[i], scales.pop(i))
            alone[i] = judge.activations([layers[i]])
        else:
            rest.remove(i)
            floats.append(layers[i])
        # Noises add up; the sum only says when it is time to look.
        likely = sum(_noise(alone[i]) / len(groups.get(i, (i,))) for i in rest) <= _noise(ENOUGH - 1)
        if likely and judge.activations([layers[i] for i in rest]) >= ENOUGH:
            break
    return floats


def _costs(layers: Sequence[Layer]) -> list[float]:
    """What each layer costs in float: its share of all weights, and of all products."""
    weights = [layer.module.weight.numel() for layer in layers]
    products = [layer.written * channels_first(layer.module)[0].numel() for layer in layers]
    return [w / sum(weights) + p / sum(products) for w, p in zip(weights, products, strict=True)]


def _noise(decibels: float) -> float:
    """Of a signal of 1."""
    return 10 ** (-decibels / 10)


def _work(layer: Layer) -> float:
    """Products for each value that a layer reads or writes."""
    weights = channels_first(layer.module)
    inputs = weights.shape[1] * getattr(layer.module, "groups", 1)
    return weights.numel() / (weights.shape[0] + inputs)


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
