"""Automatic masks ("segment everything") on any runtime: a grid of points, crops, filters, duplicates removed.

The algorithm of the SAM paper (appendix B) and of its official generator, with the same settings and the same masks;
``tests/test_everything.py`` holds it to a plain implementation. Nothing here needs torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pocketsam import rle
from pocketsam.candidates import Candidate, Store, find, select, suppress
from pocketsam.clicks import PointDecoder
from pocketsam.embedding import Embedding
from pocketsam.errors import UsageError
from pocketsam.geometry import Bools
from pocketsam.grids import Crop, crops, point_grid
from pocketsam.images import ImageLike, Rgb, load_rgb
from pocketsam.resampling import Floats
from pocketsam.runtime import sparing
from pocketsam.windows import Shape

if TYPE_CHECKING:
    from pocketsam.predictor import Predictor

# A mask within this many pixels of a crop's inner border is taken to be cut off there.
EDGE = 20
Embed = Callable[[Rgb], Embedding]


@dataclass(frozen=True)
class Settings:
    """How to segment everything. The defaults are the official generator's.

    Attributes:
        points_per_side: the grid has this many points squared.
        pred_iou: least predicted IoU, exclusive; 0 switches the filter off.
        stability: least stability score; 0 switches the filter off.
        stability_offset: the logit thresholds plus and minus this whose masks' IoU is the stability score.
        nms: box IoU above which the mask with the lower predicted IoU is dropped.
        crop_layers: layers of 2 x 2, 4 x 4, ... overlapping crops that are segmented too.
        crop_nms: the same across crops; there the mask of the smaller crop wins.
        crop_overlap: overlap of neighbouring crops as a fraction of the photo's short side.
        crop_points_divide: the grid's side is divided by this with every layer.
        min_region: pixels below which holes are filled and separate regions removed; 0 leaves masks as they are.
        max_area: masks covering more than this fraction of the photo are dropped (the paper: 0.95).
        batch: prompts decoded at once where the runtime has no click graphs.
    """

    points_per_side: int = 32
    pred_iou: float = 0.88
    stability: float = 0.95
    stability_offset: float = 1.0
    nms: float = 0.7
    crop_layers: int = 0
    crop_nms: float = 0.7
    crop_overlap: float = 512 / 1500
    crop_points_divide: int = 1
    min_region: int = 0
    max_area: float = 1.0
    batch: int = 16

    def __post_init__(self) -> None:
        for name in ("pred_iou", "stability", "nms", "crop_nms", "crop_overlap", "max_area"):
            if not _within(getattr(self, name), 1):
                raise UsageError(f"{name} is {getattr(self, name)}; expected a value from 0 to 1.")
            object.__setattr__(self, name, float(getattr(self, name)))
        for name, least, most in (("points_per_side", 1, 512), ("crop_points_divide", 1, 512), ("crop_layers", 0, 5),
                                  ("batch", 1, 1024), ("min_region", 0, 10 ** 9)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
                raise UsageError(f"{name} is {value}; expected a whole number from {least} to {most}.")
            # numpy's numbers are taken, and kept as Python's, which JSON takes.
            object.__setattr__(self, name, int(value))
        if not _within(self.stability_offset, sys.float_info.max):
            raise UsageError(f"stability_offset is {self.stability_offset}; expected 0 or more.")
        object.__setattr__(self, "stability_offset", float(self.stability_offset))
        if self.side(self.crop_layers) < 1:
            raise UsageError(f"{self.points_per_side} points per side divided by {self.crop_points_divide} for each of "
                             f"{self.crop_layers} crop layers leaves no point; use more points or fewer layers.")

    def side(self, layer: int) -> int:
        """Points per side in the crops of a layer."""
        return int(self.points_per_side / self.crop_points_divide ** layer)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _within(value: Any, most: float) -> bool:
    """Whether a setting is a number from 0 to ``most``."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= most


# Thresholds are statements about a model's own scores. lite0's are lower than those of SAM ViT-H, for which the
# official defaults were chosen.
OWN_DEFAULTS: dict[str, dict[str, Any]] = {"lite0": {"pred_iou": 0.5, "stability": 0.5, "min_region": 100}}


def default_settings(model: str) -> Settings:
    """The official generator's settings, or those that suit a model whose scores are calibrated differently."""
    return Settings(**OWN_DEFAULTS.get(model, {}))


def settings_for(model: str, settings: Settings | None = None, **changes: Any) -> Settings:
    """Settings, or those that suit the model, with single ones replaced.

    Raises:
        UsageError: a change that is no setting, or out of range.
    """
    if unknown := sorted(set(changes) - {f.name for f in fields(Settings)}):
        raise UsageError(f"{', '.join(unknown)}: no such setting; expected some of "
                         f"{', '.join(f.name for f in fields(Settings))}.")
    return replace(settings or default_settings(model), **changes)


@dataclass(frozen=True)
class MaskRecord:
    """One mask of a photo; all coordinates are pixels of the whole photo.

    Attributes:
        rle: COCO run-length code, ``{"size": [H, W], "counts": str}``.
        area: pixels.
        box: x0, y0, x1, y1 of the outermost pixels, inclusive.
        score: predicted IoU.
        stability: stability score, 0 to 1.
        point: x, y of the prompt.
        crop: x, y, width, height of the crop it was found in.
    """

    rle: dict[str, Any]
    area: int
    box: tuple[int, int, int, int]
    score: float
    stability: float
    point: tuple[float, float]
    crop: tuple[int, int, int, int]

    @property
    def bbox(self) -> tuple[int, int, int, int]:
        """x, y, width, height of the pixels covered (COCO's convention; the official generator's is one less)."""
        x0, y0, x1, y1 = self.box
        return x0, y0, x1 - x0 + 1, y1 - y0 + 1

    @property
    def mask(self) -> Bools:
        """bool (H, W)."""
        return rle.decode(self.rle)


def segment_everything(sam: Predictor, image: ImageLike, settings: Settings | None = None,
                       embed: Embed | None = None) -> list[MaskRecord]:
    """All masks of a photo, best predicted IoU first (with crops: smallest crop first).

    Args:
        image: path, PIL image or uint8 (H, W, 3) RGB array.
        settings: :func:`default_settings` of the model when None.
        embed: instead of ``sam.embed``, for example one that keeps embeddings on disk.

    Raises:
        ImageError: the photo cannot be used.
    """
    settings = settings or default_settings(sam.spec.name)
    rgb = load_rgb(image)
    height, width = rgb.shape[:2]
    layers = crops(height, width, settings.crop_layers, settings.crop_overlap)
    records: list[MaskRecord] = []
    for crop in layers:
        records += _segment_crop(sam, rgb, crop, settings, embed or sam.embed)
    if len(layers) > 1 and records:
        areas = np.array([r.crop[2] * r.crop[3] for r in records], np.float64)
        records = [records[i] for i in suppress(_boxes(records), 1 / areas, settings.crop_nms)]
    if settings.min_region > 0:
        from pocketsam.regions import clean_records

        records = clean_records(records, settings.min_region, max(settings.nms, settings.crop_nms))
    return records


def _segment_crop(sam: Predictor, rgb: Rgb, crop: Crop, settings: Settings, embed: Embed) -> list[MaskRecord]:
    height, width = rgb.shape[:2]
    with sparing(sam.runtime):
        embedding = embed(rgb[crop.y0:crop.y1, crop.x0:crop.x1])
    frame, m = embedding.frame, sam.spec.mask_size
    points = point_grid(settings.side(crop.layer)) * (frame.width, frame.height)
    decoder = PointDecoder(sam, embedding)
    store = Store()
    for answers in decoder.answers(points, settings.batch, settings.pred_iou):
        for candidate in find(answers, frame, settings.pred_iou, settings.stability, settings.stability_offset):
            store.add(candidate)

    def accept(shape: Shape, box: tuple[int, int, int, int]) -> bool:
        return ((settings.stability == 0 or shape.stability >= settings.stability)
                and not _cut_off(box, crop, height, width)
                and (settings.max_area == 1 or np.count_nonzero(shape.mask) <= settings.max_area * height * width))

    def decode(candidates: list[Candidate]) -> list[Floats]:
        return decoder.logits(points[[c.point for c in candidates]], [c.token for c in candidates])

    records = []
    for c, _, shape, box in select(store, frame, m, settings.stability_offset, settings.nms, accept, decode):
        x, y = points[c.point]
        code = rle.encode_window(shape.mask, shape.window.x0 + crop.x0, shape.window.y0 + crop.y0, height, width)
        records.append(MaskRecord(
            code, int(np.count_nonzero(shape.mask)),
            (box[0] + crop.x0, box[1] + crop.y0, box[2] + crop.x0, box[3] + crop.y0), c.score, shape.stability,
            (float(x) + crop.x0, float(y) + crop.y0), crop.xywh))
    return records


def _cut_off(box: tuple[int, int, int, int], crop: Crop, height: int, width: int) -> bool:
    """Whether a box (in the crop) comes close to a side of the crop that is not a side of the photo."""
    x0, y0 = crop.x0, crop.y0
    placed = (box[0] + x0, box[1] + y0, box[2] + x0, box[3] + y0)
    return any(abs(side - edge) <= EDGE and abs(side - photo) > EDGE
               for side, edge, photo in zip(placed, crop.box, (0, 0, width, height), strict=True))


def _boxes(records: list[MaskRecord]) -> NDArray[np.float64]:
    return np.array([r.box for r in records], np.float64).reshape(-1, 4)
