"""Prompts in image pixels, checked and laid into the decoder's fixed slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pocketsam.errors import PromptError
from pocketsam.geometry import Frame
from pocketsam.resampling import Floats
from pocketsam.specs import ModelSpec

EMPTY_SLOT, PADDING_POINT, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -2.0, -1.0, 2.0, 3.0


@dataclass(frozen=True)
class Prompt:
    """One object's prompt in image coordinates.

    Attributes:
        points: float64 (K, 2) XY in pixels; empty when there is none.
        labels: float64 (K,), 1 for foreground and 0 for background.
        box: float64 (4,) x0, y0, x1, y1 in pixels, or None.
        mask: float32 (4h, 4w) logits in the model's low-resolution frame, or None.
    """

    points: NDArray[np.float64]
    labels: NDArray[np.float64]
    box: NDArray[np.float64] | None
    mask: Floats | None

    @classmethod
    def of(cls, frame: Frame, spec: ModelSpec, points: ArrayLike | None = None, labels: ArrayLike | None = None,
           box: ArrayLike | None = None, mask: ArrayLike | None = None) -> Prompt:
        """Check user input against an image.

        Raises:
            PromptError: nothing given, wrong shapes, values outside the image, NaN, or labels other than 0 and 1.
        """
        if points is None and box is None and mask is None:
            raise PromptError("no prompt was given; pass at least one point, a box or a mask.")
        if mask is not None and not spec.mask_prompt:
            raise PromptError(f"{spec.name} takes no mask prompt; pass points or a box.")
        p, lab = _points(points, labels, frame)
        return cls(p, lab, None if box is None else _box(box, frame), None if mask is None else _mask(mask, spec))

    @property
    def single_click(self) -> bool:
        """One point and nothing else: the ambiguous case."""
        return len(self.points) == 1 and self.box is None and self.mask is None

    def tokens(self, frame: Frame, spec: ModelSpec) -> tuple[Floats, Floats]:
        """(N, 2) XY in the prompt frame and (N,) labels, in the family's order and with its padding points.

        Raises:
            PromptError: more points than the family takes.
        """
        parts = [(frame.to_model(self.points), self.labels)]
        if self.box is not None:
            corners = (frame.to_model(self.box.reshape(2, 2)), np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]))
            parts.insert(0 if spec.box_first else 1, corners)
        used = sum(len(labels) for _, labels in parts)
        if spec.max_points and used > spec.max_points:
            raise PromptError(f"{spec.name} takes at most {spec.max_points} points (a box counts as two) and {used} "
                              "were given; give fewer.")
        padding = self._padding(used, spec)
        # The place of a padding point matters only where it keeps its positional encoding: EfficientSAM's is (-1, -1).
        parts.append((np.full((padding, 2), -1.0, np.float32), np.full(padding, PADDING_POINT)))
        return np.concatenate([c for c, _ in parts]), np.concatenate([v for _, v in parts]).astype(np.float32)

    def _padding(self, used: int, spec: ModelSpec) -> int:
        if spec.padding == "fill":
            return spec.max_points - used
        return int(used > 0 and (spec.padding == "always" or self.box is None))


def middle_click(spec: ModelSpec, slots: int) -> dict[str, Floats]:
    """``decoder_inputs`` of one click in the middle of a square photo: what timings prompt with."""
    side = spec.image_size
    frame = Frame.of(side, side, spec)
    return decoder_inputs([Prompt.of(frame, spec, points=[(side / 2, side / 2)], labels=[1])], frame, spec, slots)


def decoder_inputs(prompts: Sequence[Prompt], frame: Frame, spec: ModelSpec, slots: int) -> dict[str, Floats]:
    """Lay prompts into the decoder's inputs, without the image features.

    Returns:
        point_coords (B, slots, 2), point_labels (B, slots) and, where the model takes masks, mask_input (B, 1, 4h, 4w)
        and has_mask_input (B,).

    Raises:
        PromptError: a prompt needs more than ``slots`` slots.
    """
    b, m = len(prompts), spec.mask_size
    coords = np.zeros((b, slots, 2), np.float32)
    labels = np.full((b, slots), EMPTY_SLOT, np.float32)
    mask_input = np.zeros((b, 1, m, m), np.float32)
    has_mask = np.zeros(b, np.float32)
    for i, prompt in enumerate(prompts):
        xy, lab = prompt.tokens(frame, spec)
        if len(lab) > slots:
            extra = "a box takes two slots" if prompt.box is not None else "one slot is the padding point"
            raise PromptError(f"{len(prompt.points)} points need {len(lab)} prompt slots ({extra}) and this decoder "
                              f"has {slots}; give fewer points or export with --slots {len(lab)}.")
        coords[i, :len(lab)], labels[i, :len(lab)] = xy, lab
        if prompt.mask is not None:
            mask_input[i, 0], has_mask[i] = prompt.mask, 1
    points = {"point_coords": coords, "point_labels": labels}
    return {**points, "mask_input": mask_input, "has_mask_input": has_mask} if spec.mask_prompt else points


def float_array(value: Any, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """User input as finite float64 numbers of a shape, in which -1 stands for any size.

    Raises:
        PromptError: ragged, not numeric, not finite, or of another shape.
    """
    expected = f"({', '.join('K' if n < 0 else str(n) for n in shape)}{',' if len(shape) == 1 else ''})"
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError) as e:
        raise PromptError(f"{name} is no array of numbers; expected shape {expected}.") from e
    if array.ndim != len(shape) or any(n >= 0 and n != got for n, got in zip(shape, array.shape, strict=True)):
        raise PromptError(f"{name} has shape {array.shape}; expected {expected}.")
    if not np.isfinite(array).all():
        raise PromptError(f"{name} contains NaN or infinity; expected finite numbers.")
    return array


def _points(points: ArrayLike | None, labels: ArrayLike | None,
            frame: Frame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if points is None:
        if labels is not None:
            raise PromptError("labels were given without points; pass one label for each point.")
        return np.empty((0, 2)), np.empty(0)
    p = float_array(points, "points", (-1, 2))
    if not len(p):
        raise PromptError("points is empty; pass at least one x,y pair or leave points out.")
    outside = (p < 0).any(1) | (p[:, 0] >= frame.width) | (p[:, 1] >= frame.height)
    if outside.any():
        x, y = p[outside][0]
        raise PromptError(f"point ({x:g}, {y:g}) is outside the image of {frame.width} x {frame.height} pixels; "
                          "points are x,y from the top left.")
    lab = np.ones(len(p)) if labels is None else float_array(labels, "labels", (-1,))
    if len(lab) != len(p):
        raise PromptError(f"{len(lab)} labels were given for {len(p)} points; pass one label for each point.")
    if not np.isin(lab, (0, 1)).all():
        raise PromptError(f"label {lab[~np.isin(lab, (0, 1))][0]:g} is not a point label; "
                          "use 1 for foreground and 0 for background.")
    return p, lab


def _box(box: ArrayLike, frame: Frame) -> NDArray[np.float64]:
    b = float_array(box, "box", (4,))
    x0, y0, x1, y1 = b
    if x1 <= x0 or y1 <= y0:
        raise PromptError(f"box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) is empty; "
                          "expected x0,y0,x1,y1 with x1 > x0 and y1 > y0.")
    if x0 < 0 or y0 < 0 or x1 > frame.width or y1 > frame.height:
        raise PromptError(f"box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) leaves the image of {frame.width} x {frame.height} "
                          "pixels; clip it to the image first.")
    return b


def _mask(mask: ArrayLike, spec: ModelSpec) -> Floats:
    m = spec.mask_size
    try:
        array = np.asarray(mask)
    except ValueError as e:
        raise PromptError(f"the mask prompt is no array; expected float logits ({m}, {m}).") from e
    if array.shape == (1, m, m):
        array = array[0]
    if array.shape != (m, m) or array.dtype.kind != "f":
        raise PromptError(f"the mask prompt is {array.dtype} {array.shape}; expected float logits ({m}, {m}), "
                          "such as a row of an earlier result's logits.")
    with np.errstate(over="ignore"):
        logits = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(logits).all():
        raise PromptError("the mask prompt contains NaN, infinity or what is too large for float32; expected finite "
                          "logits.")
    return logits
