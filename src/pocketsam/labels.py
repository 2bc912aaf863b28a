"""Masks as files: SA-1B style JSON for one photo, COCO JSON for many, and the overlay picture."""

from __future__ import annotations

import colorsys
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pocketsam import rle
from pocketsam.errors import LabelError
from pocketsam.everything import MaskRecord
from pocketsam.files import output_errors, staged_file
from pocketsam.images import Rgb
from pocketsam.overlay import ALPHA

GOLDEN_RATIO = 0.618033988749895
CATEGORY = {"id": 1, "name": "object"}
# Most file systems take names of 255 bytes; ``.json`` follows, and a file that is not whole yet has a longer name.
NAME_BYTES = 240
COCO_FILE = re.compile(r"coco(-\d{5,}-of-\d{5,})?\.json")


def sa1b(records: Sequence[MaskRecord], file_name: str, height: int, width: int, image_id: int) -> dict[str, Any]:
    """The layout of the SA-1B data set: one object a photo, boxes as the official generator writes them.

    Returns:
        ``image`` (image_id, width, height, file_name) and ``annotations`` (id, segmentation as compressed RLE, bbox
        x, y, x1 - x0, y1 - y0 of the outermost pixels, area, predicted_iou, stability_score, point_coords, crop_box).
    """
    rows = []
    for i, r in enumerate(records):
        x0, y0, x1, y1 = r.box
        rows.append({"id": i + 1, "segmentation": r.rle, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": r.area,
                     "predicted_iou": round(r.score, 6), "stability_score": round(r.stability, 6),
                     "point_coords": [[round(v, 3) for v in r.point]], "crop_box": list(r.crop)})
    image = {"image_id": image_id, "width": width, "height": height, "file_name": file_name}
    return {"image": image, "annotations": rows}


def write_json(data: Any, path: Path) -> None:
    """Compact JSON, whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    with staged_file(path) as staged:
        staged.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")


def read_json(path: Path) -> Any:
    """JSON from a file of an earlier run.

    Raises:
        LabelError: it cannot be read or is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise LabelError(f"{path} cannot be read as JSON ({e}); delete it to make it again.") from e


def stem_of(name: str) -> str:
    """A photo's name, shortened where no ending would fit behind it."""
    whole = os.fsencode(name)
    if len(whole) <= NAME_BYTES:
        return name
    # Whole characters: half of one is no name on every system.
    return f"{whole[:NAME_BYTES - 40].decode('utf-8', 'ignore')}-{hashlib.sha256(whole).hexdigest()[:12]}"


def is_whole(data: dict[str, Any]) -> bool:
    """Whether what was read has all that COCO files and overlays are made of."""
    rows = data.get("annotations")
    return isinstance(rows, list) and {"file_name", "width", "height"} <= data["image"].keys() and all(
        isinstance(r, dict) and {"area", "segmentation", "predicted_iou"} <= r.keys()
        and len(r.get("bbox", ())) == 4 for r in rows)


def join_labels(folder: Path, out: Path, shard: int | None = None) -> list[Path]:
    """Join the labels of a folder into COCO files of at most ``shard`` photos each (one when None), numbered through.

    COCO files of an earlier run that are not among them are removed.

    Raises:
        LabelError: a label is damaged.
        OutputError: the output folder is full or not writable.
    """
    labels = [p for p in sorted(folder.glob("*.json")) if not p.name.startswith(".") or _is_label(p)]
    size = shard or max(1, len(labels))
    parts = [labels[i:i + size] for i in range(0, len(labels), size)] or [[]]
    paths, rows = [], 0
    for i, part in enumerate(parts):
        path = out / ("coco.json" if shard is None else f"coco-{i:05d}-of-{len(parts):05d}.json")
        rows += write_coco(part, path, i * size + 1, rows + 1)
        paths.append(path)
    with output_errors(out):
        for path in out.iterdir():
            if COCO_FILE.fullmatch(path.name) and path not in paths:
                path.unlink(missing_ok=True)
    return paths


def _is_label(path: Path) -> bool:
    """Whether a hidden file is the label of a hidden photo, and not what a killed process left half-written."""
    try:
        return bool(path.name == f"{stem_of(read_json(path)['image']['file_name'])}.json")
    except (LabelError, KeyError, TypeError):
        return False


def write_coco(sources: Sequence[Path], path: Path, first_image: int = 1, first_row: int = 1) -> int:
    """Join SA-1B style files into one COCO file, holding one photo in memory at a time.

    Images and annotations are numbered in the order of ``sources``; boxes are COCO's x, y, width, height.

    Args:
        first_image, first_row: numbers of the first image and annotation.

    Raises:
        LabelError: a source is damaged.

    Returns:
        The number of annotations.
    """
    with staged_file(path) as staged, staged.open("w", encoding="utf-8") as f:
        f.write('{"images":[')
        for i, source in enumerate(sources):
            image = _whole(source)["image"]
            row = {"id": first_image + i, **{k: image[k] for k in ("file_name", "width", "height")}}
            f.write(("," if i else "") + json.dumps(row, separators=(",", ":")))
        f.write('],"annotations":[')
        count = 0
        for row in _coco_rows(sources, first_image):
            f.write(("," if count else "") + json.dumps({"id": first_row + count, **row}, separators=(",", ":")))
            count += 1
        f.write(f'],"categories":[{json.dumps(CATEGORY)}]}}')
    return count


def _whole(source: Path) -> dict[str, Any]:
    data: dict[str, Any] = read_json(source)
    try:
        whole = is_whole(data)
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise LabelError(f"{source} is no label in SA-1B style; delete it to make it again.")
    return data


def _coco_rows(sources: Sequence[Path], first_image: int) -> Iterator[dict[str, Any]]:
    for i, source in enumerate(sources):
        for a in _whole(source)["annotations"]:
            x, y, w, h = a["bbox"]
            yield {"image_id": first_image + i, "category_id": CATEGORY["id"], "iscrowd": 0,
                   "bbox": [x, y, w + 1, h + 1], "area": a["area"], "segmentation": a["segmentation"],
                   "score": a["predicted_iou"]}


def overlay(rgb: Rgb, annotations: Sequence[dict[str, Any]]) -> Image.Image:
    """Every mask tinted and outlined in a colour of its own, small masks on top of large ones.

    Args:
        rgb: uint8 (H, W, 3).
        annotations: rows of :func:`sa1b`; one mask is decoded at a time, and only its box is drawn on.
    """
    out = rgb.copy()
    thickness = max(1, max(rgb.shape[:2]) // 600)
    for i, row in enumerate(sorted(annotations, key=lambda a: -int(a["area"]))):
        x, y, w, h = row["bbox"]
        part = np.s_[y:y + h + 1, x:x + w + 1]
        mask = rle.decode(row["segmentation"])[part]
        hue = (i * GOLDEN_RATIO) % 1
        colour = (np.array(colorsys.hsv_to_rgb(hue, 0.75, 1.0)) * 255).astype(np.uint8)
        view = out[part]
        view[mask] = (view[mask] * (1 - ALPHA) + colour * ALPHA).astype(np.uint8)
        view[_border(mask, thickness)] = colour
    return Image.fromarray(out)


def _border(mask: Any, width: int) -> Any:
    inner = np.pad(mask, 1)
    for _ in range(width):
        inner = np.pad(inner, 1)
        inner = inner[1:-1, 1:-1] & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    return mask & ~inner[1:-1, 1:-1]


def save_overlay(picture: Image.Image, path: Path) -> None:
    """PNG at its fastest compression: ten times quicker than the default, a tenth larger."""
    with staged_file(path) as staged:
        picture.save(staged, format="PNG", compress_level=1)
