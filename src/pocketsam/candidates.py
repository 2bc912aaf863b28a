"""Masks that might be kept: judged on low-resolution logits, brought to photo resolution only when they must be.

Filters and box suppression give what they would give on full masks. A candidate is dropped on low-resolution evidence
only where the bounds leave no doubt; otherwise it is upscaled (in its window) and judged exactly, in score order. So
the work at photo resolution grows with the masks that are kept, not with the masks that were proposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketsam.clicks import Answers
from pocketsam.geometry import Frame
from pocketsam.resampling import Floats
from pocketsam.windows import REACH, Shape, Window, at_model, ceiling, positive_cells, shape_of, to_image

# Candidates' logits in memory at once; above it the least likely ones are dropped and decoded again if needed.
STORE_BYTES = 48_000_000
# So many of those are decoded at once.
AHEAD = 16
# Photos of so many pixels for one of the model's frame are worth a look at that frame first.
LARGE = 2
# Whatever lies outside a stored window is far below every threshold.
OUTSIDE = -1e4
Boxes = NDArray[np.float64]
Box = tuple[int, int, int, int]


@dataclass
class Candidate:
    """One mask of one point.

    Attributes:
        score: predicted IoU.
        point: index of the point that made it.
        token: 1 to 3.
        cells: low-resolution cells whose logits exceed minus the stability offset.
        inner, outer: boxes (x0, y0, x1, y1) in photo pixels between which the mask's box lies.
        logits: float16 logits of ``cells`` grown by two (of all cells where masks are enlarged cubically), or None when
            memory ran out.
    """

    score: float
    point: int
    token: int
    cells: Window
    inner: tuple[float, float, float, float]
    outer: tuple[float, float, float, float]
    logits: NDArray[np.float16] | None


class Store:
    """Candidates of one crop, with a bound on the memory of their logits."""

    def __init__(self, limit: int = STORE_BYTES) -> None:
        self.candidates: list[Candidate] = []
        self.limit = limit
        self._bytes = 0

    def add(self, candidate: Candidate) -> None:
        self.candidates.append(candidate)
        self._bytes += _size(candidate)
        if self._bytes > self.limit:
            for c in sorted(self.candidates, key=lambda c: c.score):
                self._bytes -= _size(c)
                c.logits = None
                if self._bytes <= self.limit * 3 // 4:
                    break

    def ordered(self) -> list[Candidate]:
        """Best first; equal scores in the order of their points."""
        return sorted(self.candidates, key=lambda c: -c.score)


def _size(candidate: Candidate) -> int:
    return 0 if candidate.logits is None else candidate.logits.nbytes


def find(answers: Answers, frame: Frame, least_score: float, least_stability: float,
         offset: float) -> Iterator[Candidate]:
    """Candidates of a batch that low-resolution evidence does not rule out.

    Args:
        answers: of some clicks.
        least_score, least_stability: thresholds; 0 switches a filter off.
    """
    points, low_res, scores = answers
    m = low_res.shape[-1]
    (rows, columns), (far_rows, far_columns) = _content(frame, m), _reached(frame, m)
    for b, token in np.argwhere(scores > least_score if least_score > 0 else np.isfinite(scores)):
        logits = low_res[b, token]
        inside, reached = logits[:rows, :columns], logits[:far_rows, :far_columns]
        outer = int(np.count_nonzero(inside > -offset))
        if least_stability > 0 and (outer or not (reached > -offset).any()) and _surely_unstable(
                int(np.count_nonzero(inside > offset)), outer, least_stability):
            continue
        most = ceiling(reached, frame)
        positive, cells = positive_cells(most, 0), positive_cells(most, -offset)
        if positive is None or cells is None:
            continue
        inner_box, outer_box = _inner_bound(inside, frame, m), _outer_bound(positive, frame, m)
        # Cubic interpolation would ring at the border of a stored part.
        stored = Window(0, 0, m, m) if frame.upscale == "cubic" else cells
        yield Candidate(float(scores[b, token]), int(points[b]), int(token) + 1, cells, inner_box, outer_box,
                        _cut(logits, stored))


def select(store: Store, frame: Frame, mask_size: int, offset: float, overlap: float,
           accept: Callable[[Shape, Box], bool],
           decode: Callable[[list[Candidate]], list[Floats]]) -> Iterator[tuple[Candidate, Floats, Shape, Box]]:
    """Greedy box suppression, best score first, exact at photo resolution.

    Args:
        offset: of the stability score.
        overlap: boxes with a larger IoU than this with a better mask's box are dropped.
        accept: the filters that need the mask itself; gets the shape and its box (inclusive corners).
        decode: makes the (4h, 4w) logits of candidates again whose logits are no longer in memory.

    Yields:
        Kept candidates with their (4h, 4w) logits, shape and box x0, y0, x1, y1 of the outermost pixels.
    """
    kept = np.empty((0, 4))
    used = 0
    closer = frame.upscale == "frame" and frame.width >= LARGE * frame.prompt_width
    ordered = store.ordered()
    again: dict[int, Floats] = {}
    for i, c in enumerate(ordered):
        logits = again.pop(i, None)
        if used and _surely_suppressed(c, kept[:used], overlap):
            continue
        if logits is None and c.logits is None:
            ahead = _forgotten(ordered, i, kept[:used], overlap)
            again = dict(zip(ahead, decode([ordered[j] for j in ahead]), strict=True))
            logits = again.pop(i)
        if logits is None:
            logits = restore(c, mask_size)
        if used and closer and _surely_suppressed(_closer(c, logits, frame), kept[:used], overlap):
            continue
        shape = shape_of(logits, frame, to_image(c.cells, frame, mask_size), offset)
        box = tight_box(shape)
        if box is None or not accept(shape, box) or (used and (iou(box, kept[:used]) > overlap).any()):
            continue
        if used == len(kept):
            kept = np.concatenate([kept, np.empty((max(64, used), 4))])
        kept[used] = box
        used += 1
        yield c, logits, shape, box


def _forgotten(ordered: list[Candidate], start: int, kept: Boxes, overlap: float) -> list[int]:
    """Indices of the next candidates that must be decoded again, as far as is known yet."""
    found = (i for i in range(start, len(ordered)) if ordered[i].logits is None
             and not (len(kept) and _surely_suppressed(ordered[i], kept, overlap)))
    return list(islice(found, AHEAD))


def _closer(c: Candidate, logits: Floats, frame: Frame) -> Candidate:
    """The candidate with bounds from the model's frame, which is finer than low-resolution cells."""
    inside, size = at_model(logits, frame, Window(0, 0, frame.prompt_width, frame.prompt_height)), frame.prompt_size
    positive = positive_cells(inside, 0)
    if positive is None:
        return c
    return replace(c, inner=_inner_bound(inside, frame, size), outer=_outer_bound(positive, frame, size))


def tight_box(shape: Shape) -> Box | None:
    """x0, y0, x1, y1 of the outermost pixels (inclusive, as in the official generator), or None for an empty mask."""
    rows, columns = np.flatnonzero(shape.mask.any(1)), np.flatnonzero(shape.mask.any(0))
    if not len(rows):
        return None
    x, y = shape.window.x0, shape.window.y0
    return int(columns[0]) + x, int(rows[0]) + y, int(columns[-1]) + x, int(rows[-1]) + y


def iou(box: Any, boxes: Boxes) -> NDArray[np.float64]:
    """IoU of one box with many, (K,): areas are (x1 - x0)(y1 - y0); two boxes without area overlap by 0."""
    inter, area, areas = _overlap(box, boxes)
    union = area + areas - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def suppress(boxes: Boxes, scores: NDArray[np.float64], overlap: float) -> list[int]:
    """Indices that greedy suppression keeps, best first; equal scores in their order."""
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    for i in order.tolist():
        if not kept or not (iou(boxes[i], boxes[kept]) > overlap).any():
            kept.append(i)
    return kept


def _overlap(box: Any, boxes: Boxes) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
    x0, y0, x1, y1 = box
    w = np.minimum(boxes[:, 2], x1) - np.maximum(boxes[:, 0], x0)
    h = np.minimum(boxes[:, 3], y1) - np.maximum(boxes[:, 1], y0)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.maximum(w, 0) * np.maximum(h, 0), float(max(0, x1 - x0) * max(0, y1 - y0)), areas


def _surely_suppressed(c: Candidate, kept: Boxes, overlap: float) -> bool:
    """A lower bound of the IoU already exceeds the threshold: least intersection over largest union."""
    inter, _, areas = _overlap(c.inner, kept)
    x0, y0, x1, y1 = c.outer
    union = (x1 - x0) * (y1 - y0) + areas - inter
    return bool((inter > overlap * union).any())


def _surely_unstable(inner: int, outer: int, least: float) -> bool:
    """Counting n cells instead of pixels errs like n^-3/4 for a smooth outline; four deviations are allowed."""
    if outer == 0:
        # A mask thinner than one cell: only the photo's pixels could tell, and there it is empty too.
        return True
    return bool(inner / outer < least - (0.01 + 2.2 * outer ** -0.75))


def _content(frame: Frame, m: int) -> tuple[int, int]:
    """Rows and columns of low-resolution cells that touch the photo."""
    return -(-frame.prompt_height * m // frame.prompt_size), -(-frame.prompt_width * m // frame.prompt_size)


def _reached(frame: Frame, m: int) -> tuple[int, int]:
    """Rows and columns of cells that the photo's pixels are interpolated from: the last ones may lie beside it."""
    size = frame.prompt_size
    rows, columns = (min(m, ((2 * covered - 1) * m - size) // (2 * size) + 2)
                     for covered in (frame.prompt_height, frame.prompt_width))
    return rows, columns


def _inner_bound(inside: Floats, frame: Frame, m: int) -> tuple[float, float, float, float]:
    """A box that the mask's box surely contains; without area where nothing is sure.

    One positive cell promises no positive pixel, since no pixel lies on its centre. Between the centres of four
    positive neighbours every pixel is positive, and with three frame pixels there a photo pixel surely lies between.
    With cubic interpolation nothing is sure.
    """
    if frame.upscale == "cubic":
        return 0, 0, -1, -1
    sx, sy = frame.width / frame.prompt_width, frame.height / frame.prompt_height
    blocks = np.minimum(np.minimum(inside[:-1, :-1], inside[1:, :-1]), np.minimum(inside[:-1, 1:], inside[1:, 1:]))
    cells = positive_cells(blocks, 0) if blocks.size and min(sx, sy) > 0.5 else None
    if cells is None:
        return 0, 0, -1, -1
    cell = frame.prompt_size / m
    return ((cells.x0 + 0.625) * cell * sx + 1, (cells.y0 + 0.625) * cell * sy + 1,
            min(frame.width - 1, (cells.x1 + 0.375) * cell * sx) - 2,
            min(frame.height - 1, (cells.y1 + 0.375) * cell * sy) - 2)


def _outer_bound(cells: Window, frame: Frame, m: int) -> tuple[float, float, float, float]:
    """A box that surely contains the mask's: it ends before the centres of the cells beside the positive ones."""
    cell = frame.prompt_size / m
    sx, sy = frame.width / frame.prompt_width, frame.height / frame.prompt_height
    return (max(0, ((cells.x0 - 0.5) * cell - 1) * sx - 1), max(0, ((cells.y0 - 0.5) * cell - 1) * sy - 1),
            min(frame.width - 1, ((cells.x1 + 0.5) * cell + 1) * sx),
            min(frame.height - 1, ((cells.y1 + 0.5) * cell + 1) * sy))


def _grown(cells: Window, m: int) -> tuple[slice, slice]:
    return (slice(max(0, cells.y0 - REACH), min(m, cells.y1 + REACH)),
            slice(max(0, cells.x0 - REACH), min(m, cells.x1 + REACH)))


def _cut(logits: Floats, cells: Window) -> NDArray[np.float16]:
    """float16 keeps every sign, and moves a border by less than a thousandth of a cell."""
    return np.clip(logits[_grown(cells, len(logits))], -6e4, 6e4).astype(np.float16)


def restore(c: Candidate, m: int) -> Floats:
    """The (4h, 4w) logits of a candidate that still has them, far below 0 outside its window."""
    assert c.logits is not None
    if c.logits.shape == (m, m):
        return c.logits.astype(np.float32)
    full = np.full((m, m), OUTSIDE, np.float32)
    full[_grown(c.cells, m)] = c.logits
    return full
