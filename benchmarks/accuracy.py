"""Accuracy of a runtime: agreement with a reference, and quality against annotated regions.

Agreement needs photos only; quality needs masks, from a labelled pack or a folder in COCO format.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pocketsam.benchmarks.coco import CocoFolder, CocoPhoto, draw
from pocketsam.distance import inner_point
from pocketsam.errors import LabelError, UsageError
from pocketsam.geometry import Bools, masks_from_logits, tight_box
from pocketsam.labelled import Labelled, count_photos, read_pack
from pocketsam.parity import PROMPTS_PER_IMAGE, compare, mask_iou
from pocketsam.predictor import DECODER_BATCH, Predictor, best_token, single_token
from pocketsam.prompts import Prompt
from pocketsam.resampling import Floats

Sample = Labelled | CocoPhoto
# One line of the quality table: source, regions, and mean IoUs by name.
Row = dict[str, Any]
KINDS = ("box", "point", "oracle", "clicked")


class Pack:
    """A labelled pack; the counterpart of :class:`pocketsam.benchmarks.coco.CocoFolder`.

    Attributes:
        photos: number of photos.
        left_out: empty; a pack has no crowds.
    """

    def __init__(self, path: Path) -> None:
        """Read the index.

        Raises:
            LabelError: not a pack, or one without masks.
        """
        self.path = path
        self.left_out: Counter[str] = Counter()
        self.photos, masked = count_photos(path)
        if not masked:
            raise LabelError(f"{path} holds {self.photos} photos without masks; quality needs annotated regions.")

    def spread(self, count: int | None = None) -> Iterator[Labelled]:
        """All photos in order, or ``count`` spread evenly over the index, decoded one at a time.

        Raises:
            LabelError: a photo or layer is damaged.
        """
        return read_pack(self.path, limit=count)

    def __iter__(self) -> Iterator[Labelled]:
        return self.spread()


Data = Pack | CocoFolder


def open_data(path: Path) -> Data:
    """Annotated photos: a labelled pack (a tar file), or a folder in COCO format.

    Raises:
        LabelError: neither, damaged, or without masks.
    """
    if path.is_dir():
        return CocoFolder(path)
    if not path.exists():
        raise LabelError(f"{path} does not exist; expected a labelled pack or a folder in COCO format.")
    return Pack(path)


def regions(sample: Sample) -> Iterator[Bools]:
    """The masks of a photo that are not empty, one at a time, in the order of the annotations: bool (H, W) each.

    Raises:
        LabelError: an annotation or layer does not fit the photo.
    """
    return (mask for shape in _shapes(sample) if (mask := shape()).any())


def agreement(reference: Predictor, candidate: Predictor, samples: Data | Iterable[Sample], images: int = 60,
              prompts_per_image: int = PROMPTS_PER_IMAGE, seed: int = 0) -> dict[str, Any]:
    """Mask IoU of a candidate with a reference on seeded boxes and points (see :mod:`pocketsam.parity`).

    Args:
        samples: where it is opened data, its photos are spread evenly; else the first ones are taken.
        images: at most this many photos.
        prompts_per_image: at least 2, half boxes and half points.

    Returns:
        JSON-safe: images, seed, prompts_per_image, ``max_tensor_error`` by tensor (None where it is not finite; empty
        where the two have tensors of different shapes), ``box``, ``point`` and ``all`` with prompts, mean, p5 and
        worst, and ``flip_rate``, the share of points for which the candidate ranks another mask first.

    Raises:
        UsageError: no photo, or too few prompts.
    """
    if images < 1 or prompts_per_image < 2:
        raise UsageError(f"{images} images with {prompts_per_image} prompts each cannot be compared; "
                         "expected at least one image and two prompts.")
    chosen = samples.spread(images) if isinstance(samples, Data) else islice(samples, images)
    same = reference.spec.decoder_graph() == candidate.spec.decoder_graph()
    result = compare(reference, candidate, (s.image for s in chosen), seed, prompts_per_image, tensors=same)
    if not result.images:
        raise UsageError("there is no photo to compare on; pass at least one sample.")
    summary = result.summary()
    errors = {k: v if math.isfinite(v) else None for k, v in summary["max_tensor_error"].items()}
    return {"seed": seed, "prompts_per_image": prompts_per_image, **summary, "max_tensor_error": errors}


@dataclass(frozen=True)
class Answer:
    """IoUs at the photo's size for one region.

    Attributes:
        source: of the photo.
        box: the single-mask answer to the tight box.
        point: the mask that the model ranks first for the region's inner point.
        oracle: the best of the three masks for that point.
        clicked: after the corrective clicks; None without any.
    """

    source: str
    box: float
    point: float
    oracle: float
    clicked: float | None


def quality(predictor: Predictor, samples: Iterable[Sample], regions_per_image: int = 16, seed: int = 0,
            clicks: int = 0) -> list[Row]:
    """Prompt a model with annotated regions and measure its masks at the photo's size.

    Args:
        regions_per_image: at most this many regions of each photo, drawn without replacement; the draw depends on
            the seed and the photo's id only.
        clicks: corrective clicks after the point, each deepest inside the error of the last answer, which is fed back.

    Returns:
        A row of all regions, then one per source: ``source`` ("all" first), ``regions``, and the mean IoUs ``box``,
        ``point``, ``oracle`` and, with clicks, ``clicked``.

    Raises:
        LabelError: a sample is damaged, or no sample has a region.
        PromptError: more clicks than the decoder has slots for.
        UsageError: a count is out of range.
    """
    if regions_per_image < 1 or clicks < 0:
        raise UsageError(f"{regions_per_image} regions an image and {clicks} clicks make no sense; expected at least "
                         "one region and no negative number of clicks.")
    # The caller's predictor keeps its image.
    sam = Predictor(predictor.runtime, predictor.exact)
    answers: list[Answer] = []
    for sample in samples:
        masks = _drawn(sample, regions_per_image, seed)
        batch = list(islice(masks, DECODER_BATCH))
        if batch:
            sam.set_image(sample.image)
        while batch:
            answers += _measure(sam, sample.source, batch, clicks)
            batch = list(islice(masks, DECODER_BATCH))
    if not answers:
        raise LabelError("no sample has an annotated region; quality needs at least one.")
    return [_row("all", answers), *(_row(s, [a for a in answers if a.source == s])
                                    for s in sorted({a.source for a in answers}))]


def retention(candidate_rows: Sequence[Row], reference_rows: Sequence[Row]) -> list[Row]:
    """How much of the reference's quality a candidate keeps: rows as :func:`quality` returns, IoUs divided.

    A quotient is None where the reference's IoU is zero.

    Raises:
        UsageError: the rows were not measured on the same regions.
    """
    kept = []
    if [(r["source"], r["regions"]) for r in candidate_rows] != [(r["source"], r["regions"]) for r in reference_rows]:
        raise UsageError("the two tables hold other sources or numbers of regions; measure both on the same data.")
    for ours, theirs in zip(candidate_rows, reference_rows, strict=True):
        ratios = {k: ours[k] / theirs[k] if theirs[k] else None for k in KINDS if k in ours and k in theirs}
        kept.append({"source": ours["source"], "regions": ours["regions"], **ratios})
    return kept


def _shapes(sample: Sample) -> list[Callable[[], Bools]]:
    """One function for each region, so that those not drawn cost nothing."""
    if isinstance(sample, CocoPhoto):
        return [partial(draw, sample, i) for i in range(len(sample.annotations))]
    found: list[Callable[[], Bools]] = []
    for layer in sample.layers:
        if layer.shape != sample.image.shape[:2]:
            raise LabelError(f"a layer of photo {sample.id} has shape {layer.shape} and the photo "
                             f"{sample.image.shape[:2]}; the pack is damaged.")
        found += [partial(np.equal, layer, k) for k in np.unique(layer[layer > 0])]
    return found


def _drawn(sample: Sample, most: int, seed: int) -> Iterator[Bools]:
    """At most so many masks of a photo that are not empty, drawn where there are more."""
    shapes = _shapes(sample)
    if len(shapes) > most:
        # A photo keeps its regions whatever other photos are measured.
        order = np.random.default_rng([seed, zlib.crc32(sample.id.encode())]).permutation(len(shapes))
        shapes = [shapes[i] for i in order]
    return islice((mask for shape in shapes if (mask := shape()).any()), most)


def _measure(sam: Predictor, source: str, truths: Sequence[Bools], clicks: int) -> list[Answer]:
    frame, spec, n = sam.current.frame, sam.spec, len(truths)
    centres = [inner_point(t) for t in truths]
    prompts = [Prompt.of(frame, spec, box=tight_box(t)) for t in truths]
    prompts += [Prompt.of(frame, spec, points=[c], labels=[1]) for c in centres]
    logits, scores = sam.decode_prompts(prompts)
    ranked = np.stack([logits[n + i, best_token(scores[n + i])] for i in range(n)])
    clicked = _clicked(sam, truths, centres, ranked, clicks) if clicks else [None] * n
    answers = []
    for i, truth in enumerate(truths):
        box = _iou(sam, logits[i, single_token(logits[i], scores[i], spec)], truth)
        ious = [_iou(sam, logits[n + i, token], truth) for token in (1, 2, 3)]
        answers.append(Answer(source, box, ious[best_token(scores[n + i]) - 1], max(ious), clicked[i]))
    return answers


def _clicked(sam: Predictor, truths: Sequence[Bools], centres: Sequence[tuple[float, float]], answers: Floats,
             clicks: int) -> list[float]:
    """IoU of each region after corrective clicks that start from the answers (n, 4h, 4w) to the centres."""
    frame, spec = sam.current.frame, sam.spec
    points, labels = [[c] for c in centres], [[1] for _ in centres]
    for _ in range(clicks):
        for i, truth in enumerate(truths):
            error = masks_from_logits(answers[i][None], frame)[0] ^ truth
            x, y = inner_point(error if error.any() else truth)
            points[i].append((x, y))
            labels[i].append(int(truth[int(y), int(x)]))
        logits, scores = sam.decode_prompts([
            Prompt.of(frame, spec, points[i], labels[i], mask=answers[i] if spec.mask_prompt else None)
            for i in range(len(truths))])
        answers = np.stack([row[single_token(row, s, spec)] for row, s in zip(logits, scores, strict=True)])
    return [_iou(sam, logits, truth) for logits, truth in zip(answers, truths, strict=True)]


def _iou(sam: Predictor, logits: Floats, truth: Bools) -> float:
    return mask_iou(masks_from_logits(logits[None], sam.current.frame)[0], truth)


def _row(source: str, answers: Sequence[Answer]) -> Row:
    values = {kind: [getattr(a, kind) for a in answers] for kind in KINDS}
    means = {kind: float(np.mean(v)) for kind, v in values.items() if v[0] is not None}
    return {"source": source, "regions": len(answers), **means}
