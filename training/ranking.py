"""The head that predicts IoU, fitted anew to the answers of the finished model: which mask a click gets depends on it.

While masks are trained the head follows them and is never done. Afterwards what it reads, the IoU token, is fixed, so
answers are collected once and the head alone is fitted in minutes. No mask changes.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.files import check_writable
from pocketsam.labelled import Labelled, Stored, read_stored
from pocketsam.models.mask_decoder import Mlp
from pocketsam.models.sam import SegmentAnything
from pocketsam.prompts import Prompt
from pocketsam.training.distance import centre_point
from pocketsam.training.evaluate import (
    answer_to,
    box_prompts,
    click_prompts,
    corrected,
    embedded,
    in_slots,
    pearson,
    region_masks,
    small_target,
)
from pocketsam.training.losses import mask_iou
from pocketsam.training.rounds import chosen_logits
from pocketsam.training.seeds import seeded
from pocketsam.training.ship import load_weights, write_half

REGIONS = 10
# Of all photos, those whose answers only judge the fit.
HELD_OUT = 16
BATCH, STEPS, WARMUP, RATE, DECAY = 2048, 600, 50, 1e-3, 0.01
# Weight of the loss on ranking, and the difference of scores that it sees.
RANKING, TEMPERATURE = 0.3, 0.05
# Added to what the head reads, in standard deviations, because a photo gives many similar answers.
NOISE = 0.3


@dataclass(frozen=True)
class Answers:
    """What a model answered to K prompts.

    Attributes:
        tokens: float32 (K, C), the IoU token in front of the head.
        iou: float32 (K, 4), true IoU of each mask at the decoder's resolution.
        ambiguous: bool (K,), a single point.
        weights: float32 (K,), how often to draw each.
    """

    tokens: Tensor
    iou: Tensor
    ambiguous: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Standing:
    """How well scores rank: mean IoU of the mask ranked first for single points, of the best of the three, and the
    correlation of predicted and true IoU over the answers that a user sees."""

    ranked: float
    oracle: float
    pearson: float | None


def rank(weights: Path, packs: Sequence[Path], out: Path, seed: int = 0,
         workers: int = 2) -> tuple[Standing, Standing]:
    """Fit the head of some weights and write them, otherwise unchanged, as ``ship`` does.

    Args:
        weights: a run's folder or a ``.safetensors`` file.
        packs: what they were trained on.
        workers: processes.

    Returns:
        The standing on held-out photos of the packs before and after.

    Raises:
        CheckpointError: the weights are not lite0's.
        OutputError: ``out`` cannot be written.
    """
    model = load_weights(weights)
    check_writable(out)
    fitted, judged = collect(weights, packs, seed, workers)
    before = model.mask_decoder.iou_prediction_head
    after = model.mask_decoder.iou_prediction_head = fit_ranking(before, fitted, seed)
    write_half(model.state_dict(), out)
    return standing(before, judged), standing(after, judged)


def collect(weights: Path, packs: Sequence[Path], seed: int = 0, workers: int = 2) -> tuple[Answers, Answers]:
    """The answers to fit a head to, and those of every sixteenth photo to judge it by.

    Sources count with the square root of their answers, as in training.
    """
    stored = [s for path in packs for s in read_stored(path)]
    work = functools.partial(_stored_answers, weights, seed)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    # Forked processes would share the locks of torch's threads.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for row in pool.map(work, range(len(stored)), stored, chunksize=4):
            rows.append(row)
            if len(rows) % 200 == 0:
                print(f"{len(rows)} of {len(stored)} photos", flush=True)
    counts: Counter[str] = Counter()
    for photo, row in zip(stored, rows, strict=True):
        counts[photo.row["source"]] += len(row[0])
    parts = [(*row, torch.full((len(row[0]),), max(1, counts[photo.row["source"]]) ** -0.5))
             for photo, row in zip(stored, rows, strict=True)]
    return _joined([p for i, p in enumerate(parts) if i % HELD_OUT]), _joined(parts[::HELD_OUT])


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> Answers:
    return Answers(*map(torch.cat, zip(*parts, strict=True)))


def _stored_answers(weights: Path, seed: int, index: int, stored: Stored) -> tuple[Tensor, Tensor, Tensor]:
    return photo_answers(_opened(weights), stored.decode(), seeded("cpu", seed, index))


@functools.cache
def _opened(weights: Path) -> SegmentAnything:
    """One model and one thread a process."""
    torch.set_num_threads(1)
    return load_weights(weights)


@torch.no_grad()
def photo_answers(model: SegmentAnything, sample: Labelled,
                  generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt with ten regions of any layer: a click in the middle, one anywhere, a box, a corrective second click.

    Returns:
        What :class:`Answers` holds, without the weights.
    """
    spec = model.spec
    truth = region_masks(sample, REGIONS, generator)
    frame, features = embedded(model, spec, sample)
    target = small_target(truth, frame, spec.mask_size)
    seen = target.flatten(1).any(1)
    truth, target = truth[seen], target[seen]
    if not len(truth):
        return torch.zeros(0, spec.embed_dim), torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool)
    tokens: list[Tensor] = []
    iou: list[Tensor] = []
    ambiguous: list[Tensor] = []

    def ask(prompts: list[Prompt], mask: Tensor | None) -> Tensor:
        sent = in_slots(prompts, frame, spec, target)
        logits, scores = answer_to(model, features, sent, mask)
        iou.append(mask_iou(logits, target[:, None].expand_as(logits)))
        ambiguous.append(sent.ambiguous)
        return chosen_logits(logits, scores, sent.ambiguous)

    middle, anywhere = (click_prompts([at(m) for m in truth], frame, spec)
                        for at in (centre_point, functools.partial(_point_in, generator=generator)))
    head = model.mask_decoder.iou_prediction_head
    handle = head.register_forward_pre_hook(lambda _, x: tokens.append(x[0].flatten(0, -2)))
    try:
        mask = ask(middle, None)
        ask(corrected(middle, mask, target, frame, spec), mask)
        ask(anywhere, None)
        ask(box_prompts(truth, frame, spec), None)
    finally:
        handle.remove()
    return torch.cat(tokens), torch.cat(iou), torch.cat(ambiguous)


def _point_in(mask: Tensor, generator: torch.Generator) -> Tensor:
    """XY (2,) of a random pixel's centre."""
    inside = mask.flatten().nonzero()[:, 0]
    i = int(inside[torch.randint(len(inside), (), generator=generator)])
    return torch.tensor([i % mask.shape[1] + 0.5, i // mask.shape[1] + 0.5])


def fit_ranking(head: Mlp, answers: Answers, seed: int = 0, steps: int = STEPS) -> Mlp:
    """A copy of a head, fitted to predict each mask's IoU and to rank masks 1 to 3 of single points.

    The loss is the squared error of all four, plus what is lost when a point's mask is drawn by the softmax of its
    scores instead of chosen by the truth.
    """
    torch.manual_seed(seed)
    spread = answers.tokens.std(0)
    fitted = copy.deepcopy(head).requires_grad_(True)
    optimizer = torch.optim.AdamW(fitted.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * i / steps)))
    for _ in range(steps):
        rows = torch.multinomial(answers.weights, BATCH, replacement=True)
        tokens = answers.tokens[rows]
        scores, iou = fitted(tokens + NOISE * spread * torch.randn_like(tokens)), answers.iou[rows]
        points = answers.ambiguous[rows]
        three = iou[points, 1:]
        drawn = ((scores[points, 1:] / TEMPERATURE).softmax(1) * three).sum(1)
        loss = F.mse_loss(scores, iou) + RANKING * (three.amax(1) - drawn).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return fitted.requires_grad_(False)


@torch.no_grad()
def standing(head: Mlp, answers: Answers) -> Standing:
    """Judge a head on answers that it was not fitted to."""
    scores, points = head(answers.tokens), answers.ambiguous
    first = torch.where(points, 1 + scores[:, 1:].argmax(1), 0)[:, None]
    seen, predicted = answers.iou.gather(1, first)[:, 0], scores.gather(1, first)[:, 0]
    return Standing(float(seen[points].mean()), float(answers.iou[points, 1:].amax(1).mean()),
                    pearson(predicted.tolist(), seen.tolist()))
