"""Labelled image packs: an uncompressed tar with ``index.json``, ``<id>.jpg`` and PNG layers of region ids."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketsam.errors import LabelError
from pocketsam.files import sha256_file
from pocketsam.images import Rgb

Regions = NDArray[np.int32]
# What a damaged tar, index or picture raises.
UNUSABLE = (OSError, EOFError, KeyError, ValueError, TypeError, SyntaxError, RecursionError, tarfile.TarError,
            Image.DecompressionBombError)


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


@dataclass(frozen=True)
class Stored:
    """One photo as the pack holds it, so that decoding can be left to other threads.

    Attributes:
        pack: path of the tar.
        row: of the index.
        image: a JPEG.
        layers: PNGs.
    """

    pack: Path
    row: dict[str, Any]
    image: bytes
    layers: tuple[bytes, ...]

    def decode(self) -> Labelled:
        """The pictures.

        Raises:
            LabelError: one of them is damaged.
        """
        with _readable(self.pack):
            image = np.asarray(Image.open(io.BytesIO(self.image)).convert("RGB"))
            layers = tuple(np.asarray(Image.open(io.BytesIO(x))).astype(np.int32) for x in self.layers)
            return Labelled(str(self.row["id"]), str(self.row["source"]), image, layers)


class Pack:
    """An open pack; whatever is wrong with it is a LabelError.

    Attributes:
        rows: of ``index.json``: ``id``, ``source`` and ``layers`` with a ``file`` each.
    """

    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self.path, self._tar = path, tar
        with _readable(self.path):
            rows = json.loads(self._member("index.json"))
            if not isinstance(rows, list) or not all(isinstance(r, dict) and "id" in r for r in rows):
                raise TypeError("index.json is not a list of photos")
        self.rows: list[dict[str, Any]] = rows

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Pack]:
        """Open a tar for as long as the block runs.

        Raises:
            LabelError: the file is not such a pack.
        """
        with ExitStack() as stack:
            with _readable(path):
                tar = stack.enter_context(tarfile.open(path, "r:"))
            yield cls(path, tar)

    def chosen(self, source: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Rows whose source begins with ``source``; at most ``limit`` of them, spread evenly."""
        with _readable(self.path):
            rows = [r for r in self.rows if source is None or str(r["source"]).lower().startswith(source.lower())]
        if limit is not None and limit < len(rows):
            rows = [rows[i * len(rows) // limit] for i in range(limit)]
        return rows

    def photo(self, row: dict[str, Any]) -> bytes:
        """The JPEG of a row."""
        with _readable(self.path):
            return self._member(f"{row['id']}.jpg")

    def stored(self, row: dict[str, Any]) -> Stored:
        """The JPEG and all layers of a row."""
        with _readable(self.path):
            return Stored(self.path, row, self.photo(row), tuple(self._member(x["file"]) for x in row["layers"]))

    def _member(self, name: str) -> bytes:
        stream = self._tar.extractfile(name)
        if stream is None:
            raise ValueError(f"{name} is not a file")
        return stream.read()


def read_stored(path: Path, source: str | None = None, limit: int | None = None) -> Iterator[Stored]:
    """What a pack holds, one photo at a time, in the order of its index.

    Args:
        source: only photos whose source begins with this.
        limit: at most this many photos, spread evenly over the index.

    Raises:
        LabelError: the file is not such a pack.
    """
    with Pack.open(path) as pack:
        for row in pack.chosen(source, limit):
            yield pack.stored(row)


def read_pack(path: Path, source: str | None = None, limit: int | None = None) -> Iterator[Labelled]:
    """As :func:`read_stored`, decoded."""
    for stored in read_stored(path, source, limit):
        yield stored.decode()


def count_photos(path: Path) -> tuple[int, int]:
    """Photos of a pack, and how many of them have at least one layer of regions.

    Raises:
        LabelError: the file is not such a pack.
    """
    with Pack.open(path) as pack, _readable(path):
        return len(pack.rows), sum(bool(len(r["layers"])) for r in pack.rows)


def identity(path: Path) -> str:
    """Hex sha256 of a pack: what was made from it belongs to these bytes.

    Raises:
        LabelError: the file cannot be read.
    """
    with _readable(path):
        return sha256_file(path)


def boxes_of(sample: Labelled) -> NDArray[np.float64]:
    """Boxes of all regions of all layers: float64 (K, 4) x0, y0, x1, y1 of the outermost pixels, inclusive."""
    found = []
    for layer in sample.layers:
        for k in range(1, int(layer.max()) + 1):
            rows, columns = np.flatnonzero((layer == k).any(1)), np.flatnonzero((layer == k).any(0))
            if len(rows):
                found.append((columns[0], rows[0], columns[-1], rows[-1]))
    return np.array(found, np.float64).reshape(-1, 4)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever is wrong with a pack is a LabelError."""
    try:
        yield
    except UNUSABLE as e:
        raise LabelError(f"{path} cannot be used as a pack ({e}); expected an uncompressed tar with index.json, "
                         "photos and layers.") from e
