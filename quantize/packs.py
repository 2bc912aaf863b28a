"""Reading image packs: a flat tar with ``index.json``, ``<id>.jpg`` and one PNG of region ids a layer."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketsam.errors import ImageError, UsageError
from pocketsam.geometry import Bools
from pocketsam.images import Rgb, load_rgb


@dataclass(frozen=True)
class Labelled:
    """One image with regions of known outline.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        regions: bool (R, H, W).
    """

    image: Rgb
    regions: Bools


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


def labelled(path: Path, images: int, regions: int, seed: int = 0) -> Iterator[Labelled]:
    """Images spread evenly over a pack, each with up to ``regions`` regions drawn from all its layers.

    Args:
        images: at most this many. regions: at most this many of each, none smaller than 0.2 % of the image.

    Raises:
        UsageError: not a pack, or none of its images has a region.
    """
    rng = np.random.default_rng(seed)
    found = False
    with _open(path) as tar:
        rows = [r for r in _index(tar, path) if r.get("layers")]
        step = max(1, len(rows) // images)
        for row in rows[::step][:images]:
            masks = _regions(tar, row, regions, rng)
            if masks:
                found = True
                yield Labelled(_image(tar, f"{row['id']}.jpg"), np.stack(masks))
    if not found:
        raise UsageError(f"{path} has no labelled region; a labelled pack is needed to measure retention.")


def _regions(tar: tarfile.TarFile, row: dict[str, Any], most: int, rng: np.random.Generator) -> list[NDArray[np.bool_]]:
    ids = []
    for layer in row["layers"]:
        labels = np.asarray(Image.open(io.BytesIO(_bytes(tar, layer["file"]))))
        values, counts = np.unique(labels, return_counts=True)
        ids += [(labels, v) for v, n in zip(values, counts, strict=True) if v > 0 and n >= labels.size * 0.002]
    order = rng.permutation(len(ids))[:most]
    return [ids[i][0] == ids[i][1] for i in order]


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
