"""Photos with overlapping masks: a folder in COCO format, read one photo at a time and trusted in nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketsam import rle
from pocketsam.errors import ImageError, LabelError
from pocketsam.geometry import Bools
from pocketsam.images import Rgb, load_rgb

NAMES = ("annotations.json", "instances.json")
# Beyond any photo, and far from where sums of coordinates lose a pixel.
FARTHEST = 1e7


@dataclass(frozen=True)
class CocoPhoto:
    """One photo with its annotations, whose masks may overlap.

    Attributes:
        id: of the image row.
        source: the folder's name.
        image: uint8 (H, W, 3) RGB.
        annotations: (id, segmentation) as read, crowds left out; :func:`draw` makes the mask.
    """

    id: str
    source: str
    image: Rgb
    annotations: tuple[tuple[str, Any], ...]


class CocoFolder:
    """A folder with images and one JSON of annotations.

    Attributes:
        photos: number of photos in the JSON.
        left_out: annotations not used, by reason: ``crowd`` or ``no mask``.
    """

    def __init__(self, root: Path) -> None:
        """Read the JSON.

        Raises:
            LabelError: there is no JSON or more than one, it is broken, or it holds no masks.
        """
        self.root = root
        self.file = _find_json(root)
        self.left_out: Counter[str] = Counter()
        try:
            data = json.loads(self.file.read_text(encoding="utf-8"))
            self._rows = {row["id"]: row for row in data["images"]}
            self._annotations: dict[Any, list[tuple[str, Any]]] = {i: [] for i in self._rows}
            for row in data["annotations"]:
                self._keep(row)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise LabelError(f"{self.file} cannot be read as COCO annotations ({type(e).__name__}: {e}); expected "
                             "images with id and file_name, and annotations with image_id and segmentation.") from e
        if not any(self._annotations.values()):
            raise LabelError(f"{self.file} holds no masks; expected annotations with polygons or run lengths.")
        self.photos = len(self._rows)

    def spread(self, count: int | None = None) -> Iterator[CocoPhoto]:
        """All photos in the order of the JSON, or ``count`` spread evenly over it, decoded one at a time.

        Raises:
            LabelError: a photo is missing, unreadable, outside the folder or of another size than the JSON says.
        """
        rows = list(self._rows.values())
        count = len(rows) if count is None else min(count, len(rows))
        for row in (rows[i * len(rows) // count] for i in range(count)):
            yield CocoPhoto(str(row["id"]), self.root.resolve().name, self._open(row),
                            tuple(self._annotations[row["id"]]))

    def __iter__(self) -> Iterator[CocoPhoto]:
        return self.spread()

    def _keep(self, row: dict[str, Any]) -> None:
        reason = "crowd" if row.get("iscrowd") else "" if row.get("segmentation") else "no mask"
        if reason:
            self.left_out[reason] += 1
        else:
            self._annotations[row["image_id"]].append((str(row.get("id", "?")), row["segmentation"]))

    def _open(self, row: dict[str, Any]) -> Rgb:
        path = self._photo(str(row.get("file_name", "")))
        try:
            image = load_rgb(path)
        except ImageError as e:
            raise LabelError(f"a photo of {self.file} cannot be used: {e}") from e
        told = (row.get("height") or image.shape[0], row.get("width") or image.shape[1])
        if told != image.shape[:2]:
            raise LabelError(f"{path} has {image.shape[1]} x {image.shape[0]} pixels and {self.file} says "
                             f"{told[1]} x {told[0]}; the annotations belong to another copy of the photo.")
        return image

    def _photo(self, name: str) -> Path:
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or "\0" in name:
            raise LabelError(f"{self.file} names the photo {name!r}, which is not a path inside its folder.")
        for path in (self.root / pure, self.root / "images" / pure):
            if path.is_file():
                if not path.resolve().is_relative_to(self.root.resolve()):
                    raise LabelError(f"{path} is a link that leads out of {self.root}; copy the photo there instead.")
                return path
        raise LabelError(f"{self.file} names the photo {name!r}, which is neither in {self.root} nor in its images.")


def draw(photo: CocoPhoto, index: int) -> Bools:
    """The mask of one annotation: bool (H, W).

    Raises:
        LabelError: the segmentation is neither polygons nor run lengths of the photo's size.
    """
    name, shape = photo.annotations[index]
    height, width = photo.image.shape[:2]
    try:
        if isinstance(shape, dict):
            if list(shape["size"]) != [height, width]:
                raise ValueError(f"its size is {shape['size']} and the photo's [{height}, {width}]")
            return rle.decode(shape)
        mask = np.zeros((height, width), np.bool_)
        for polygon in shape:
            mask |= fill(np.array(polygon, np.float64), height, width)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as e:
        raise LabelError(f"annotation {name} of photo {photo.id} has a segmentation that cannot be used ({e}); "
                         "expected polygons or COCO run lengths.") from e
    return mask


def fill(polygon: NDArray[np.float64], height: int, width: int) -> Bools:
    """The pixels whose centres lie inside a polygon, even-odd: bool (height, width).

    Pillow's polygons also cover the pixels that their outline touches, 16 % more area at a radius of 8 pixels.

    Args:
        polygon: (2 N,) x0, y0, x1, y1, ... in continuous pixels, N at least 3.

    Raises:
        ValueError: an odd or too small number of values, or values that are not finite or far from any photo.
    """
    if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 or not (np.abs(polygon) <= FARTHEST).all():
        raise ValueError("a polygon needs x, y of at least three points near the photo")
    a = polygon.reshape(-1, 2)
    b = np.roll(a, -1, 0)
    # The rows whose centres an edge passes; the lower end is left to the next edge.
    first, last = (np.clip(np.ceil(y - 0.5), 0, height).astype(int)
                   for y in (np.minimum(a, b)[:, 1], np.maximum(a, b)[:, 1]))
    edge = np.repeat(np.arange(len(a)), last - first)
    row = np.concatenate([np.arange(*ends) for ends in zip(first, last, strict=True)])
    slope = (b[edge, 0] - a[edge, 0]) / (b[edge, 1] - a[edge, 1])
    crossing = a[edge, 0] + (row + 0.5 - a[edge, 1]) * slope
    toggles = np.zeros((height, width + 1), np.uint8)
    np.add.at(toggles, (row, np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)), 1)
    inside: Bools = np.logical_xor.accumulate(toggles % 2 == 1, axis=1)[:, :width]
    return inside


def _find_json(root: Path) -> Path:
    for name in NAMES:
        if (root / name).is_file():
            return root / name
    for folder in (root, root / "annotations"):
        found = sorted(folder.glob("*.json"))
        if len(found) == 1:
            return found[0]
        if found:
            raise LabelError(f"{folder} holds {len(found)} JSON files; expected one, or one called {NAMES[0]}.")
    raise LabelError(f"{root} is not a folder in COCO format: it has no JSON of annotations.")
