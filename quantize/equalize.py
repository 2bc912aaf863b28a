"""Per-channel scale migration: channels of a residual stream are scaled to equal ranges, the scale goes into weights.

An activation tensor has one scale in 8 bits, so a channel that is small beside the largest keeps few levels. Where a
tensor lies between linear layers only, a channel can be divided by any number where it is written and multiplied where
it is read; nothing changes in float (Nagel et al. 2019, section 4.1; for transformers the idea is known as
SmoothQuant).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pocketsam.images import Rgb
from pocketsam.quantize.hooks import hooked

# A channel that is nearly silent on the calibration images must not be blown up without limit.
LEAST = 1e-3


@torch.no_grad()
def equalize(module: nn.Module, images: Iterable[Rgb]) -> int:
    """Scale the channels of all streams that the encoder declares, in place; returns how many there are.

    Args:
        module: an encoder of which some part has ``streams()`` (see ``models/lite0.py``); others are left alone.
        images: uint8 (1, S, S, 3) each.
    """
    parts: list[Any] = [part for part in module.modules() if hasattr(part, "streams")]
    streams = [s for part in parts for s in part.streams()]
    if not streams:
        return 0
    ranges: dict[int, Tensor] = {}

    def look(index: int, x: Tensor) -> None:
        peak = x.abs().amax((0, 2, 3))
        ranges[index] = torch.maximum(ranges[index], peak) if index in ranges else peak

    calls: list[Any] = []
    for i, stream in enumerate(streams):
        calls += [(m, "after", lambda _, inputs, out, i=i: look(i, out)) for m in stream.writers]
        calls += [(m, "before", lambda _, inputs, i=i: look(i, inputs[0])) for m in stream.readers]
    with hooked(calls):
        for image in images:
            module(torch.from_numpy(image))
    for i, stream in enumerate(streams):
        scale = (ranges[i] / ranges[i].max()).clamp(min=LEAST)
        for m in stream.writers:
            m.weight.data /= scale[:, None, None, None]
            m.bias.data /= scale
        for m in stream.readers:
            m.weight.data *= scale[None, :, None, None]
    return len(streams)
