"""A scale for each channel before or behind a layer, where no single step suits what it reads or writes.

Through GELU a scale cannot move into the next layer, as :mod:`pocketsam.quantize.equalize` moves it. So it becomes an
operator of its own, in float. Before a layer it divides the channels, which are then rounded together, and the weights
take the scales back: a depthwise layer has a scale for each output channel anyway and loses nothing, any other one
shares the burden between activations and weights (Xiao et al. 2023, SmoothQuant, equation 4). Behind a layer it
multiplies what the weights were divided by, which costs their scales nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from pocketsam.quantize.equalize import LEAST
from pocketsam.quantize.grid import Weighted, column, nearest, steps
from pocketsam.quantize.hooks import hooked
from pocketsam.quantize.ranges import Narrowing, Range, round_values

if TYPE_CHECKING:
    from pocketsam.quantize.correction import Layer

# (C,) lowest and highest values.
Channels = tuple[Tensor, Tensor]
Form = Literal["multiply", "divide", "bound", "reshape"]
# No activation is below.
BOUND = -1e30
# How much of the burden goes to the weights of a layer that is not depthwise, by docs/adr/0006.
SHARE = 0.75
# By what a scale must divide the noise of a layer's output; it costs an operator.
GAIN = 2.0


class ChannelScale(nn.Module):
    """x * factors, for factors (C, 1, 1) of maps (B, C, H, W) or (C,) of tokens (..., C).

    Args:
        factors: of which shape.
        behind: whether the layer stands before it, or behind it.

    Attributes:
        form: how it is written, because converters move a plain product into the weights that it was taken from:
            ``divide`` is left alone by ONNX Runtime's tools, ``bound`` (a bound that never holds between a layer and
            the product) by LiteRT's, and ``reshape`` by OpenVINO's.
    """

    factors: Tensor
    divisors: Tensor
    form: Form = "multiply"

    def __init__(self, factors: Tensor, behind: bool) -> None:
        super().__init__()
        self.behind = behind
        self.register_buffer("factors", factors)
        self.register_buffer("divisors", 1 / factors)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "divide":
            return x / self.divisors
        if self.form == "bound" and self.behind:
            return x.clamp(min=BOUND) * self.factors
        if self.form == "reshape" and self.factors.ndim > 1:
            b, c, h, w = x.shape
            return (x.reshape(b, c, h * w) * self.factors[:, 0]).reshape(b, c, h, w)
        return x * self.factors


def write_scales(module: nn.Module, form: Form) -> None:
    """Choose how all scales of a module are written."""
    for part in module.modules():
        if isinstance(part, ChannelScale):
            part.form = form


def can_scale(layer: nn.Module) -> bool:
    """Whether a layer reads each channel on its own, or all of them together."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups in (1, layer.in_channels)
    return isinstance(layer, nn.Linear)


@dataclass(frozen=True)
class Side:
    """What dividing a layer's input or output channels by ``scales`` (C,) makes of the range there."""

    scales: Tensor
    span: Range


@dataclass(frozen=True)
class Plan:
    """Scales before and behind a layer; None where there is none."""

    before: Side | None = None
    behind: Side | None = None

    @property
    def sides(self) -> int:
        return (self.before is not None) + (self.behind is not None)


@torch.no_grad()
def plans(module: nn.Module, layers: Sequence[Layer], images: Sequence[Tensor]) -> list[Plan]:
    """For each layer the scales that its own output gains by, most often none.

    Args:
        module: the encoder.
        layers: that :func:`can_scale`, with their ranges.
        images: of its inputs; all of them show ranges, the first one what is gained.
    """
    sides = [_sides(layer) for layer in layers]
    finders = [[Narrowing(side.span, len(images)) for side in pair] for pair in sides]
    found: dict[int, Plan] = {}

    def see(i: int, layer: Layer, x: Tensor, y: Tensor) -> None:
        for tensor, side, finder in zip((x, y), sides[i], finders[i], strict=True):
            finder.look(tensor / side.scales.reshape(-1, *_tail(layer.module)))

    def judge(i: int, layer: Layer, x: Tensor, y: Tensor) -> None:
        before, behind = (Side(s.scales, f.best()) for s, f in zip(sides[i], finders[i], strict=True))
        # What is bad on one side hides what a scale on the other side is worth.
        choices = [Plan(), Plan(before)] + ([] if layer.fused else [Plan(None, behind), Plan(before, behind)])
        found[i] = min(choices, key=lambda plan: _noise(layer, plan, x, y) * GAIN ** plan.sides)

    for look, shown in ((see, images), (judge, images[:1])):
        with hooked((layer.module, "after", lambda _, x, y, i=i, layer=layer, look=look: look(i, layer, x[0], y))
                    for i, layer in enumerate(layers)):
            for image in shown:
                module(image)
    return [found[i] for i in range(len(layers))]


def _sides(layer: Layer) -> tuple[Side, Side]:
    """Scales before and behind a layer, and the ranges that they leave, by all images that were observed."""
    assert layer.read_channels is not None
    assert layer.write_channels is not None
    written = _peaks(layer.write_channels).clamp(min=1e-12)
    inward = scales_of(layer.module, _peaks(layer.read_channels))
    outward = (written / written.max()).clamp(min=LEAST)
    return (Side(inward, span_of(layer.read_channels, inward)), Side(outward, span_of(layer.write_channels, outward)))


def _noise(layer: Layer, plan: Plan, x: Tensor, y: Tensor) -> float:
    """Square error of a layer's output y, a mean over channels of the share of each one's variance, with what it reads,
    its weights (to the nearest codes) and what it writes rounded.
    """
    module = layer.module
    kept, axes = module.weight.data, _others(module, x)
    axis = -1 if isinstance(module, nn.Linear) else 1
    before = plan.before or Side(torch.ones(x.shape[axis]), layer.reads)
    behind = plan.behind or Side(torch.ones(y.shape[axis]), layer.writes)
    inward, outward = (side.scales.reshape(-1, *_tail(module)) for side in (before, behind))
    along = _along_inputs(module, before.scales)
    weight = kept * along
    scales = steps(weight, "full")
    module.weight.data = nearest(weight, scales) * column(scales, weight.ndim) / along
    out: Tensor = module.forward(round_values(x / inward, *before.span) * inward)
    module.weight.data = kept
    if not layer.fused:
        out = round_values(out / outward, *behind.span) * outward
    share = (out - y).square().mean(axes) / y.var(axes).clamp(min=1e-20)
    return float(share.clamp(max=1).mean())


def channels_of(layer: Weighted, x: Tensor, known: Channels | None = None) -> Channels:
    """Lowest and highest values of each channel of what a layer reads or writes, (C,) each, with those known before."""
    axes = _others(layer, x)
    low, high = x.amin(axes), x.amax(axes)
    return (low, high) if known is None else (torch.minimum(low, known[0]), torch.maximum(high, known[1]))


def span_of(channels: Channels, scales: Tensor | None = None) -> Range:
    """The range of all channels together, each divided by its scale; it contains zero."""
    low, high = channels if scales is None else (channels[0] / scales, channels[1] / scales)
    return min(0.0, float(low.min())), max(0.0, float(high.max()))


def _peaks(channels: Channels) -> Tensor:
    """(C,) largest absolute values."""
    return torch.maximum(channels[0].abs(), channels[1].abs())


def _others(layer: Weighted, x: Tensor) -> tuple[int, ...]:
    """The axes of what a layer reads or writes besides the channels."""
    return tuple(range(x.ndim - 1)) if isinstance(layer, nn.Linear) else (0, 2, 3)


@torch.no_grad()
def scales_of(layer: Weighted, peaks: Tensor) -> Tensor:
    """By what to divide each input channel, (C,), at most 1.

    Args:
        layer: one that :func:`can_scale`.
        peaks: (C,) largest absolute values of its inputs.
    """
    scales = peaks.clamp(min=1e-12)
    if not isinstance(layer, nn.Conv2d) or layer.groups == 1:
        weights = layer.weight.abs().transpose(0, 1).flatten(1).amax(1)
        scales = scales ** SHARE / weights.clamp(min=1e-12) ** (1 - SHARE)
    return (scales / scales.max()).clamp(min=LEAST)


@torch.no_grad()
def put(module: nn.Module, layer: Layer, plan: Plan) -> None:
    """Put scales around a layer of a module, in place, and correct what is known of the layer; nothing changes in
    float.
    """
    part = layer.module
    places = [(parent, name) for parent in module.modules() for name, child in parent.named_children() if child is part]
    parts: list[nn.Module] = [part]
    if plan.before is not None:
        part.weight.data = part.weight * _along_inputs(part, plan.before.scales)
        parts.insert(0, ChannelScale((1 / plan.before.scales).reshape(-1, *_tail(part)), behind=False))
        layer.reads = plan.before.span
    if plan.behind is not None:
        scales = plan.behind.scales
        part.weight.data = part.weight / column(scales, part.weight.ndim)
        if part.bias is not None:
            part.bias.data = part.bias / scales
        parts.append(ChannelScale(scales.reshape(-1, *_tail(part)), behind=True))
        layer.unscaled, layer.writes = layer.writes, plan.behind.span
        layer.means = [m / scales for m in layer.means]
    for parent, name in places:
        setattr(parent, name, nn.Sequential(*parts))


def has_scales(module: nn.Module) -> bool:
    return any(isinstance(part, ChannelScale) for part in module.modules())


@torch.no_grad()
def fold_behind(module: nn.Module, layers: Sequence[Layer]) -> None:
    """Give scales that stand behind layers back to their weights, in place, for formats that do not round what layers
    write; the codes of the weights stay as they are.
    """
    of = {id(layer.module): layer for layer in layers}
    for pair in [m for m in module.modules() if isinstance(m, nn.Sequential)]:
        scale = pair[-1] if len(pair) else None
        if not isinstance(scale, ChannelScale) or not scale.behind:
            continue
        part = pair[-2]
        assert isinstance(part, Weighted)
        factors = scale.factors.flatten()
        part.weight.data = part.weight * column(factors, part.weight.ndim)
        if part.bias is not None:
            part.bias.data = part.bias * factors
        layer = of[id(part)]
        layer.scales = None if layer.scales is None else layer.scales * factors
        layer.writes = layer.unscaled
        pair[-1] = nn.Identity()


def _tail(layer: Weighted) -> tuple[int, ...]:
    """What follows the channel's place in a layer's input."""
    return () if isinstance(layer, nn.Linear) else (1, 1)


def _along_inputs(layer: Weighted, scales: Tensor) -> Tensor:
    """(C,) in the shape that multiplies the layer's weights."""
    if isinstance(layer, nn.Linear):
        return scales
    if layer.groups == 1:
        return scales[:, None, None]
    return scales.repeat_interleave(layer.out_channels // layer.groups)[:, None, None, None]
