"""Opening images as a viewer would show them: orientation, grey, palette, alpha, 16 bit, CMYK -> uint8 RGB."""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pocketsam.errors import ImageError, UsageError
from pocketsam.files import is_litter

ImageLike = str | Path | Image.Image | NDArray[Any]
Rgb = NDArray[np.uint8]

# What Pillow opens at most by default, twice its ``MAX_IMAGE_PIXELS``: 512 MiB as RGB.
MAX_PIXELS = 178_956_970
# EXIF's number for how the camera was held.
ORIENTATION = 0x0112
_filters = threading.Lock()
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def photos_in(path: Path) -> list[Path]:
    """A photo, or the sorted photos of a folder.

    Raises:
        UsageError: the folder holds no JPEG, PNG, WebP or BMP image.
        ImageError: the path does not exist or cannot be read.
    """
    try:
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise ImageError(f"{path} does not exist; expected a photo or a folder of photos.")
        found = sorted(p for p in path.iterdir()
                       if p.suffix.lower() in SUFFIXES and not is_litter(p.name) and p.is_file())
    except OSError as e:
        raise ImageError(f"{path} cannot be opened ({e.strerror}); check the path.") from e
    if not found:
        raise UsageError(f"{path} holds no JPEG, PNG, WebP or BMP image.")
    return found


def load_rgb(image: ImageLike) -> Rgb:
    """Any accepted image as uint8 (H, W, 3) RGB.

    Args:
        image: a path, a PIL image (its EXIF orientation is honoured), or a uint8 (H, W, 3) RGB array.

    Raises:
        ImageError: unreadable, truncated, too large, a folder, or an array of another dtype or shape.
    """
    if isinstance(image, np.ndarray):
        return _check_array(image)
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the PIL image")
    if not isinstance(image, (str, Path)):
        raise ImageError(f"image is a {type(image).__name__}; expected a path, a PIL image or a uint8 (H, W, 3) array.")
    path = Path(image)
    _check_path(path)
    return _read(path, str(path))


def load_photo(path: Path) -> tuple[Rgb, str]:
    """A file as uint8 (H, W, 3) RGB, and the sha256 of its bytes, which are read once: both are of the same photo even
    if the file changes meanwhile.

    Raises:
        ImageError: as for :func:`load_rgb`.
    """
    _check_path(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ImageError(f"{path} cannot be opened ({e.strerror}); check the image path.") from e
    return _read(io.BytesIO(data), str(path)), hashlib.sha256(data).hexdigest()


def _read(source: Path | io.BytesIO, name: str) -> Rgb:
    try:
        with _opened(source) as opened:
            return _to_rgb(opened, name, own=True)
    except ImageError:
        raise
    except Image.DecompressionBombError as e:
        # The limit may be one that the program set.
        raise ImageError(f"{name} has too many megapixels ({e}); scale it down before segmenting.") from e
    except UnidentifiedImageError as e:
        raise ImageError(f"{name} is not an image in a known format; expected a JPEG, PNG or similar file.") from e
    except Exception as e:  # Pillow raises a dozen unrelated classes for a damaged file
        raise ImageError(f"{name} cannot be read ({e}); the file may be truncated or damaged: copy it again.") from e


def _opened(source: Path | io.BytesIO) -> Image.Image:
    """The size is checked later, against our own limit. Filters of warnings are the process's, so one at a time."""
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(source)


def image_id(rgb: Rgb) -> str:
    """sha256 of shape and RGB bytes: the identity under which an embedding is stored."""
    digest = hashlib.sha256(repr(rgb.shape).encode())
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def _check_path(path: Path) -> None:
    try:
        folder, there = path.is_dir(), path.exists()
    except OSError as e:
        raise ImageError(f"{path} cannot be opened ({e.strerror}); check the image path.") from e
    if folder:
        raise ImageError(f"{path} is a folder, expected an image file.")
    if not there:
        raise ImageError(f"{path} does not exist; check the image path.")


def _too_large(name: str) -> ImageError:
    return ImageError(f"{name} has more than {MAX_PIXELS // 10**6} megapixels; scale it down before segmenting.")


def _check_array(image: NDArray[Any]) -> Rgb:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(f"the image array is {image.dtype} {image.shape}; expected uint8 (H, W, 3) RGB.")
    if 0 in image.shape:
        raise ImageError(f"the image array has shape {image.shape}; expected at least one pixel.")
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise _too_large("the image array")
    return image


def _to_rgb(image: Image.Image, name: str, own: bool = False) -> Rgb:
    """Args:
        own: the image may be changed; a caller's may not.
    """
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name)
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels; expected at least 1 x 1.")
    try:
        if own:
            ImageOps.exif_transpose(image, in_place=True)
        elif image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return np.asarray(_flatten(image, name))
    except ImageError:
        raise
    except Exception as e:  # Pillow raises a dozen unrelated classes for a damaged file
        raise ImageError(f"{name} cannot be decoded ({e}); the file may be truncated or damaged.") from e


def _flatten(image: Image.Image, name: str) -> Image.Image:
    """Convert every mode to RGB; transparency is laid over white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_grey(image, name)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _wide_grey(image: Image.Image, name: str) -> Image.Image:
    """16-bit, 32-bit and float grey to 8 bit; Pillow's own conversion would clip at 255."""
    values = np.asarray(image, dtype=np.float64)
    top = float(values.max())
    if not np.isfinite(values).all() or values.min() < 0 or top > 65535:
        raise ImageError(f"{name} has grey values outside 0..65535; convert it to 8 or 16 bit first.")
    wide = image.mode.startswith("I;16") or top > 255
    full = 1.0 if image.mode == "F" and top <= 1 else 65535.0 if wide else 255.0
    grey = np.rint(values * (255.0 / full)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
