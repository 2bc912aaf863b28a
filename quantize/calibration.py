"""Calibration data from a folder, a pack or the shipped photos: encoder images, and decoder inputs that look real."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pocketsam.errors import ImageError, UsageError
from pocketsam.geometry import Frame, to_model_image
from pocketsam.images import Rgb, image_id, load_rgb, photos_in
from pocketsam.photos import CALIBRATION_IMAGES, photo_paths
from pocketsam.predictor import Predictor
from pocketsam.prompts import Prompt, decoder_inputs
from pocketsam.quantize.packs import is_pack, pack_images
from pocketsam.runtime import Runtime, Tensors
from pocketsam.specs import ModelSpec

# With fewer, one unusual photo decides the activation ranges.
FEW_IMAGES = 8


@dataclass(frozen=True)
class CalibrationSet:
    """Images to calibrate on.

    Attributes:
        images: uint8 (H, W, 3) RGB each.
        source: where they come from, for the bundle.
        distinct: how many different photos there are; the rest are seeded crops and mirrored crops of them.
        skipped: files that could not be read, with the reason.
        warnings: one sentence each.
        seed: of the crops and of the simulated prompts.
    """

    images: tuple[Rgb, ...]
    source: str
    distinct: int
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seed: int = 0
    identity: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        """What the bundle records."""
        return {"source": self.source, "images": len(self.images), "distinct": self.distinct,
                "skipped": list(self.skipped), "warnings": list(self.warnings), "seed": self.seed,
                "sha256": self.identity}

    def encoder_inputs(self, spec: ModelSpec) -> Iterator[Rgb]:
        """uint8 (1, S, S, 3) images as the host prepares them, one at a time."""
        for rgb in self.images:
            yield to_model_image(rgb, Frame.of(rgb.shape[0], rgb.shape[1], spec), spec)

    def decoder_inputs(self, runtime: Runtime, slots: int, batch: int = 1) -> Iterator[Tensors]:
        """All decoder inputs by contract name, from real embeddings and simulated prompts.

        Every image gets a point, a box, several points of both labels, a box with a background point, and a click
        refined with another and, for models that take one, the mask of the click before it; so every label value and
        both values of ``has_mask_input`` occur.

        Args:
            runtime: an encoder and decoder in float.
            slots: fixed prompt slots; prompts that need more are left out.
            batch: prompts in one set of inputs; they are repeated to fill it.
        """
        rng = np.random.default_rng(self.seed)
        predictor = Predictor(runtime)
        for rgb in self.images:
            embedding = predictor.set_image(rgb)
            prompts = [p for p in _prompts(predictor, rgb.shape[1], rgb.shape[0], rng)
                       if len(p.tokens(embedding.frame, runtime.spec)[1]) <= slots]
            for start in range(0, len(prompts), batch):
                chosen = [prompts[i % len(prompts)] for i in range(start, start + batch)]
                yield {**embedding.features, **decoder_inputs(chosen, embedding.frame, runtime.spec, slots)}


def collect(source: Path | None, spec: ModelSpec, count: int = CALIBRATION_IMAGES, seed: int = 0) -> CalibrationSet:
    """Calibration images from a folder, a pack (a tar with ``index.json``), or the photos that ship with the package.

    More photos than ``count`` are drawn from at random; fewer are filled up with seeded crops of themselves.

    Args:
        source: folder or tar; None takes the shipped photos.
        count: images to calibrate on.

    Raises:
        UsageError: no such folder, a count below 1, or no image in it.
        ImageError: none of the images can be read.
    """
    if count < 1:
        raise UsageError(f"the number of calibration images is {count}; expected at least 1.")
    rng = np.random.default_rng(seed)
    unique, skipped, copies = _read(source, count, rng)
    warnings = _warnings(list(unique.values()), copies, count, spec)
    if skipped:
        warnings.append(f"{len(skipped)} calibration files were skipped because they cannot be read: "
                        f"{'; '.join(skipped)}")
    photos = list(unique.values())
    filled = [*photos, *(_variant(photos[i % len(photos)], rng) for i in range(count - len(photos)))]
    name = "photos that ship with pocketsam" if source is None else source.name
    return CalibrationSet(tuple(filled), name, len(unique), tuple(skipped), tuple(warnings), seed,
                          image_id(np.frombuffer("".join([*sorted(unique), str((count, seed))]).encode(),
                                                 np.uint8)[None, :, None]))


def _read(source: Path | None, count: int, rng: np.random.Generator) -> tuple[dict[str, Rgb], list[str], int]:
    """At most ``count`` different photos by their digest, what could not be read, and how many copies were met."""
    if source is not None and is_pack(source):
        return pack_images(source, count, rng)
    paths = photo_paths() if source is None else _files(source)
    unique: dict[str, Rgb] = {}
    skipped: list[str] = []
    copies = 0
    order = [paths[i] for i in rng.permutation(len(paths))] if len(paths) > count else paths
    for path in order:
        if len(unique) == count:
            break
        try:
            image = load_rgb(path)
        except ImageError as e:
            skipped.append(f"{path.name} ({e})")
            continue
        copies += (digest := image_id(image)) in unique
        unique.setdefault(digest, image)
    if not unique:
        raise ImageError(f"none of the {len(paths)} calibration images in {source} can be read; the first: "
                         f"{skipped[0]}")
    return unique, skipped, copies


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"the calibration source {folder} is neither a folder nor a pack (an uncompressed tar); "
                         "expected a folder of images.")
    return photos_in(folder)


def _warnings(unique: Sequence[Rgb], copies: int, count: int, spec: ModelSpec) -> list[str]:
    found = []
    if copies:
        found.append(f"copies of other calibration images were dropped ({copies}): they add no range that the first "
                     "has not shown.")
    if len(unique) < FEW_IMAGES:
        few, by = ("", "--calibration-images") if count <= len(unique) else (", filled up with crops of them",
                                                                             "--calibration DIR")
        found.append(f"only {len(unique)} different calibration photos{few}: activation ranges follow those few and "
                     f"clip what other photos reach; give at least {FEW_IMAGES}, better {CALIBRATION_IMAGES}, "
                     f"with {by}.")
    small = sum(max(i.shape[:2]) < spec.image_size for i in unique)
    if small:
        found.append(f"{small} of {len(unique)} calibration images are smaller than the model's "
                     f"{spec.image_size} pixels; "
                     "scaled up they are smoother than photos, and ranges come out too narrow.")
    return found


def _variant(rgb: Rgb, rng: np.random.Generator) -> Rgb:
    """A crop of 50 to 95 % of each side, mirrored half of the time."""
    height, width = (max(1, int(n * rng.uniform(0.5, 0.95))) for n in rgb.shape[:2])
    top = int(rng.integers(0, rgb.shape[0] - height + 1))
    left = int(rng.integers(0, rgb.shape[1] - width + 1))
    crop = rgb[top:top + height, left:left + width]
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def _prompts(predictor: Predictor, width: int, height: int, rng: np.random.Generator) -> list[Prompt]:
    frame, spec = predictor.current.frame, predictor.spec
    size = np.array([width, height])
    w, h = rng.uniform(0.2, 0.8, 2) * size
    x, y = rng.uniform(0, 1, 2) * (width - w, height - h)
    box = (x, y, x + w, y + h)
    points = rng.uniform(0, 1, (6, 2)) * size
    click = Prompt.of(frame, spec, points=points[:1], labels=[1])
    best = None
    if spec.mask_prompt:
        masks, scores = predictor.decode_prompts([click])
        best = masks[0, 1 + int(scores[0, 1:].argmax())]
    return [click, Prompt.of(frame, spec, box=box), Prompt.of(frame, spec, points=points[1:4], labels=[1, 0, 1]),
            Prompt.of(frame, spec, points=points[4:5], labels=[0], box=box),
            Prompt.of(frame, spec, points=points[[0, 5]], labels=[1, 0], mask=best)]
