"""The head that predicts IoU, fitted anew to the answers of the finished model: which mask a click gets depends on it.

While masks are trained the head follows them and is never done. Afterwards what it reads, the IoU token, is fixed, so
answers are collected once and the head alone is fitted in minutes. No mask changes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketsam.models.sam import SegmentAnything
from pocketsam.training.augment import Augment
from pocketsam.training.batches import Batch, image_weights, make_batch
from pocketsam.training.distance import centre_points
from pocketsam.training.evaluate import pearson
from pocketsam.training.feed import Feed, seeded
from pocketsam.training.losses import mask_iou
from pocketsam.training.packs import Cache, build_cache
from pocketsam.training.prompts import FOREGROUND, Prompts, correction_clicks, first_prompts
from pocketsam.training.rounds import answer, chosen_logits, encode, repeat
from pocketsam.training.ship import load_weights, write_half

IMAGES, PROMPTS = 4, 12
BOX_RATE = 1 / 3
CENTRE_RATE = 0.5
# Of all images, those whose answers only judge the fit.
HELD_OUT = 8
MOSTLY_WHOLE = Augment(whole=0.7, flip=0.5)
# Scores this far apart are told apart by the loss on ranking.
TEMPERATURE = 0.1
BATCH, STEPS, WARMUP, RATE, DECAY = 2048, 600, 100, 1e-3, 0.01


@dataclass(frozen=True)
class Answers:
    """What a model answered to K prompts.

    Attributes:
        tokens: float32 (K, C), the IoU token in front of the head.
        iou: float32 (K, 4), true IoU of each mask at the decoder's resolution.
        ambiguous: bool (K,), a single point.
    """

    tokens: Tensor
    iou: Tensor
    ambiguous: Tensor


@dataclass(frozen=True)
class Standing:
    """How well scores rank: mean IoU of the mask ranked first for single points, of the best of the three, and the
    correlation of predicted and true IoU over the answers that a user sees."""

    ranked: float
    oracle: float
    pearson: float | None


def rank(weights: Path, packs: Sequence[Path], out: Path, batches: int, seed: int = 0) -> tuple[Standing, Standing]:
    """Fit the head of some weights and write them, otherwise unchanged, as ``ship`` does.

    Returns:
        The standing on held-out images of the packs before and after.

    Raises:
        ValueError: the weights are not lite0's.
    """
    model = load_weights(weights)
    cache = build_cache(packs, model.spec.image_size)
    judged = collect(model, cache, max(1, batches // HELD_OUT), seed, True)
    answers = collect(model, cache, batches, seed, False)
    before = model.mask_decoder.iou_prediction_head
    after = model.mask_decoder.iou_prediction_head = fit_ranking(before, answers, seed)
    write_half(model.state_dict(), out)
    return standing(before, judged), standing(after, judged)


@torch.no_grad()
def collect(model: SegmentAnything, cache: Cache, batches: int, seed: int, held_out: bool) -> Answers:
    """Prompt a model with the regions of packs: a box or a point, then one corrective click.

    Args:
        model: its weights and mode are left as they are.
        cache: images at the model's own input side.
        batches: of 48 regions, images drawn as in training.
        seed: of the draw.
        held_out: every eighth image, or all but those.
    """
    weights = image_weights(cache)
    chosen = torch.arange(len(weights)) % HELD_OUT == 0
    weights[chosen != held_out] = 0
    size, tokens = model.spec.image_size, []
    rows: list[tuple[Tensor, Tensor]] = []
    handle = model.mask_decoder.iou_prediction_head.register_forward_pre_hook(lambda _, x: tokens.append(x[0]))
    feed = Feed(lambda i: make_batch(cache, weights, IMAGES, PROMPTS, size, MOSTLY_WHOLE,
                                     seeded("cpu", seed, i, str(held_out))), 1)
    try:
        for i in range(batches):
            batch = feed.get(i).batch(torch.device("cpu"))
            rows += _answers(model, batch, seeded("cpu", seed, i, "prompts"))
            if (i + 1) % 50 == 0:
                print(f"{i + 1} of {batches} batches", flush=True)
    finally:
        handle.remove()
        feed.close()
    iou, ambiguous = zip(*rows, strict=True)
    return Answers(torch.cat([t.flatten(0, -2) for t in tokens]), torch.cat(iou), torch.cat(ambiguous))


def _answers(model: SegmentAnything, batch: Batch, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """True IoU (M, 4) and whether the prompt was ambiguous (M,), for both rounds."""
    size = batch.images.shape[-1]
    features = repeat(encode(model, batch.images, batch.valid), PROMPTS)
    prompts = _some_at_centre(first_prompts(batch.targets, batch.boxes, size, generator, BOX_RATE), batch.targets,
                              size, generator)
    rows, mask = [], None
    for round_ in range(2):
        logits, scores = answer(model, features, prompts, mask)
        rows.append((mask_iou(logits, batch.targets[:, None].expand_as(logits)), prompts.ambiguous))
        if round_ == 0:
            mask = chosen_logits(logits, scores, prompts.ambiguous)
            prompts = prompts.clicked(*correction_clicks(mask, batch.targets, size, generator))
    return rows


def _some_at_centre(prompts: Prompts, targets: Tensor, size: int, generator: torch.Generator) -> Prompts:
    """Half of the points farthest from the boundary, where people click and ``evaluate`` does."""
    centres = centre_points(targets > FOREGROUND) * (size / targets.shape[-1])
    moved = torch.rand(len(targets), 1, generator=generator) < CENTRE_RATE
    coords = prompts.coords.clone()
    coords[:, -1] = torch.where(moved, centres, coords[:, -1])
    return replace(prompts, coords=coords)


def fit_ranking(head: nn.Module, answers: Answers, seed: int = 0, steps: int = STEPS) -> nn.Module:
    """A copy of a head, fitted to predict each mask's IoU and to rank masks 1 to 3 of single points.

    The loss is the squared error of all four, plus what is lost when a point's mask is drawn by the softmax of its
    scores instead of chosen by the truth.
    """
    torch.manual_seed(seed)
    fitted = copy.deepcopy(head).requires_grad_(True)
    optimizer = torch.optim.AdamW(fitted.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * i / steps)))
    for _ in range(steps):
        rows = torch.randint(len(answers.tokens), (BATCH,))
        scores, iou = fitted(answers.tokens[rows]), answers.iou[rows]
        points = answers.ambiguous[rows]
        three = iou[points, 1:]
        drawn = ((scores[points, 1:] / TEMPERATURE).softmax(1) * three).sum(1)
        loss = F.mse_loss(scores, iou) + (three.amax(1) - drawn).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
        schedule.step()
    return fitted.requires_grad_(False)


@torch.no_grad()
def standing(head: nn.Module, answers: Answers) -> Standing:
    """Judge a head on answers that it was not fitted to."""
    scores, points = head(answers.tokens), answers.ambiguous
    first = torch.where(points, 1 + scores[:, 1:].argmax(1), 0)[:, None]
    seen, predicted = answers.iou.gather(1, first)[:, 0], scores.gather(1, first)[:, 0]
    return Standing(float(seen[points].mean()), float(answers.iou[points, 1:].amax(1).mean()),
                    pearson(predicted.tolist(), seen.tolist()))
