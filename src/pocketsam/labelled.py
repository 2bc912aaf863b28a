"""Labelled image packs: an uncompressed tar with ``index.json``, ``<id>.jpg`` and PNG layers of region ids."""

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

from pocketsam.errors import LabelError
from pocketsam.images import Rgb

Regions = NDArray[np.int32]
# What a damaged tar, index or picture raises.
UNUSABLE = (OSError, KeyError, ValueError, TypeError, RecursionError, tarfile.TarError)


@dataclass(frozen=True)
class Labelled:
    """One photo with its annotations.

    Attributes:
        id, source: from the index.
        image: uint8 (H, W, 3) RGB.
        layers: int32 (H, W) region ids each, 0 is unknown or background; one layer per annotator or kind.
    """

    id: str
    source: str
    image: Rgb
    layers: tuple[Regions, ...]


def read_pack(path: Path, source: str | None = None, limit: int | None = None) -> Iterator[Labelled]:
    """Decode a pack, one photo at a time, in the order of its index.

    Args:
        source: only photos whose source begins with this.
        limit: at most this many photos, spread evenly over the index.

    Raises:
        LabelError: the file is not such a pack.
    """
    try:
        with tarfile.open(path) as tar:
            rows = _index(tar)
            rows = [r for r in rows if source is None or str(r["source"]).lower().startswith(source.lower())]
            if limit is not None and limit < len(rows):
                rows = [rows[i * len(rows) // limit] for i in range(limit)]
            for row in rows:
                yield _decode(tar, row)
    except UNUSABLE as e:
        raise _refusal(path, e) from e


def count_photos(path: Path) -> tuple[int, int]:
    """Photos of a pack, and how many of them have at least one layer of regions.

    Raises:
        LabelError: the file is not such a pack.
    """
    try:
        with tarfile.open(path) as tar:
            rows = _index(tar)
            return len(rows), sum(bool(len(r["layers"])) for r in rows)
    except UNUSABLE as e:
        raise _refusal(path, e) from e


def boxes_of(sample: Labelled) -> NDArray[np.float64]:
    """Boxes of all regions of all layers: float64 (K, 4) x0, y0, x1, y1 of the outermost pixels, inclusive."""
    found = []
    for layer in sample.layers:
        for k in range(1, int(layer.max()) + 1):
            rows, columns = np.flatnonzero((layer == k).any(1)), np.flatnonzero((layer == k).any(0))
            if len(rows):
                found.append((columns[0], rows[0], columns[-1], rows[-1]))
    return np.array(found, np.float64).reshape(-1, 4)


def _index(tar: tarfile.TarFile) -> list[dict[str, Any]]:
    rows = json.loads(_member(tar, "index.json"))
    if not isinstance(rows, list):
        raise TypeError("index.json is not a list")
    return rows


def _refusal(path: Path, reason: Exception) -> LabelError:
    return LabelError(f"{path} cannot be used as a labelled pack ({reason}); expected a tar with index.json, photos "
                      "and layers.")


def _decode(tar: tarfile.TarFile, row: dict[str, Any]) -> Labelled:
    image = np.asarray(Image.open(io.BytesIO(_member(tar, f"{row['id']}.jpg"))).convert("RGB"))
    layers = tuple(np.asarray(Image.open(io.BytesIO(_member(tar, x["file"])))).astype(np.int32) for x in row["layers"])
    return Labelled(str(row["id"]), str(row["source"]), image, layers)


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    if stream is None:
        raise ValueError(f"{name} is not a file")
    return stream.read()
