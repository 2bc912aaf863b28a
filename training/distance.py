"""Exact Euclidean distance transform, to find the point of a mask that is farthest from its boundary."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 32


def inner_distance(masks: Tensor) -> Tensor:
    """Distance of each pixel to the nearest pixel outside its mask; beyond the frame counts as outside.

    Args:
        masks: (M, H, W) bool.

    Returns:
        float32 (M, H, W), 0 outside the masks.
    """
    m, h, w = masks.shape
    outside = torch.ones(m, h + 2, w + 2, dtype=torch.bool, device=masks.device)
    outside[:, 1:-1, 1:-1] = ~masks
    rows = torch.arange(h + 2, device=masks.device, dtype=torch.float32)[:, None]
    above = torch.where(outside, rows, -torch.inf).cummax(1).values
    below = torch.where(outside, rows, torch.inf).flip(1).cummin(1).values.flip(1)
    vertical = torch.minimum(rows - above, below - rows)[:, 1:-1] ** 2
    columns = torch.arange(w + 2, device=masks.device, dtype=torch.float32)
    across = (columns[1:-1, None] - columns) ** 2
    squared = torch.empty(m, h, w, device=masks.device)
    for start in range(0, h, ROWS_AT_ONCE):
        part = vertical[:, start:start + ROWS_AT_ONCE, None, :]
        squared[:, start:start + ROWS_AT_ONCE] = (part + across).amin(-1)
    return squared.sqrt()


def centre_points(masks: Tensor) -> Tensor:
    """The centre of the pixel farthest from the boundary: (M, H, W) bool, none empty -> float32 (M, 2) XY."""
    index = inner_distance(masks).flatten(1).argmax(1)
    w = masks.shape[-1]
    return torch.stack([index % w, index // w], -1) + 0.5


def centre_point(mask: Tensor) -> Tensor:
    """The same for one mask (H, W), looking only at its bounding box: float32 (2,) XY."""
    ys, xs = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    top, left = int(ys[0]), int(xs[0])
    crop = mask[top:int(ys[-1]) + 1, left:int(xs[-1]) + 1]
    return centre_points(crop[None])[0] + torch.tensor([left, top], device=mask.device)
