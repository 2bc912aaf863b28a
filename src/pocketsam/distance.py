"""The point of a mask that is farthest from its boundary, by exact Euclidean distance and without scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketsam.geometry import Bools

# Candidates are examined in blocks of about this many distances.
BLOCK = 1 << 20


def inner_point(mask: Bools) -> tuple[float, float]:
    """The centre (x, y) of the pixel deepest inside a mask; beyond the frame counts as outside.

    The distance to the outside along a row, a column or a diagonal is at least the distance in any direction. So
    pixels are examined exactly in the order of that bound, until no bound reaches the best depth found. Of equally
    deep pixels the first in reading order wins.

    Args:
        mask: bool (H, W), not empty.

    Raises:
        ValueError: the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("an empty mask has no inner point")
    top, left = int(rows[0]), int(columns[0])
    inside = np.pad(mask[top:int(rows[-1]) + 1, left:int(columns[-1]) + 1], 1)
    y, x = np.divmod(_deepest(inside), inside.shape[1])
    return left + int(x) - 0.5, top + int(y) - 0.5


def _deepest(inside: Bools) -> int:
    """Index into the flattened (h, w) mask, whose border is all outside."""
    vertical = _along(inside, 0) ** 2
    bound = np.minimum(vertical, (_along(inside.T, 0) ** 2).T)
    for step in (-1, 1):
        np.minimum(bound, 2 * _along(inside, step) ** 2, out=bound)
    candidates = np.flatnonzero(bound)
    bounds = bound.ravel()[candidates]
    order = np.argsort(-bounds, kind="stable")
    best, winner, start = -1, -1, 0
    while start < len(order) and bounds[order[start]] >= best:
        reach = int(bounds[order[start]] ** 0.5) + 1
        block = candidates[order[start:start + max(1, BLOCK // (2 * reach))]]
        depths = _depths(vertical, block, reach)
        deepest = int(depths.max())
        first = int(block[depths == deepest].min())
        if deepest > best or (deepest == best and first < winner):
            best, winner = deepest, first
        start += len(block)
    return winner


def _depths(vertical: NDArray[np.int64], pixels: NDArray[np.int64], reach: int) -> NDArray[np.int64]:
    """Squared distance of some pixels (flat indices) to the outside, which lies at most ``reach`` columns away."""
    y, x = np.divmod(pixels, vertical.shape[1])
    offsets = np.arange(-reach, reach + 1)
    columns = np.clip(x[:, None] + offsets, 0, vertical.shape[1] - 1)
    squared: NDArray[np.int64] = (vertical[y[:, None], columns] + offsets ** 2).min(1)
    return squared


def _along(inside: NDArray[Any], step: int) -> NDArray[np.int64]:
    """Rows to the nearest outside pixel, up or down, moving ``step`` columns with each row going up."""
    return np.minimum(_upwards(inside, step), _upwards(inside[::-1], -step)[::-1])


def _upwards(inside: NDArray[Any], step: int) -> NDArray[np.int64]:
    h, w = inside.shape
    out = np.zeros((h, w), np.int64)
    for row in range(1, h):
        out[row, 1:-1] = (out[row - 1, 1 + step:w - 1 + step] + 1) * inside[row, 1:-1]
    return out
