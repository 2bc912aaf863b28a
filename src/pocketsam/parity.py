"""Comparing a candidate runtime with a reference, in tensors and in masks (the definition of "equal" in this project).

*Reference mask*: box prompt -> token 0; point prompt -> the best of tokens 1 to 3 by predicted IoU. The candidate
chooses by its own scores. *Agreement*: IoU of both masks at image size; boxes and points are reported apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pocketsam.clicks import PointDecoder
from pocketsam.distance import inner_point
from pocketsam.geometry import Bools, masks_from_logits, tight_box
from pocketsam.grids import point_grid
from pocketsam.images import Rgb, image_id
from pocketsam.predictor import DECODER_BATCH, Predictor, best_token
from pocketsam.prompts import Prompt
from pocketsam.resampling import Floats

GATES = {"fp32": 0.999, "fp16": 0.995, "int8": 0.97, "int8-dynamic": 0.97, "int8-weights": 0.97}
PROMPTS_PER_IMAGE = 8
# Shares of the image between which a mask counts as an object.
SMALLEST, LARGEST = 0.002, 0.9
CLICK_SIDE = 3


def photos_id(images: Iterable[Rgb]) -> str:
    """The identity of the photos that an agreement was measured on, 16 hex digits."""
    return _joined(map(image_id, images))


def _joined(ids: Iterable[str]) -> str:
    return hashlib.sha256("".join(ids).encode()).hexdigest()[:16]


@dataclass
class Agreement:
    """Mask IoUs and tensor errors collected over images and prompts.

    Attributes:
        ious: by prompt kind, ``box`` or ``point``.
        flips: point prompts where the candidate chose another token than the reference.
        tensor_errors: largest absolute difference by tensor name.
        ids: of the photos, in order.
    """

    ious: dict[str, list[float]] = field(default_factory=lambda: {"box": [], "point": []})
    flips: int = 0
    tensor_errors: dict[str, float] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Number of photos."""
        return len(self.ids)

    @property
    def mean(self) -> float:
        """Mean IoU over all prompts."""
        return float(np.mean(self.ious["box"] + self.ious["point"]))

    def note_error(self, name: str, a: Floats, b: Floats) -> None:
        """Keep the largest absolute difference seen of a tensor; NaN counts as infinite."""
        error = float(np.abs(a - b).max())
        error = error if np.isfinite(error) else float("inf")
        self.tensor_errors[name] = max(self.tensor_errors.get(name, 0.0), error)

    def summary(self) -> dict[str, Any]:
        """Numbers for bundle.json and tables; JSON-safe."""
        out: dict[str, Any] = {"images": self.images, "photos": _joined(self.ids),
                               "max_tensor_error": dict(self.tensor_errors)}
        for kind, values in {**self.ious, "all": self.ious["box"] + self.ious["point"]}.items():
            if not values:
                continue
            out[kind] = {"prompts": len(values), "mean": float(np.mean(values)),
                         "p5": float(np.percentile(values, 5)), "worst": float(np.min(values))}
        out["flip_rate"] = self.flips / max(1, len(self.ious["point"]))
        return out


def mask_iou(a: Bools, b: Bools) -> float:
    """Intersection over union; two empty masks agree perfectly."""
    union = int(np.logical_or(a, b).sum())
    return 1.0 if union == 0 else int(np.logical_and(a, b).sum()) / union


def compare(reference: Predictor, candidate: Predictor, images: Iterable[Rgb], seed: int = 0,
            prompts_per_image: int = PROMPTS_PER_IMAGE, tensors: bool = True) -> Agreement:
    """Run both predictors over images and seeded prompts (half boxes, half points, one refined with a mask;
    see :func:`sample_prompts`).

    Both see the same uint8 pixels, so that the graphs are compared and not the rounding of the resized image.

    Args:
        images: uint8 (H, W, 3) RGB.
        tensors: both have tensors of the same shapes; without, masks alone are compared and none is refined, so that
            two input sides can be.
    """
    result = Agreement()
    reference, candidate = Predictor(reference.runtime, exact=False), Predictor(candidate.runtime, exact=False)
    rng = np.random.default_rng(seed)
    for rgb in images:
        _compare_image(reference, candidate, rgb, rng, prompts_per_image, result, tensors)
        result.ids.append(image_id(rgb))
    return result


def compare_clicks(reference: Predictor, candidate: Predictor, images: Iterable[Rgb],
                   side: int = CLICK_SIDE) -> Agreement:
    """The candidate's click graphs against the reference's prompt decoder, on a grid of clicks.

    All three masks of a click are compared, each with its own: ``everything`` filters them one by one, and for a click
    without an object the scores are nearly tied, so that the first rank would be chance.

    Args:
        images: uint8 (H, W, 3) RGB.
        side: points per side of the grid.
    """
    result = Agreement()
    for rgb in images:
        pair = [Predictor(p.runtime, exact=False).embed(rgb) for p in (reference, candidate)]
        frame = pair[0].frame
        points = point_grid(side) * (frame.width, frame.height)
        answers = [[np.concatenate(parts) for parts in zip(*PointDecoder(p, e, graphs).answers(points), strict=True)]
                   for p, e, graphs in zip((reference, candidate), pair, (False, True), strict=True)]
        (_, ref_masks, ref_scores), (_, masks, scores) = answers
        result.note_error("low_res_masks", ref_masks, masks)
        result.note_error("iou_predictions", ref_scores, scores)
        result.flips += int((ref_scores.argmax(1) != scores.argmax(1)).sum())
        for a, b in zip(ref_masks.reshape(-1, *masks.shape[2:]), masks.reshape(-1, *masks.shape[2:]), strict=True):
            result.ious["point"].append(mask_iou(*(masks_from_logits(m[None], frame)[0] for m in (a, b))))
        result.ids.append(image_id(rgb))
    return result


def sample_prompts(predictor: Predictor, height: int, width: int, count: int,
                   rng: np.random.Generator) -> list[tuple[str, Prompt]]:
    """Seeded prompts on the objects that a model sees in its current image, as a user would give them.

    A random click finds an object (the mask the model ranks first); prompts are alternately its tight box and its
    innermost point. Where that mask is next to nothing or nearly everything, the prompt is a random box (12 to 70 % of
    each side) or the click itself. Prompts without any object are no measure: the logits are flat there, and which side
    of zero they end on is chance.
    """
    frame, spec = predictor.current.frame, predictor.spec
    clicks = rng.uniform(0, 1, (count, 2)) * (width, height)
    sides = rng.uniform(0.12, 0.7, (count, 2)) * (width, height)
    logits, scores = predictor.decode_prompts([Prompt.of(frame, spec, points=[c], labels=[1]) for c in clicks])
    out: list[tuple[str, Prompt]] = []
    for i, click in enumerate(clicks):
        mask = masks_from_logits(logits[i, best_token(scores[i])][None], frame)[0]
        found = SMALLEST <= float(mask.mean()) <= LARGEST
        if i % 2 == 0:
            x, y = click / (width, height) * ((width, height) - sides[i])
            box = tight_box(mask) if found else (x, y, x + sides[i, 0], y + sides[i, 1])
            out.append(("box", Prompt.of(frame, spec, box=box)))
        else:
            out.append(("point", Prompt.of(frame, spec, points=[inner_point(mask) if found else click], labels=[1])))
    return out


def _compare_image(reference: Predictor, candidate: Predictor, rgb: Rgb, rng: np.random.Generator, count: int,
                   result: Agreement, tensors: bool) -> None:
    ours, theirs = reference.set_image(rgb), candidate.set_image(rgb)
    for name, tensor in ours.features.items() if tensors else ():
        result.note_error(name, tensor, theirs.features[name])
    prompts = sample_prompts(reference, rgb.shape[0], rgb.shape[1], count, rng)
    ref_masks, ref_scores = reference.decode_prompts([p for _, p in prompts])
    if tensors and reference.spec.mask_prompt:
        # The last point is refined with the reference's own mask, so that mask_input is exercised.
        kind, last = prompts[-1]
        refined = Prompt(last.points, last.labels, last.box, ref_masks[-1, 0].copy())
        extra_masks, extra_scores = reference.decode_prompts([refined])
        prompts = [*prompts[:-1], (kind, refined)]
        ref_masks[-1], ref_scores[-1] = extra_masks[0], extra_scores[0]
    masks, scores = _decoded_both_ways(candidate, [p for _, p in prompts])
    if tensors:
        result.note_error("low_res_masks", ref_masks, masks)
        result.note_error("iou_predictions", ref_scores, scores)
    for i, (kind, _) in enumerate(prompts):
        token, other = (0, 0) if kind == "box" else (best_token(s) for s in (ref_scores[i], scores[i]))
        result.flips += token != other
        a = masks_from_logits(ref_masks[i, token][None], ours.frame)[0]
        b = masks_from_logits(masks[i, other][None], theirs.frame)[0]
        result.ious[kind].append(mask_iou(a, b))


def _decoded_both_ways(predictor: Predictor, prompts: Sequence[Prompt]) -> tuple[Floats, Floats]:
    """As ``decode_prompts``, every other box and every other point alone, the rest in a whole batch: in some formats
    these are graphs of their own.
    """
    alone = [i for i in range(len(prompts)) if i % 4 < 2]
    together = [i for i in range(len(prompts)) if i % 4 >= 2]
    answers = {i: tuple(a[0] for a in predictor.decode_prompts([prompts[i]])) for i in alone}
    if together:
        filled = [prompts[together[k % len(together)]] for k in range(max(DECODER_BATCH, len(together)))]
        answers |= dict(zip(together, zip(*predictor.decode_prompts(filled), strict=True), strict=False))
    masks, scores = zip(*(answers[i] for i in range(len(prompts))), strict=True)
    return np.stack(masks), np.stack(scores)
