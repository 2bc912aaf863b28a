"""Low-resolution logits to photo resolution, only where the mask is: the same values as ``geometry``, less work.

A bilinear value lies between its neighbours, so outside the cells where low-resolution logits exceed a threshold
nothing exceeds it at any resolution. A bicubic one may leave their range, by a bounded share of it (:func:`ceiling`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketsam.geometry import Bools, Frame
from pocketsam.resampling import BAND_PIXELS, Floats, cubic_columns, cubic_rows

# Two interpolations of one cell each.
REACH = 2
# Bicubic weights along one axis sum to 1, and the negative ones to 3/16 at most (half-way between two cells): of the
# products of two axes the negative ones sum to 2 * 3/16 * 19/16.
OVERSHOOT = 2 * 3 / 16 * 19 / 16


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels: x0, y0 inclusive, x1, y1 exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    @property
    def width(self) -> int:
        return self.x1 - self.x0


@dataclass(frozen=True)
class Shape:
    """A mask at photo resolution inside a window.

    Attributes:
        mask: bool (height, width) of the window: logit above 0.
        window: where it lies in the photo (or crop).
        inner, outer: pixels above +offset and above -offset.
    """

    mask: Bools
    window: Window
    inner: int
    outer: int

    @property
    def stability(self) -> float:
        """IoU of the masks at the two thresholds; 0 for an empty one."""
        return self.inner / self.outer if self.outer else 0.0


def positive_cells(logits: Floats, threshold: float) -> Window | None:
    """The cells of (h, w) logits above a threshold, or None."""
    above = logits > threshold
    rows, columns = np.flatnonzero(above.any(1)), np.flatnonzero(above.any(0))
    if not len(rows):
        return None
    return Window(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def ceiling(logits: Floats, frame: Frame) -> Floats:
    """What pixels at a cell can have at most, (h, w): the logits themselves where interpolation is linear, for
    :func:`positive_cells`.
    """
    if frame.upscale != "cubic":
        return logits
    h, w = logits.shape
    padded = np.pad(logits, REACH, mode="edge")
    wide = [padded[:, i:i + w] for i in range(2 * REACH + 1)]
    most, least = np.maximum.reduce(wide), np.minimum.reduce(wide)
    most = np.maximum.reduce([most[i:i + h] for i in range(2 * REACH + 1)])
    least = np.minimum.reduce([least[i:i + h] for i in range(2 * REACH + 1)])
    out: Floats = most + np.float32(OVERSHOOT) * (most - least)
    return out


def to_image(cells: Window, frame: Frame, mask_size: int) -> Window:
    """The photo pixels that interpolation can reach from cells: one cell further, then one pixel of the frame."""
    cell, grow = frame.prompt_size / mask_size, 1 + mask_size / frame.prompt_size
    sx, sy = cell * frame.width / frame.prompt_width, cell * frame.height / frame.prompt_height
    x0 = min(max(0, math.floor((cells.x0 - grow) * sx)), frame.width - 1)
    y0 = min(max(0, math.floor((cells.y0 - grow) * sy)), frame.height - 1)
    x1 = min(frame.width, max(x0 + 1, math.ceil((cells.x1 + grow) * sx)))
    y1 = min(frame.height, max(y0 + 1, math.ceil((cells.y1 + grow) * sy)))
    return Window(x0, y0, x1, y1)


def upscale_bands(logits: Floats, frame: Frame, window: Window) -> Iterator[tuple[int, Floats]]:
    """The window of ``geometry.upscale_logits``, in bands of rows that bound the memory.

    Args:
        logits: float32 (4h, 4w).

    Yields:
        First row of the band inside the window, and float32 (rows, window.width) logits.
    """
    rows = max(1, BAND_PIXELS // window.width)
    starts = range(window.y0, window.y1, rows)
    bands = (Window(window.x0, top, window.x1, min(top + rows, window.y1)) for top in starts)
    if frame.upscale == "cubic":
        wide = cubic_columns(logits, frame.width, window.x0, window.x1)
        for band in bands:
            parts = [row for _, row in cubic_rows(wide, frame.height, band.y0, band.y1)]
            yield band.y0 - window.y0, np.concatenate(parts)
        return
    middle, origin, scale = logits, (0, 0), (logits.shape[0] / frame.height, logits.shape[1] / frame.width)
    if frame.upscale == "frame":
        scale = sy, sx = frame.prompt_height / frame.height, frame.prompt_width / frame.width
        origin = my0, mx0 = (max(0, math.floor(window.y0 * sy) - REACH), max(0, math.floor(window.x0 * sx) - REACH))
        mx1 = min(frame.prompt_width, math.ceil(window.x1 * sx) + REACH)
        my1 = min(frame.prompt_height, math.ceil(window.y1 * sy) + REACH)
        middle = at_model(logits, frame, Window(mx0, my0, mx1, my1))
    for band in bands:
        yield band.y0 - window.y0, _sample(middle, origin, scale, band)


def at_model(logits: Floats, frame: Frame, window: Window) -> Floats:
    """float32 (4h, 4w) logits at pixels of the prompt frame, (window.height, window.width)."""
    h, w = logits.shape
    return _sample(logits, (0, 0), (h / frame.prompt_size, w / frame.prompt_size), window)


def shape_of(logits: Floats, frame: Frame, window: Window, offset: float) -> Shape:
    """Threshold a window of upscaled logits and count the pixels that make the stability score."""
    mask = np.empty((window.height, window.width), np.bool_)
    inner = outer = 0
    for top, band in upscale_bands(logits, frame, window):
        np.greater(band, 0, out=mask[top:top + len(band)])
        inner += int(np.count_nonzero(band > offset))
        outer += int(np.count_nonzero(band > -offset))
    return Shape(mask, window, inner, outer)


def _sample(x: Floats, origin: tuple[int, int], scale: tuple[float, float], window: Window) -> Floats:
    """Bilinear values at the pixels of ``window``: pixel i lies at (i + 0.5) * scale - 0.5 of the source.

    Args:
        x: a part of the source that begins at ``origin`` (row, column) and holds every neighbour needed.
        scale: source pixels per target pixel, (rows, columns).
    """
    (oy, ox), (sy, sx) = origin, scale
    if sy <= 1 and sx <= 1:
        # For enlargement Pillow's triangle filter is this interpolation, and it runs in C.
        h, w = x.shape
        box = (max(0.0, window.x0 * sx - ox), max(0.0, window.y0 * sy - oy), min(float(w), window.x1 * sx - ox),
               min(float(h), window.y1 * sy - oy))
        image = Image.fromarray(np.ascontiguousarray(x, np.float32))
        return np.asarray(image.resize((window.width, window.height), Image.Resampling.BILINEAR, box=box))
    low, high, t = _neighbours(window.x0, window.x1, sx, ox, x.shape[1])
    wide: Floats = x[:, low] * (1 - t) + x[:, high] * t
    low, high, t = _neighbours(window.y0, window.y1, sy, oy, x.shape[0])
    out: Floats = wide[low] * (1 - t[:, None]) + wide[high] * t[:, None]
    return out


def _neighbours(start: int, stop: int, scale: float, origin: int,
                n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    source = np.maximum((np.arange(start, stop) + 0.5) * scale - 0.5, 0) - origin
    low = np.clip(source.astype(np.int64), 0, n - 1)
    return low, np.minimum(low + 1, n - 1), (source - low).astype(np.float32)
