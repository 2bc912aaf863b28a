"""Images of a pack for calibration; one that is damaged is left out and named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pocketsam.errors import ImageError, LabelError, UsageError
from pocketsam.images import Rgb, image_id, load_rgb
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


def pack_images(path: Path, count: int, rng: np.random.Generator) -> tuple[dict[str, Rgb], list[str], int]:
    """Up to ``count`` different images by their digest, drawn at random if there are more, what could not be read, and
    how many copies were met.

    Raises:
        LabelError: not a pack. UsageError: it holds no image. ImageError: no image can be read.
    """
    found: dict[str, Rgb] = {}
    skipped: list[str] = []
    copies = 0
    with Pack.open(path) as pack:
        if not pack.rows:
            raise UsageError(f"{path} holds no image.")
        for i in rng.permutation(len(pack.rows)) if len(pack.rows) > count else range(len(pack.rows)):
            if len(found) == count:
                break
            try:
                image = load_rgb(Image.open(io.BytesIO(pack.photo(pack.rows[i]))))
            except (ImageError, LabelError, *UNUSABLE) as e:
                skipped.append(f"{pack.rows[i]['id']}.jpg ({e})")
                continue
            copies += (digest := image_id(image)) in found
            found.setdefault(digest, image)
    if not found:
        raise ImageError(f"none of the {len(pack.rows)} images in {path} can be read.")
    return found, skipped, copies
