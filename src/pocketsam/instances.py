"""Boxes of any detector to masks: COCO JSON or CSV in, COCO results out."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketsam import rle
from pocketsam.embedding import Embedding
from pocketsam.errors import LabelError
from pocketsam.everything import Embed
from pocketsam.images import Rgb
from pocketsam.predictor import Predictor, single_token
from pocketsam.prompts import Prompt, decoder_inputs
from pocketsam.windows import Window, ceiling, positive_cells, shape_of, to_image

COLUMNS = ("image", "x0", "y0", "x1", "y1")
BATCH = 16


@dataclass(frozen=True)
class Detection:
    """One box of a detector.

    Attributes:
        image: the photo's file name, or its stem.
        image_id: what the results call it.
        box: x0, y0, x1, y1 pixels.
        category: COCO category id, or a class name.
        score: the detector's.
    """

    image: str
    image_id: int | str
    box: tuple[float, float, float, float]
    category: int | str
    score: float


def read_detections(path: Path) -> list[Detection]:
    """Boxes from a COCO JSON (results list, or annotations with images) or a CSV.

    A CSV has a header with image, x0, y0, x1, y1 and, if wanted, category and score.

    Raises:
        LabelError: the file cannot be understood, or a box is not four finite numbers with x1 > x0 and y1 > y0.
    """
    try:
        rows = list(_from_csv(path) if path.suffix.lower() == ".csv" else _from_json(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, csv.Error) as e:
        raise LabelError(f"{path} cannot be read as detections ({type(e).__name__}: {e}); expected COCO JSON, or CSV "
                         f"with the columns {', '.join(COLUMNS)}.") from e
    if not rows:
        raise LabelError(f"{path} holds no boxes.")
    for i, d in enumerate(rows):
        if not np.isfinite([*d.box, d.score]).all() or d.box[2] <= d.box[0] or d.box[3] <= d.box[1]:
            raise LabelError(f"box {i + 1} of {path}, {d.box}, is empty or not finite; expected x1 > x0 and y1 > y0.")
    return rows


def _from_csv(path: Path) -> Iterator[Detection]:
    with path.open(newline="", encoding="utf-8-sig") as f:
        for row in csv.DictReader(f, skipinitialspace=True):
            x0, y0, x1, y1 = (float(row[c]) for c in COLUMNS[1:])
            if row["image"] is None:
                raise ValueError("a row ends before the column image")
            category = row.get("category") or "1"
            yield Detection(row["image"], row["image"], (x0, y0, x1, y1),
                            int(category) if category.isdecimal() else category, float(row.get("score") or 1))


def _from_json(path: Path) -> Iterator[Detection]:
    data = json.loads(path.read_text(encoding="utf-8-sig"))
    names: dict[Any, str] = {}
    if isinstance(data, dict):
        names = {i["id"]: str(i["file_name"]) for i in data["images"]}
        data = data["annotations"]
    for row in data:
        x, y, w, h = (float(v) for v in row["bbox"])
        name = names[row["image_id"]] if names else str(row["image_id"])
        yield Detection(name, row["image_id"], (x, y, x + w, y + h), row.get("category_id", 1),
                        float(row.get("score", 1)))


class Photos:
    """Photos by what detections call them.

    Args:
        paths: the photos that were detected on.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._count = len(paths)
        # The whole file name first: 1.jpg is not 000000000001.jpg where both exist.
        self._tables: tuple[dict[str, list[Path]], ...] = ({}, {})
        for path in paths:
            for table, key in zip(self._tables, (path.name, path.stem), strict=True):
                table.setdefault(key, []).append(path)

    def find(self, name: str) -> Path:
        """The photo that a detection means: same file name, same stem, or COCO's twelve-digit number.

        Raises:
            LabelError: there is none, or more than one.
        """
        wanted = [name, Path(name).name, *([name.zfill(12)] if name.isdecimal() else [])]
        for table in self._tables:
            for candidate in wanted:
                found = table.get(candidate, [])
                if len(found) > 1:
                    raise LabelError(f"the detections name image {name!r}, which may be {found[0].name} or "
                                     f"{found[1].name}; give its whole file name.")
                if found:
                    return found[0]
        raise LabelError(f"the detections name image {name!r}, which is not among the {self._count} photos given.")


def segment_boxes(sam: Predictor, rgb: Rgb, detections: Sequence[Detection], embed: Embed) -> list[dict[str, Any]]:
    """The single-mask answer for each box, decoded in batches; one mask in memory at a time.

    Boxes are clipped to the photo; one that lies outside of it gets an empty mask.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        COCO results: image_id, category_id, bbox (x, y, width, height of the mask), segmentation (compressed RLE),
        score (the detector's) and predicted_iou.
    """
    embedding = embed(rgb)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(detections), BATCH):
        rows += _batch(sam, embedding, detections[start:start + BATCH])
    return rows


def _batch(sam: Predictor, embedding: Embedding, detections: Sequence[Detection]) -> list[dict[str, Any]]:
    frame = embedding.frame
    clipped = [_clip(d, frame.width, frame.height) for d in detections]
    prompts = [Prompt.of(frame, sam.spec, box=box or (0, 0, frame.width, frame.height)) for box in clipped]
    out = sam.runtime.decode(embedding.features, decoder_inputs(prompts, frame, sam.spec, sam.runtime.slots))
    rows = []
    for d, box, masks, scores in zip(detections, clipped, out["low_res_masks"], out["iou_predictions"], strict=True):
        token = single_token(masks, scores, sam.spec)
        logits, score = masks[token], scores[token]
        cells = positive_cells(ceiling(logits, frame), 0) if box else None
        mask, window = np.zeros((1, 1), np.bool_), Window(0, 0, 1, 1)
        if cells is not None:
            window = to_image(cells, frame, len(logits))
            mask = shape_of(logits, frame, window, 0).mask
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        place = ([int(xs[0]) + window.x0, int(ys[0]) + window.y0, int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1]
                 if len(xs) else [0, 0, 0, 0])
        code = rle.encode_window(mask, window.x0, window.y0, frame.height, frame.width)
        rows.append({"image_id": d.image_id, "category_id": d.category, "bbox": place, "segmentation": code,
                     "score": d.score, "predicted_iou": float(score) if box else 0.0})
    return rows


def _clip(d: Detection, width: int, height: int) -> tuple[float, float, float, float] | None:
    x0, y0, x1, y1 = max(0.0, d.box[0]), max(0.0, d.box[1]), min(float(width), d.box[2]), min(float(height), d.box[3])
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None
