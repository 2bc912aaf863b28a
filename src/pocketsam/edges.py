"""Edges from automatic masks (SAM paper, appendix D.2): where the borders of unfiltered masks agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pocketsam.candidates import Candidate, Store, find, select
from pocketsam.clicks import PointDecoder
from pocketsam.geometry import Bools, Frame
from pocketsam.grids import point_grid
from pocketsam.images import ImageLike, load_rgb
from pocketsam.resampling import Floats
from pocketsam.runtime import sparing
from pocketsam.windows import Window, upscale_bands

if TYPE_CHECKING:
    from pocketsam.predictor import Predictor

POINTS_PER_SIDE = 16
NMS = 0.7
# Probabilities below sigmoid(-8) are 0 for an edge map, and bound the window that is looked at.
FAINT = 8.0
SMOOTH = 4
# Rows that are thinned at once, and how far above and below a pixel what is kept of it depends on others.
THIN_ROWS, THIN_MARGIN = 256, SMOOTH + 4


def find_edges(sam: Predictor, image: ImageLike, points_per_side: int = POINTS_PER_SIDE) -> Floats:
    """Thinned edge strengths.

    A grid of clicks gives three masks each; duplicates are removed by their boxes; the Sobel magnitude of each mask's
    probabilities is kept along its border; the maximum over masks is normalised and thinned.

    Args:
        image: path, PIL image or uint8 (H, W, 3) RGB array.

    Returns:
        float32 (H, W), 0 to 1.
    """
    with sparing(sam.runtime):
        embedding = sam.embed(load_rgb(image))
    frame, m = embedding.frame, sam.spec.mask_size
    points = point_grid(points_per_side) * (frame.width, frame.height)
    decoder, store = PointDecoder(sam, embedding), Store()
    for answers in decoder.answers(points):
        for candidate in find(answers, frame, 0, 0, FAINT):
            store.add(candidate)

    def decode(candidates: list[Candidate]) -> list[Floats]:
        return decoder.logits(points[[c.point for c in candidates]], [c.token for c in candidates])

    strength = np.zeros((frame.height, frame.width), np.float32)
    for _, logits, shape, _ in select(store, frame, m, FAINT, NMS, lambda shape, box: True, decode):
        w = shape.window
        np.maximum(strength[w.y0:w.y1, w.x0:w.x1], _border_strength(logits, frame, w, shape.mask),
                   out=strength[w.y0:w.y1, w.x0:w.x1])
    top = float(strength.max())
    return thin(strength / top) if top > 0 else strength


def thin(strength: Floats) -> Floats:
    """Keep a pixel where it is not below its two neighbours across the edge, interpolated (edge suppression).

    Args:
        strength: float32 (H, W).
    """
    kept = np.empty_like(strength)
    # A few rows at a time: the derivatives of a 12-megapixel photo would take 1.8 GB.
    for top in range(0, len(strength), THIN_ROWS):
        first = max(0, top - THIN_MARGIN)
        band = _thin(strength[first:top + THIN_ROWS + THIN_MARGIN])[top - first:]
        kept[top:top + THIN_ROWS] = band[:THIN_ROWS]
    return kept


def _thin(strength: Floats) -> Floats:
    smooth = _blur(strength, SMOOTH)
    gy, gx = _slope(smooth, 0), _slope(smooth, 1)
    gyy, gxy, gxx = _slope(gy, 0), _slope(gy, 1), _slope(gx, 1)
    # Across an edge the strength bends most: down on its crest, up on its flanks.
    angle = 0.5 * np.arctan2(2 * gxy, gxx - gyy)
    dx, dy = np.cos(angle), np.sin(angle)
    along = gxx * dx * dx + 2 * gxy * dx * dy + gyy * dy * dy
    across = gxx * dy * dy - 2 * gxy * dx * dy + gyy * dx * dx
    flat = np.abs(along) < np.abs(across)
    dx, dy = np.where(flat, -dy, dx), np.where(flat, dx, dy)
    ahead, behind = (_at(strength, s * dx, s * dy) for s in (1, -1))
    kept: Floats = np.where((strength * 1.01 >= ahead) & (strength * 1.01 >= behind), strength, 0).astype(np.float32)
    return kept


def _border_strength(logits: Floats, frame: Frame, window: Window, mask: Bools) -> Floats:
    bands = [band for _, band in upscale_bands(logits, frame, window)]
    p = 1 / (1 + np.exp(-np.clip(np.concatenate(bands), -30, 30)))
    p = np.pad(p, 1, mode="edge")
    smooth_y, smooth_x = p[:-2] + 2 * p[1:-1] + p[2:], p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    gx, gy = smooth_y[:, 2:] - smooth_y[:, :-2], smooth_x[2:] - smooth_x[:-2]
    magnitude: Floats = np.hypot(gx, gy).astype(np.float32)
    magnitude[~_border(mask)] = 0
    return magnitude


def _border(mask: Bools) -> Bools:
    """Pixels within one of a change between mask and rest; the photo's own frame is not a border."""
    padded = np.pad(mask, 1, mode="edge")
    parts = [padded[y:y + mask.shape[0], x:x + mask.shape[1]] for y in range(3) for x in range(3)]
    border: Bools = np.logical_or.reduce(parts) & ~np.logical_and.reduce(parts)
    return border


def _blur(x: Floats, radius: int) -> Floats:
    """Triangle filter along both axes, borders repeated."""
    kernel = np.concatenate([np.arange(1, radius + 2), np.arange(radius, 0, -1)]).astype(np.float32)
    kernel /= kernel.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in (0, 1)]
        padded = np.pad(x, pad, mode="edge")
        n = x.shape[axis]
        parts = (np.take(padded, np.arange(k, k + n), axis) * v for k, v in enumerate(kernel))
        x = np.sum(list(parts), axis=0, dtype=np.float32)
    return x


def _slope(x: Floats, axis: int) -> Floats:
    """Differences of neighbours along an axis; 0 where it is one pixel long."""
    slope: Floats = np.gradient(x, axis=axis) if x.shape[axis] > 1 else np.zeros_like(x)
    return slope


def _at(x: Floats, dx: NDArray[np.floating], dy: NDArray[np.floating]) -> Floats:
    """Bilinear samples at every pixel moved by (dx, dy)."""
    h, w = x.shape
    ys = np.clip(np.arange(h)[:, None] + dy, 0, h - 1)
    xs = np.clip(np.arange(w)[None] + dx, 0, w - 1)
    y0, x0 = np.minimum(ys.astype(int), max(0, h - 2)), np.minimum(xs.astype(int), max(0, w - 2))
    y1, x1 = np.minimum(y0 + 1, h - 1), np.minimum(x0 + 1, w - 1)
    ty, tx = ys - y0, xs - x0
    out: Floats = ((x[y0, x0] * (1 - tx) + x[y0, x1] * tx) * (1 - ty)
                   + (x[y1, x0] * (1 - tx) + x[y1, x1] * tx) * ty).astype(np.float32)
    return out
