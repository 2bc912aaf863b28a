"""Layers that must stay in float: those that rounded activations spoil so much that the features suffer.

A few channels can be a hundred times larger than the others, as before the depthwise convolutions of MobileSAM's first
stages, behind GELU; one step for the whole tensor then leaves nothing of the small ones. Such layers are few. They are
ranked by what rounding does to their own channels, each measured by its own spread, and left in float from the worst on
until the features are good enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pocketsam.quantize.hooks import Hook, hooked
from pocketsam.quantize.ranges import round_values

if TYPE_CHECKING:
    from pocketsam.quantize.correction import Layer

# Signal to noise of the features in decibels, by docs/adr/0006.
ENOUGH = 26.0
# Share of the layers that may be left in float; beyond, int8 is not worth its name.
MOST = 0.5


@torch.no_grad()
def sensitive(module: nn.Module, layers: Sequence[Layer], batch: Tensor) -> list[Layer]:
    """The fewest layers that must stay in float for features of ``ENOUGH`` with all other activations rounded.

    Args:
        module: the encoder, float.
        layers: that would be rounded, with their ranges.
        batch: uint8 (B, S, S, 3).

    Returns:
        Often none. At most half of the layers, even if that is not enough.
    """
    spoiled: dict[int, float] = {}
    with hooked(_looking(layers, spoiled)):
        truth = module(batch)
    order = sorted(layers, key=lambda layer: -spoiled[id(layer)])

    def enough(count: int) -> bool:
        with hooked(_rounding(order[count:])):
            return min(_decibels(a, b) for a, b in zip(truth, module(batch), strict=True)) >= ENOUGH

    if enough(0):
        return []
    few, many = 0, int(MOST * len(layers))
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return order[:many]


def _decibels(truth: Tensor, other: Tensor) -> float:
    """Signal to noise of one feature map (B, C, ...); what a channel has everywhere is no signal."""
    signal = (truth - truth.mean((0, *range(2, truth.ndim)), keepdim=True)).square().sum()
    return float(10 * torch.log10(signal / (other - truth).square().sum().clamp(min=1e-30)))


def _looking(layers: Sequence[Layer], spoiled: dict[int, float]) -> Iterator[Hook]:
    """Note for each layer the mean over its output's channels of noise over variance, at most 1 each."""
    def look(layer: Layer, x: Tensor, output: Tensor) -> None:
        module: Any = layer.module
        # Around its hooks.
        rounded = type(module).forward(module, round_values(x, *layer.reads))
        if not layer.activated:
            rounded = round_values(rounded, *layer.writes)
        axes = tuple(range(output.ndim - 1)) if isinstance(layer.module, nn.Linear) else (0, 2, 3)
        ratio = (rounded - output).square().mean(axes) / output.var(axes).clamp(min=1e-20)
        spoiled[id(layer)] = float(ratio.clamp(max=1).mean())

    for layer in layers:
        yield layer.module, "after", lambda _, i, o, layer=layer: look(layer, i[0], o)


def _rounding(layers: Sequence[Layer]) -> Iterator[Hook]:
    """Round what layers read, and what those without an activation write."""
    for layer in layers:
        yield layer.module, "before", lambda _, i, layer=layer: (round_values(i[0], *layer.reads),)
        if not layer.activated:
            yield layer.module, "after", lambda _, i, o, layer=layer: round_values(o, *layer.writes)
