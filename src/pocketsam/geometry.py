"""Frames and resampling between the photo and the model: the reference that ports to other languages follow.

Three frames: *image* (H x W pixels of the photo), *model* (S x S encoder input) and *low-res* (4h x 4w logits).
Coordinates are XY in continuous pixels, with pixel (0, 0) covering [0, 1) x [0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketsam.images import Rgb
from pocketsam.specs import ModelSpec

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Frame:
    """How one image lies in the S x S model frame.

    Attributes:
        height, width: image size in pixels.
        content_height, content_width: the part of the S x S frame that the image covers, from the top left.
        size: S.
    """

    height: int
    width: int
    content_height: int
    content_width: int
    size: int

    @classmethod
    def of(cls, height: int, width: int, spec: ModelSpec) -> Frame:
        """Place an image: ``pad`` scales the long side to S (official ``ResizeLongestSide``), ``squash`` both sides."""
        s = spec.image_size
        if spec.resize == "squash":
            return cls(height, width, s, s, s)
        scale = s / max(height, width)
        return cls(height, width, max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)), s)

    def to_model(self, points: NDArray[Any]) -> Floats:
        """(..., 2) XY in the image frame -> float32 (..., 2) XY in the model frame."""
        scale = np.array([self.content_width / self.width, self.content_height / self.height])
        return (np.asarray(points, np.float64) * scale).astype(np.float32)


def to_model_image(rgb: Rgb, frame: Frame, spec: ModelSpec) -> Rgb:
    """Resize with Pillow's antialiased bilinear filter and pad right and bottom with the rounded mean colour.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        uint8 (1, S, S, 3).
    """
    size = (frame.content_width, frame.content_height)
    content = Image.fromarray(rgb)
    if content.size != size:
        content = content.resize(size, Image.Resampling.BILINEAR)
    out = np.empty((1, frame.size, frame.size, 3), np.uint8)
    h, w = frame.content_height, frame.content_width
    out[0, :h, :w] = np.asarray(content)
    out[0, h:] = spec.pad_color
    out[0, :h, w:] = spec.pad_color
    return out


def upscale_logits(low_res: Floats, frame: Frame) -> Floats:
    """Low-resolution logits to the image frame, exactly as the official predictor does it.

    Bilinear without antialiasing to S x S, crop to the content, bilinear to H x W (``postprocess_masks``).

    Args:
        low_res: float32 (4h, 4w).

    Returns:
        float32 (H, W).
    """
    at_model = _resize(low_res, frame.size, frame.size, frame.content_height, frame.content_width)
    return _resize(at_model, frame.height, frame.width, frame.height, frame.width)


def masks_from_logits(low_res: Floats, frame: Frame) -> Bools:
    """float32 (M, 4h, 4w) logits -> bool (M, H, W): the logit threshold is 0, that is probability 0.5."""
    out = np.empty((len(low_res), frame.height, frame.width), np.bool_)
    for i, logits in enumerate(low_res):
        np.greater(upscale_logits(logits, frame), 0, out=out[i])
    return out


def _resize(x: Floats, height: int, width: int, keep_height: int, keep_width: int) -> Floats:
    """Bilinear (half-pixel centres, no antialiasing) to (height, width), returning the top-left kept part."""
    h, w = x.shape
    if (height, width) == (h, w):
        return x[:keep_height, :keep_width]
    if height >= h and width >= w:
        # For enlargement Pillow's triangle filter is this interpolation, and it runs in C.
        box = (0.0, 0.0, keep_width * w / width, keep_height * h / height)
        image = Image.fromarray(np.ascontiguousarray(x, np.float32))
        return np.asarray(image.resize((keep_width, keep_height), Image.Resampling.BILINEAR, box=box))
    rows = _interpolate(x, height, keep_height)
    return np.ascontiguousarray(_interpolate(np.ascontiguousarray(rows.T), width, keep_width).T)


def _interpolate(x: Floats, full: int, keep: int) -> Floats:
    """Linear interpolation along axis 0 from ``len(x)`` to ``full`` rows, of which the first ``keep`` are made."""
    n = len(x)
    source = np.maximum((np.arange(keep) + 0.5) * (n / full) - 0.5, 0)
    low = np.minimum(source.astype(np.int64), n - 1)
    high = np.minimum(low + 1, n - 1)
    weight = (source - low).astype(np.float32)[:, None]
    out: Floats = x[low] * (1 - weight) + x[high] * weight
    return out
