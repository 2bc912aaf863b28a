"""Masks drawn over a photo, and saved as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pocketsam.errors import OutputError
from pocketsam.files import staged_file
from pocketsam.geometry import Bools
from pocketsam.images import Rgb

# Okabe and Ito's palette: distinguishable with colour-vision deficiency.
PALETTE = ((0, 158, 115), (230, 159, 0), (86, 180, 233), (213, 94, 0), (204, 121, 167), (240, 228, 66), (0, 114, 178))
ALPHA = 0.5
# Pixels of the longest side that a format takes.
MOST_SIDE = {"WEBP": 16_383, "JPEG": 65_500}
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", "": "PNG"}


def draw(rgb: Rgb, masks: Bools, points: Any = None, labels: Any = None, boxes: Any = None) -> Image.Image:
    """Tint each mask, outline it, and mark the prompts.

    Args:
        rgb: uint8 (H, W, 3).
        masks: bool (M, H, W).
        points, labels: (K, 2) XY pixels and (K,) 1 or 0, drawn as green and red dots.
        boxes: (K, 4) x0, y0, x1, y1.
    """
    out = rgb.copy()
    for i, mask in enumerate(masks):
        colour = np.array(PALETTE[i % len(PALETTE)], np.float32)
        out[mask] = (out[mask] * (1 - ALPHA) + colour * ALPHA).astype(np.uint8)
        out[outline(mask, max(1, max(mask.shape) // 500))] = colour.astype(np.uint8)
    image = Image.fromarray(out)
    pen = ImageDraw.Draw(image)
    size = max(3, max(image.size) // 120)
    edge = max(1, size // 3)
    for box in boxes if boxes is not None else ():
        pen.rectangle([float(v) for v in box], outline=(255, 255, 255), width=edge)
    for k, (x, y) in enumerate(points if points is not None else ()):
        fill = (0, 200, 0) if labels is None or labels[k] else (220, 0, 0)
        pen.ellipse((x - size, y - size, x + size, y + size), fill=fill, outline=(255, 255, 255), width=edge)
    return image


def outline(mask: Any, width: int = 1) -> Any:
    """bool (H, W) -> the mask's pixels within ``width`` of its border."""
    inner = mask.copy()
    for _ in range(width):
        padded = np.pad(inner, 1, constant_values=True)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, JPEG, WebP or BMP, by the file name, atomically; a name without one of these endings gets a PNG.

    Raises:
        OutputError: another ending, a picture too large for its kind, or the place cannot be written.
    """
    check_picture(path)
    kind = PICTURES.get(path.suffix.lower(), "PNG")
    if max(image.size) > MOST_SIDE.get(kind, max(image.size)):
        raise OutputError(f"{path} cannot hold {image.width} x {image.height} pixels: {kind} takes at most "
                          f"{MOST_SIDE[kind]} a side; choose the ending .png.")
    with staged_file(path) as staged:
        image.save(staged, format=kind)


def check_picture(path: Path) -> None:
    """Raises OutputError if a picture of this name cannot be written."""
    if path.suffix.lower() not in PICTURES:
        raise OutputError(f"{path} names no kind of picture that is written here; expected the ending "
                          f"{', '.join(p for p in PICTURES if p)}.")


def save_mask(mask: Any, path: Path) -> None:
    """Write a bool (H, W) mask as an 8-bit PNG with 0 and 255."""
    save_image(Image.fromarray(mask.astype(np.uint8) * 255), path)
