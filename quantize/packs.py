"""Images of a pack for calibration; one that is damaged is left out and named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pocketsam.errors import ImageError, UsageError
from pocketsam.images import Rgb, load_rgb


def is_pack(path: Path) -> bool:
    """Whether a path is a tar file; its contents are checked when it is read."""
    return path.is_file() and tarfile.is_tarfile(path)


def pack_images(path: Path, count: int, rng: np.random.Generator) -> tuple[list[Rgb], list[str]]:
    """Up to ``count`` images, drawn at random if there are more, and what could not be read.

    Raises:
        UsageError: not a pack. ImageError: no image can be read.
    """
    images: list[Rgb] = []
    skipped: list[str] = []
    with _open(path) as tar:
        rows = _index(tar, path)
        for i in rng.permutation(len(rows)) if len(rows) > count else range(len(rows)):
            if len(images) == count:
                break
            name = f"{rows[i]['id']}.jpg"
            try:
                images.append(_image(tar, name))
            except ImageError as e:
                skipped.append(f"{name} ({e})")
    if not images:
        raise ImageError(f"none of the {len(rows)} images in {path} can be read.")
    return images, skipped


def _open(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except (OSError, tarfile.TarError) as e:
        raise UsageError(f"{path} cannot be read as a pack ({e}); expected a tar with index.json.") from e


def _index(tar: tarfile.TarFile, path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads(_bytes(tar, "index.json"))
    except (KeyError, ValueError) as e:
        raise UsageError(f"{path} is not a pack: it has no readable index.json.") from e
    if not rows:
        raise UsageError(f"{path} holds no image.")
    return rows


def _image(tar: tarfile.TarFile, name: str) -> Rgb:
    try:
        return load_rgb(Image.open(io.BytesIO(_bytes(tar, name))))
    except (KeyError, OSError) as e:
        raise ImageError(f"{name} cannot be read ({e})") from e


def _bytes(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    if stream is None:
        raise KeyError(name)
    return stream.read()
