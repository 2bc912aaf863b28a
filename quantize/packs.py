"""Images of a pack for calibration; one that is damaged is left out and named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pocketsam.errors import ImageError, LabelError, UsageError
from pocketsam.images import Rgb, load_rgb
from pocketsam.labelled import UNUSABLE, Pack


def is_pack(path: Path) -> bool:
    """Whether a path is an uncompressed tar file; its contents are checked when it is read."""
    if not path.is_file():
        return False
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def pack_images(path: Path, count: int, rng: np.random.Generator) -> tuple[list[Rgb], list[str]]:
    """Up to ``count`` images, drawn at random if there are more, and what could not be read.

    Raises:
        LabelError: not a pack. UsageError: it holds no image. ImageError: no image can be read.
    """
    images: list[Rgb] = []
    skipped: list[str] = []
    with Pack.open(path) as pack:
        if not pack.rows:
            raise UsageError(f"{path} holds no image.")
        for i in rng.permutation(len(pack.rows)) if len(pack.rows) > count else range(len(pack.rows)):
            if len(images) == count:
                break
            try:
                images.append(load_rgb(Image.open(io.BytesIO(pack.photo(pack.rows[i])))))
            except (ImageError, LabelError, *UNUSABLE) as e:
                skipped.append(f"{pack.rows[i]['id']}.jpg ({e})")
    if not images:
        raise ImageError(f"none of the {len(pack.rows)} images in {path} can be read.")
    return images, skipped
