"""Connected regions without OpenCV or scipy: small holes filled, small islands removed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pocketsam import rle
from pocketsam.candidates import suppress
from pocketsam.geometry import Bools

if TYPE_CHECKING:
    from pocketsam.everything import MaskRecord


@dataclass(frozen=True)
class _Runs:
    """The horizontal runs of a mask, in order, and the 8-connected regions that they belong to.

    Attributes:
        start, length: int64 (R,), flat index of each run's first pixel, and its pixels.
        region: int64 (R,), 0 to K - 1.
        areas: int64 (K,).
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    region: NDArray[np.int64]
    areas: NDArray[np.int64]

    @classmethod
    def of(cls, mask: Bools) -> _Runs:
        h, w = mask.shape
        padded = np.zeros((h, w + 2), np.bool_)
        padded[:, 1:-1] = mask
        edges = np.flatnonzero(padded[:, 1:] != padded[:, :-1])
        rows, columns = np.divmod(edges, w + 1)
        row, start, end = rows[::2], columns[::2], columns[1::2]
        _, region = np.unique(_join(row, start, end, h), return_inverse=True)
        areas = np.bincount(region.ravel(), weights=end - start).astype(np.int64)
        return cls(row * w + start, end - start, region.ravel(), areas)

    def pixels(self, chosen: Bools) -> NDArray[np.int64]:
        """Flat indices of the pixels of the runs where ``chosen`` (R,) is true."""
        start, length = self.start[chosen], self.length[chosen]
        first = np.cumsum(length) - length
        return np.repeat(start - first, length) + np.arange(int(length.sum()))


def label_regions(mask: Bools) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number the 8-connected regions of a mask.

    Args:
        mask: bool (H, W).

    Returns:
        int32 (H, W) labels, 0 outside and 1..K inside; int64 (K,) areas.
    """
    runs = _Runs.of(mask)
    out = np.zeros(mask.size, np.int32)
    out[runs.pixels(np.ones(len(runs.start), np.bool_))] = np.repeat(runs.region + 1, runs.length)
    return out.reshape(mask.shape), runs.areas


def _join(row: NDArray[Any], start: NDArray[Any], end: NDArray[Any], height: int) -> NDArray[np.int64]:
    """Union-find over the runs of neighbouring rows that touch, diagonals included; the root of each run."""
    parent = list(range(len(row)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first = np.searchsorted(row, np.arange(height + 1)).tolist()
    starts, ends = start.tolist(), end.tolist()
    for y in range(1, height):
        i, j = first[y - 1], first[y]
        above, here = first[y], first[y + 1]
        while i < above and j < here:
            if starts[i] <= ends[j] and starts[j] <= ends[i]:
                a, b = root(i), root(j)
                parent[max(a, b)] = min(a, b)
            if ends[i] < ends[j]:
                i += 1
            else:
                j += 1
    return np.array([root(i) for i in range(len(parent))], np.int64)


def clean(mask: Bools, least: int, what: Literal["holes", "islands"]) -> tuple[Bools, bool]:
    """Fill holes, or remove islands, of fewer than ``least`` pixels; the largest island always stays.

    Returns:
        The mask, and whether it changed.
    """
    runs = _Runs.of(~mask if what == "holes" else mask)
    small = runs.areas < least
    if not small.any():
        return mask, False
    if what == "islands" and small.all():
        small[int(runs.areas.argmax())] = False
    # Only the small regions are painted: labels of every pixel would take hundreds of megabytes of a large photo.
    changed = np.array(mask, order="C")
    changed.reshape(-1)[runs.pixels(small[runs.region])] = what == "holes"
    return changed, True


def clean_records(records: list[MaskRecord], least: int, overlap: float) -> list[MaskRecord]:
    """Clean every mask, then drop new duplicates by their boxes, preferring masks that needed no cleaning.

    One mask is decoded at a time.
    """
    cleaned: list[MaskRecord] = []
    untouched: list[float] = []
    for record in records:
        mask, filled = clean(record.mask, least, "holes")
        mask, removed = clean(mask, least, "islands")
        untouched.append(float(not (filled or removed)))
        cleaned.append(_with_mask(record, mask) if filled or removed else record)
    if not cleaned:
        return cleaned
    boxes = np.array([r.box for r in cleaned], np.float64)
    return [cleaned[i] for i in suppress(boxes, np.array(untouched), overlap)]


def _with_mask(record: MaskRecord, mask: Bools) -> MaskRecord:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))
    return replace(record, rle=rle.encode(mask), area=int(np.count_nonzero(mask)), box=box)
