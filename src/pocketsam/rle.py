"""COCO run-length encoding of binary masks (column-major runs, compressed to the ASCII string of pycocotools)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bits of the longest run of any mask.
MAX_SHIFT = 60


def encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """bool (H, W) -> ``{"size": [H, W], "counts": str}``, readable by pycocotools."""
    flat = np.asarray(mask, np.bool_).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate([[0], edges, [flat.size]])
    runs = np.diff(bounds).tolist()
    if flat.size and flat[0]:
        runs = [0, *runs]
    return {"size": [int(n) for n in mask.shape], "counts": _compress(runs)}


def decode(rle: dict[str, Any]) -> NDArray[np.bool_]:
    """Inverse of :func:`encode`; takes uncompressed runs, a list of integers, too.

    Raises:
        ValueError: the runs are damaged, or do not fill the size.
    """
    h, w = rle["size"]
    counts = rle["counts"]
    runs = _expand(counts) if isinstance(counts, str) else [int(n) for n in counts]
    # Checked before anything is allocated: the runs come from a file.
    if min(runs, default=0) < 0 or sum(runs) != h * w:
        raise ValueError(f"the runs make {sum(runs)} pixels and the size is {h} x {w}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape((h, w), order="F")


def _compress(runs: list[int]) -> str:
    """Five bits a character, low first; from the fourth run on, the difference to the run two before."""
    out = bytearray()
    for i, run in enumerate(runs):
        x = run - runs[i - 2] if i > 2 else run
        while True:
            bits = x & 31
            x >>= 5
            done = x == (-1 if bits & 16 else 0)
            out.append((bits if done else bits | 32) + 48)
            if done:
                break
    return out.decode("ascii")


def _expand(text: str) -> list[int]:
    runs: list[int] = []
    x = shift = 0
    for byte in text.encode("ascii"):
        bits = byte - 48
        x |= (bits & 31) << shift
        shift += 5
        if shift > MAX_SHIFT:
            raise ValueError("a run of a run-length encoding has no end")
        if not bits & 32:
            if bits & 16:
                x -= 1 << shift
            runs.append(x + runs[-2] if len(runs) > 2 else x)
            x = shift = 0
    return runs


def encode_window(mask: NDArray[np.bool_], x0: int, y0: int, height: int, width: int) -> dict[str, Any]:
    """The encoding of a (height, width) mask that is empty outside a window, without making the whole mask.

    Args:
        mask: bool (h, w) of the window, whose top left pixel is column ``x0``, row ``y0``.
    """
    columns = np.zeros((mask.shape[1], mask.shape[0] + 2), np.bool_)
    columns[:, 1:-1] = mask.T
    changes = np.flatnonzero(columns[:, 1:] != columns[:, :-1])
    column, row = np.divmod(changes, mask.shape[0] + 1)
    # Changes alternate between the start and the end (exclusive) of a run of ones.
    flat = (column + x0) * height + row + y0
    starts, ends = flat[::2], flat[1::2]
    joined = np.flatnonzero(starts[1:] == ends[:-1])
    bounds = np.stack([np.delete(starts, joined + 1), np.delete(ends, joined)], axis=1).ravel()
    total = height * width
    bounds = np.concatenate([[0], bounds, [] if len(bounds) and bounds[-1] == total else [total]])
    return {"size": [height, width], "counts": _compress(np.diff(bounds).astype(int).tolist())}


def area(rle: dict[str, Any]) -> int:
    """Number of pixels of a mask."""
    return sum(_expand(rle["counts"])[1::2])
