"""Resampling of arrays: Pillow's filters on photos, torch's bilinear and bicubic interpolation on logits, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketsam.images import Rgb

Floats = NDArray[np.float32]

# A band of this size stays in the processor's cache while it is resized.
BAND_PIXELS = 1_500_000
THREADS = 2
# So many floats stay in the second-level cache while rows are interpolated.
BLOCK_PIXELS = 16_384


def _two_at_a_time(work: Callable[[int, int], None], count: int, pixels_each: int) -> None:
    """Call ``work(start, stop)`` on ranges that make up 0..count, two threads at a time.

    Worth it where the work leaves the interpreter lock, as Pillow and numpy do on large pieces.

    Args:
        count: rows or columns.
        pixels_each: pixels of one of them; what is below one band in all is done at once.
    """
    bands = max(1, min(count, count * pixels_each // BAND_PIXELS))
    edges = np.linspace(0, count, bands + 1).astype(int).tolist()
    if bands == 1:
        work(0, count)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))


def pillow_resize(rgb: Rgb, height: int, width: int) -> Rgb:
    """Pillow's two passes, each in bands: the same bytes, without a second copy of a large photo."""
    rows, columns = rgb.shape[:2]
    if (rows, columns) == (height, width):
        return rgb
    narrow = np.empty((rows, width, 3), np.uint8)
    out = np.empty((height, width, 3), np.uint8)

    def squeeze_rows(top: int, bottom: int) -> None:
        band = Image.fromarray(rgb[top:bottom])
        narrow[top:bottom] = np.asarray(band.resize((width, bottom - top), Image.Resampling.BILINEAR))

    def squeeze_columns(left: int, right: int) -> None:
        band = Image.fromarray(narrow[:, left:right])
        out[:, left:right] = np.asarray(band.resize((right - left, height), Image.Resampling.BILINEAR))

    _two_at_a_time(squeeze_rows, rows, columns)
    _two_at_a_time(squeeze_columns, width, rows)
    return out


def float_resize(rgb: Rgb, height: int, width: int, antialias: bool) -> Floats:
    """Bilinear on floats, channel by channel; Pillow's filter in floating point is torch's antialiased one."""
    out = np.empty((height, width, 3), np.float32)
    for c in range(3):
        plane = rgb[..., c].astype(np.float32)
        if antialias:
            out[..., c] = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
        else:
            out[..., c] = linear_resize(plane, height, width, height, width)
    return out


def linear_resize(x: Floats, height: int, width: int, keep_height: int, keep_width: int) -> Floats:
    """Bilinear (half-pixel centres, no antialiasing) to (height, width), returning the top-left kept part."""
    out = np.empty((keep_height, keep_width), np.float32)
    for top, block in linear_rows(linear_columns(x, width, keep_width), height, keep_height):
        out[top:top + len(block)] = block
    return out


def linear_columns(x: Floats, full: int, keep: int) -> Floats:
    """Interpolate along each row from w to ``full`` columns, of which the first ``keep`` are made."""
    if full == x.shape[1]:
        return x[:, :keep]
    low, high, weight = _neighbours(x.shape[1], full, keep)
    # np.take is several times faster than indexing here.
    out: Floats = np.take(x, low, axis=1)
    out *= 1 - weight
    part = np.take(x, high, axis=1)
    part *= weight
    out += part
    return out


def linear_rows(x: Floats, full: int, keep: int) -> Iterator[tuple[int, Floats]]:
    """x interpolated from h to ``full`` rows, of which the first ``keep`` are made.

    Yields:
        Index of the first row, and float32 (rows, w): rows between the same two of the source, in a reused buffer.
    """
    low, high, weight = _neighbours(len(x), full, keep)
    most = max(1, BLOCK_PIXELS // x.shape[1])
    blocks = np.empty((2, most, x.shape[1]), np.float32)
    turns = np.flatnonzero(np.diff(low)) + 1
    for first, end in pairwise([0, *turns.tolist(), keep]):
        for top in range(first, end, most):
            t = weight[top:min(end, top + most), None]
            block, part = blocks[:, :len(t)]
            np.multiply(x[low[top]], 1 - t, out=block)
            np.multiply(x[high[top]], t, out=part)
            np.add(block, part, out=block)
            yield top, block


def _neighbours(n: int, full: int, keep: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Source indices below and above, and the weight of the upper, for linear sampling with half-pixel centres."""
    source = np.maximum((np.arange(keep) + 0.5) * (n / full) - 0.5, 0)
    low = np.minimum(source.astype(np.int64), n - 1)
    return low, np.minimum(low + 1, n - 1), (source - low).astype(np.float32)


# The cubic convolution parameter of torch's bicubic interpolation (Keys 1981).
KEYS = -0.75


def _taps(n: int, full: int) -> tuple[NDArray[np.int64], Floats]:
    """(4, full) source indices and weights of cubic sampling with half-pixel centres, edges repeated."""
    source = (np.arange(full) + 0.5) * (n / full) - 0.5
    base = np.floor(source).astype(np.int64)
    t = source - base
    index = np.stack([np.clip(base + k, 0, n - 1) for k in (-1, 0, 1, 2)])

    def far(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((KEYS * x - 5 * KEYS) * x + 8 * KEYS) * x - 4 * KEYS

    def near(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((KEYS + 2) * x - (KEYS + 3)) * x * x + 1

    return index, np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)]).astype(np.float32)


def cubic_columns(x: Floats, full: int, start: int = 0, stop: int | None = None) -> Floats:
    """Cubic interpolation along each row to ``full`` columns, of which those from ``start`` to ``stop`` are made."""
    index, weight = (a[:, start:stop] for a in _taps(x.shape[1], full))
    out: Floats = np.einsum("hkw,kw->hw", x[:, index], weight)
    return out


def cubic_rows(x: Floats, full: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Floats]]:
    """x cubically interpolated to ``full`` rows, those from ``start`` to ``stop``, as :func:`linear_rows` yields
    them.
    """
    index, weight = _taps(len(x), full)
    for y in range(start, full if stop is None else stop):
        yield y, (weight[:, y] @ x[index[:, y]])[None]
