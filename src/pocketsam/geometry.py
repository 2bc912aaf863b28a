"""Frames and resampling between the photo and the model: the reference that ports to other languages follow.

Three frames: *image* (H x W pixels of the photo), *model* (S x S encoder input) and *low-res* (4h x 4w logits).
Coordinates are XY in continuous pixels, with pixel (0, 0) covering [0, 1) x [0, 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketsam.images import Rgb
from pocketsam.resampling import (
    Floats,
    cubic_columns,
    cubic_rows,
    float_resize,
    linear_columns,
    linear_resize,
    linear_rows,
    pillow_resize,
)
from pocketsam.specs import ModelSpec

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Frame:
    """How one image lies in the S x S model frame.

    Attributes:
        height, width: image size in pixels.
        content_height, content_width: the part of the S x S frame that the image covers, from the top left.
        size: S.
        prompt_height, prompt_width, prompt_size: the same three in the frame of the prompts and of mask upscaling.
        upscale: how low-resolution logits reach the image, see ``ModelSpec.upscale``.
    """

    height: int
    width: int
    content_height: int
    content_width: int
    size: int
    prompt_height: int
    prompt_width: int
    prompt_size: int
    upscale: str

    @classmethod
    def of(cls, height: int, width: int, spec: ModelSpec) -> Frame:
        """Place an image: ``pad`` scales the long side to S (official ``ResizeLongestSide``), ``squash`` both sides."""
        def covered(size: int) -> tuple[int, int, int]:
            if spec.resize == "squash":
                return size, size, size
            scale = size / max(height, width)
            return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)), size

        return cls(height, width, *covered(spec.image_size), *covered(spec.frame_size), spec.upscale)

    def to_model(self, points: NDArray[Any]) -> Floats:
        """(..., 2) XY in the image frame -> float32 (..., 2) XY in the prompt frame."""
        scale = np.array([self.prompt_width / self.width, self.prompt_height / self.height])
        scaled: Floats = (np.asarray(points, np.float64) * scale).astype(np.float32)
        return scaled


def to_model_image(rgb: Rgb, frame: Frame, spec: ModelSpec) -> Rgb:
    """Resize with the family's filter, rounded to uint8, and pad right and bottom with the rounded mean colour.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        uint8 (1, S, S, 3).
    """
    h, w = frame.content_height, frame.content_width
    out = np.empty((1, frame.size, frame.size, 3), np.uint8)
    if spec.resampling == "bilinear":
        out[0, :h, :w] = np.rint(float_resize(rgb, h, w, antialias=False))
    else:
        out[0, :h, :w] = pillow_resize(rgb, h, w)
    out[0, h:] = spec.pad_color
    out[0, :h, w:] = spec.pad_color
    return out


def to_exact_image(rgb: Rgb, frame: Frame, spec: ModelSpec) -> Rgb | Floats:
    """The official preprocessing before normalisation, for the PyTorch reference.

    Families that resize in floating point get float32 (1, S, S, 3) on the 0..255 scale; the others are exact in uint8
    already, and get :func:`to_model_image`.
    """
    if spec.resampling == "pillow":
        return to_model_image(rgb, frame, spec)
    out = np.zeros((1, frame.size, frame.size, 3), np.float32)
    h, w = frame.content_height, frame.content_width
    out[0, :h, :w] = float_resize(rgb, h, w, antialias=spec.resampling == "antialias")
    return out


def upscale_logits(low_res: Floats, frame: Frame) -> Floats:
    """Low-resolution logits to the image frame, exactly as the official predictor does it.

    Without antialiasing: bilinear to the prompt frame, crop to the content, bilinear to H x W (``postprocess_masks``);
    or to H x W at once, bilinear or bicubic, where the frame says so.

    Args:
        low_res: float32 (4h, 4w).

    Returns:
        float32 (H, W).
    """
    out = np.empty((frame.height, frame.width), np.float32)
    for top, block in _image_rows(low_res, frame):
        out[top:top + len(block)] = block
    return out


def masks_from_logits(low_res: Floats, frame: Frame) -> Bools:
    """float32 (M, 4h, 4w) logits -> bool (M, H, W): the logit threshold is 0, that is probability 0.5.

    Thresholded a few rows at a time, so that a 12-megapixel mask never exists as 48 MB of floats.
    """
    out = np.empty((len(low_res), frame.height, frame.width), np.bool_)
    for mask, logits in zip(out, low_res, strict=True):
        for top, block in _image_rows(logits, frame):
            np.greater(block, 0, out=mask[top:top + len(block)])
    return out


def _image_rows(low_res: Floats, frame: Frame) -> Iterator[tuple[int, Floats]]:
    """The logits at image size in blocks of rows, each with the index of its first row."""
    if frame.upscale == "cubic":
        return cubic_rows(cubic_columns(low_res, frame.width), frame.height)
    if frame.upscale == "frame":
        low_res = linear_resize(low_res, frame.prompt_size, frame.prompt_size, frame.prompt_height, frame.prompt_width)
    return linear_rows(linear_columns(low_res, frame.width, frame.width), frame.height, frame.height)


def tight_box(mask: Bools) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a bool (H, W) mask that is not empty, the far sides exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
