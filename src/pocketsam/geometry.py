"""Frames and resampling between the photo and the model: the reference that ports to other languages follow.

Three frames: *image* (H x W pixels of the photo), *model* (S x S encoder input) and *low-res* (4h x 4w logits).
Coordinates are XY in continuous pixels, with pixel (0, 0) covering [0, 1) x [0, 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketsam.images import Rgb
from pocketsam.specs import ModelSpec

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

# A band of this size stays in the processor's cache while it is resized.
BAND_PIXELS = 1_500_000
RESIZE_THREADS = 2


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
        out[0, :h, :w] = np.rint(_float_resize(rgb, h, w, antialias=False))
    else:
        out[0, :h, :w] = _pillow_resize(rgb, h, w)
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
    out[0, :h, :w] = _float_resize(rgb, h, w, antialias=spec.resampling == "antialias")
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
    for y, row in enumerate(_image_rows(low_res, frame)):
        out[y] = row
    return out


def masks_from_logits(low_res: Floats, frame: Frame) -> Bools:
    """float32 (M, 4h, 4w) logits -> bool (M, H, W): the logit threshold is 0, that is probability 0.5.

    Thresholded row by row, so that a 12-megapixel mask never exists as 48 MB of floats.
    """
    out = np.empty((len(low_res), frame.height, frame.width), np.bool_)
    for i, logits in enumerate(low_res):
        for y, row in enumerate(_image_rows(logits, frame)):
            np.greater(row, 0, out=out[i, y])
    return out


def _image_rows(low_res: Floats, frame: Frame) -> Iterator[Floats]:
    """Rows of the logits at image size, one after the other in a buffer that is reused."""
    if frame.upscale == "cubic":
        return _cubic_rows(_cubic_columns(low_res, frame.width), frame.height)
    if frame.upscale == "frame":
        low_res = _resize(low_res, frame.prompt_size, frame.prompt_size, frame.prompt_height, frame.prompt_width)
    return _rows(_columns(low_res, frame.width, frame.width), frame.height, frame.height)


def _pillow_resize(rgb: Rgb, height: int, width: int) -> Rgb:
    """Pillow's two passes, the horizontal one in bands: the same bytes, without a second copy of a large photo."""
    if rgb.shape[:2] == (height, width):
        return rgb
    bands = max(1, rgb.shape[0] * rgb.shape[1] // BAND_PIXELS)
    narrow = np.empty((rgb.shape[0], width, 3), np.uint8)
    edges = np.linspace(0, rgb.shape[0], bands + 1).astype(int)

    def squeeze(top: int, bottom: int) -> None:
        band = Image.fromarray(rgb[top:bottom])
        narrow[top:bottom] = np.asarray(band.resize((width, bottom - top), Image.Resampling.BILINEAR))

    # Pillow resizes without the interpreter lock, so two bands at a time take little more time than one.
    with ThreadPoolExecutor(RESIZE_THREADS) as pool:
        list(pool.map(squeeze, edges[:-1].tolist(), edges[1:].tolist()))
    return np.asarray(Image.fromarray(narrow).resize((width, height), Image.Resampling.BILINEAR))


def _float_resize(rgb: Rgb, height: int, width: int, antialias: bool) -> Floats:
    """Bilinear on floats, channel by channel; Pillow's filter in floating point is torch's antialiased one."""
    out = np.empty((height, width, 3), np.float32)
    for c in range(3):
        plane = rgb[..., c].astype(np.float32)
        if antialias:
            out[..., c] = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
        else:
            out[..., c] = _resize(plane, height, width, height, width)
    return out


def _resize(x: Floats, height: int, width: int, keep_height: int, keep_width: int) -> Floats:
    """Bilinear (half-pixel centres, no antialiasing) to (height, width), returning the top-left kept part."""
    return np.stack([row.copy() for row in _rows(_columns(x, width, keep_width), height, keep_height)])


def _columns(x: Floats, full: int, keep: int) -> Floats:
    """Interpolate along each row from w to ``full`` columns, of which the first ``keep`` are made."""
    h, w = x.shape
    if full == w:
        return x[:, :keep]
    if full > w:
        # For enlargement Pillow's triangle filter is this interpolation, and it runs in C.
        image = Image.fromarray(np.ascontiguousarray(x, np.float32))
        return np.asarray(image.resize((keep, h), Image.Resampling.BILINEAR, box=(0.0, 0.0, keep * w / full, float(h))))
    low, high, weight = _neighbours(w, full, keep)
    out: Floats = x[:, low] * (1 - weight) + x[:, high] * weight
    return out


def _rows(x: Floats, full: int, keep: int) -> Iterator[Floats]:
    """Interpolate between rows from h to ``full`` rows and yield the first ``keep``; the buffer is reused."""
    low, high, weight = _neighbours(len(x), full, keep)
    row, part = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
    for a, b, t in zip(low.tolist(), high.tolist(), weight.tolist(), strict=True):
        np.multiply(x[a], np.float32(1 - t), out=row)
        np.multiply(x[b], np.float32(t), out=part)
        np.add(row, part, out=row)
        yield row


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


def _cubic_columns(x: Floats, full: int) -> Floats:
    """Cubic interpolation along each row to ``full`` columns."""
    index, weight = _taps(x.shape[1], full)
    out: Floats = np.einsum("hkw,kw->hw", x[:, index], weight)
    return out


def _cubic_rows(x: Floats, full: int) -> Iterator[Floats]:
    """Cubic interpolation between rows to ``full`` rows."""
    index, weight = _taps(len(x), full)
    for i, w in zip(index.T, weight.T, strict=True):
        yield w @ x[i]
