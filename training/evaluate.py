"""Quality against ground truth: boxes, centre points, corrective clicks, and how honest the predicted IoU is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.geometry import Frame, to_model_image
from pocketsam.labelled import Labelled, read_pack
from pocketsam.models.sam import Features, SegmentAnything
from pocketsam.prompts import Prompt, decoder_inputs
from pocketsam.specs import DEFAULT_SLOTS, ModelSpec
from pocketsam.training.batches import boxes_of
from pocketsam.training.distance import centre_point, centre_points
from pocketsam.training.losses import mask_iou
from pocketsam.training.prompts import Prompts
from pocketsam.training.rounds import answer, chosen_logits, set_input_size

CLICKS = 3
SIZES = {"small": (0.0, 0.005), "medium": (0.005, 0.05), "large": (0.05, 1.01)}


@dataclass(frozen=True)
class Region:
    """What the model answered for one annotated region; every IoU is measured at the photo's size.

    Attributes:
        source: of the image.
        area: fraction of the image.
        box: IoU of mask 0 for the tight box.
        ranked: IoU of the mask that the model ranks first of masks 1 to 3, for the centre point.
        oracle: the best IoU of masks 1 to 3.
        clicked: IoU after three corrective clicks on the ranked answer.
        box_score, point_score: IoU that the model predicted for ``box`` and ``ranked``.
    """

    source: str
    area: float
    box: float
    ranked: float
    oracle: float
    clicked: float
    box_score: float
    point_score: float


@dataclass(frozen=True)
class Row:
    """One line of the quality table: means over regions; ``pearson`` is None for fewer than three answers."""

    name: str
    regions: int
    box: float
    ranked: float
    oracle: float
    gain: float
    pearson: float | None


@torch.no_grad()
def evaluate(model: SegmentAnything, pack: Path, size: int | None = None, most: int | None = None, seed: int = 0,
             images: int | None = None) -> list[Region]:
    """Prompt the model with the regions of a pack.

    Args:
        model: on its device; left in evaluation mode at its own input size.
        pack: a tar with ground truth.
        size: input side S instead of the model's.
        most: at most this many regions of each image, drawn over all its layers; None takes every region.
        seed: of that draw.
        images: at most this many, spread evenly.
    """
    model.eval()
    side = size or model.spec.image_size
    spec = replace(model.spec, image_size=side, embed_size=side * model.spec.embed_size // model.spec.image_size)
    set_input_size(model, side)
    generator = torch.Generator().manual_seed(seed)
    results: list[Region] = []
    for sample in read_pack(pack, limit=images):
        masks = region_masks(sample, most, generator)
        for start in range(0, len(masks), 16):
            results.extend(_evaluate_image(model, spec, sample, masks[start:start + 16]))
    set_input_size(model, model.spec.image_size)
    return results


def region_masks(sample: Labelled, most: int | None, generator: torch.Generator) -> Tensor:
    """Bool (R, H, W): the regions of all layers, or ``most`` of them at random."""
    layers = [torch.from_numpy(layer) for layer in sample.layers]
    all_ids = [(layer, int(k)) for layer in layers for k in torch.unique(layer) if k > 0]
    order = range(len(all_ids)) if most is None else torch.randperm(len(all_ids), generator=generator).tolist()[:most]
    masks = [all_ids[i][0] == all_ids[i][1] for i in order]
    return torch.stack(masks) if masks else torch.zeros(0, *sample.image.shape[:2], dtype=torch.bool)


def _evaluate_image(model: SegmentAnything, spec: ModelSpec, sample: Labelled, masks: Tensor) -> list[Region]:
    truth = masks.to(next(model.parameters()).device)
    frame, features = embedded(model, spec, sample)
    logits, scores = answer_to(model, features, in_slots(box_prompts(truth, frame, spec), frame, spec, truth), None)
    box_iou, box_score = mask_iou(to_image(logits[:, 0], frame), truth), scores[:, 0]
    clicks = click_prompts([centre_point(m) for m in truth], frame, spec)
    prompts = in_slots(clicks, frame, spec, truth)
    logits, scores = answer_to(model, features, prompts, None)
    ious = mask_iou(to_image(logits[:, 1:].flatten(0, 1), frame).reshape(-1, 3, *truth.shape[1:]), truth[:, None])
    first = scores[:, 1:].argmax(1, keepdim=True)
    ranked, point_score = ious.gather(1, first)[:, 0], scores[:, 1:].gather(1, first)[:, 0]
    seen = chosen_logits(logits, scores, prompts.ambiguous)
    clicked = _click(model, spec, features, clicks, seen, truth, frame)
    area = truth.float().mean((1, 2))
    columns = (area, box_iou, ranked, ious.amax(1), clicked, box_score, point_score)
    return [Region(sample.source, *values) for values in torch.stack(columns, 1).tolist()]


def embedded(model: SegmentAnything, spec: ModelSpec, sample: Labelled) -> tuple[Frame, Features]:
    """Where the photo lies in the model frame, and its features."""
    frame = Frame.of(sample.image.shape[0], sample.image.shape[1], spec)
    pixels = torch.from_numpy(to_model_image(sample.image, frame, spec)).to(next(model.parameters()).device)
    return frame, model.encode(model.normalize(pixels))


def box_prompts(truth: Tensor, frame: Frame, spec: ModelSpec) -> list[Prompt]:
    """The tight box of each of bool (M, H, W)."""
    return [Prompt.of(frame, spec, box=box) for box in boxes_of(truth).tolist()]


def click_prompts(points: Iterable[Tensor], frame: Frame, spec: ModelSpec) -> list[Prompt]:
    """A lone click at each XY (2,) in the photo."""
    return [Prompt.of(frame, spec, points=[point.tolist()]) for point in points]


def in_slots(prompts: Sequence[Prompt], frame: Frame, spec: ModelSpec, like: Tensor) -> Prompts:
    """What the predictor sends for M prompts, on the device of ``like``."""
    inputs = decoder_inputs(prompts, frame, spec, DEFAULT_SLOTS)
    coords, labels = (torch.from_numpy(inputs[k]).to(like.device) for k in ("point_coords", "point_labels"))
    return Prompts(coords, labels, torch.tensor([p.single_click for p in prompts], device=like.device))


def _click(model: SegmentAnything, spec: ModelSpec, features: Features, prompts: list[Prompt], mask: Tensor,
           truth: Tensor, frame: Frame) -> Tensor:
    """IoU (M,) after three clicks, each in the middle of the thickest error of the last answer.

    Errors are looked for at the decoder's resolution: quicker, and finer errors are not worth a click.
    """
    target = small_target(truth, frame, mask.shape[-1])
    for _ in range(CLICKS):
        prompts = corrected(prompts, mask, target, frame, spec)
        mask = answer_to(model, features, in_slots(prompts, frame, spec, mask), mask)[0][:, 0]
    return mask_iou(to_image(mask, frame), truth)


def small_target(truth: Tensor, frame: Frame, side: int) -> Tensor:
    """Bool (M, H, W) in the photo -> (M, side, side) in the model frame, true where most of a pixel is covered."""
    small = _inside(frame, side)
    target = torch.zeros(len(truth), side, side, dtype=torch.bool, device=truth.device)
    target[:, :small[0], :small[1]] = F.interpolate(truth[None].float(), small, mode="area")[0] > 0.5
    return target


def _inside(frame: Frame, side: int) -> tuple[int, int]:
    """Rows and columns of a (side, side) mask in the model frame whose centres lie in the photo."""
    cell = frame.size / side
    return math.ceil(frame.content_height / cell - 0.5), math.ceil(frame.content_width / cell - 0.5)


def corrected(prompts: Sequence[Prompt], mask: Tensor, target: Tensor, frame: Frame, spec: ModelSpec) -> list[Prompt]:
    """The prompts with a click in the middle of the thickest error inside the photo.

    Args:
        mask: logits (M, h, w) of the last answer.
        target: bool (M, h, w), of :func:`small_target`.
    """
    rows, columns = _inside(frame, target.shape[-1])
    error = torch.zeros_like(target)
    error[:, :rows, :columns] = ((mask > 0) ^ target)[:, :rows, :columns]
    error = torch.where(error.flatten(1).any(1)[:, None, None], error, target)
    points = centre_points(error)
    column, row = points.long().unbind(1)
    labels = target[torch.arange(len(target), device=target.device), row, column].tolist()
    # Photo pixels.
    cell = frame.size / target.shape[-1] * np.array([frame.width / frame.content_width,
                                                     frame.height / frame.content_height])
    return [Prompt.of(frame, spec, points=[*p.points, xy * cell], labels=[*p.labels, label])
            for p, xy, label in zip(prompts, points.cpu().numpy(), labels, strict=True)]


def answer_to(model: SegmentAnything, features: Features, prompts: Prompts,
              mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (M, 4, h, w) and scores (M, 4) for M prompts on one image, with the previous logits (M, h, w) fed back."""
    return answer(model, {k: v.expand(len(prompts.coords), -1, -1, -1) for k, v in features.items()}, prompts, mask)


def to_image(logits: Tensor, frame: Frame) -> Tensor:
    """(M, 4h, 4w) logits in the model frame -> (M, H, W) in the photo's, as the official predictor does it."""
    x = F.interpolate(logits[None], (frame.size, frame.size), mode="bilinear")
    x = x[..., :frame.content_height, :frame.content_width]
    return F.interpolate(x, (frame.height, frame.width), mode="bilinear")[0]


def table(results: Sequence[Region]) -> list[Row]:
    """All regions first, then a row per source, then a row per size."""
    rows = [row("all", results)]
    rows += [row(s, [r for r in results if r.source == s]) for s in sorted({r.source for r in results})]
    for name, (low, high) in SIZES.items():
        part = [r for r in results if low <= r.area < high]
        rows += [row(f"{name} ({low:.1%} to {min(high, 1):.1%})", part)] if part else []
    return rows


def row(name: str, results: Sequence[Region]) -> Row:
    """Means over some regions."""
    predicted = [s for r in results for s in (r.box_score, r.point_score)]
    true = [s for r in results for s in (r.box, r.ranked)]
    return Row(name, len(results), _mean(r.box for r in results), _mean(r.ranked for r in results),
               _mean(r.oracle for r in results), _mean(r.clicked - r.ranked for r in results), pearson(predicted, true))


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Correlation coefficient, or None where it is not defined."""
    pair = torch.tensor([a, b], dtype=torch.float64)
    if len(a) < 3 or float(pair.std(1).min()) == 0:
        return None
    return float(torch.corrcoef(pair)[0, 1])


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else float("nan")


def format_table(rows: Sequence[Row]) -> str:
    """The quality table as aligned text."""
    lines = [f"{'regions of':<22}{'count':>7}{'box':>8}{'point':>8}{'oracle':>8}{'3 clicks':>10}{'pearson':>9}"]
    for r in rows:
        correlation = "-" if r.pearson is None else f"{r.pearson:.3f}"
        lines.append(f"{r.name:<22}{r.regions:>7}{r.box:>8.3f}{r.ranked:>8.3f}{r.oracle:>8.3f}{r.gain:>+10.3f}"
                     f"{correlation:>9}")
    return "\n".join(lines)
