"""One interactive episode: encode images once, then answer a prompt, correct it, and answer again."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pocketsam.models.sam import Features, SegmentAnything
from pocketsam.training.batches import Batch
from pocketsam.training.losses import prompt_loss
from pocketsam.training.prompts import Prompts, click_slots, correction_clicks, first_prompts

MASK_ONLY_RATE = 0.5


class Teacher(Protocol):
    """Another model that answers the same prompts; see ``distill``."""

    def observe(self, batch: Batch) -> None:
        """Encode the images of a batch."""

    def embedding_loss(self, features: Features) -> Tensor:
        """How far the student's features (batch B) are from the teacher's: a scalar."""

    def answer_loss(self, prompts: Prompts, logits: Tensor, scores: Tensor) -> Tensor:
        """How far the student's answers (M, 4, h, w) and (M, 4) are from the teacher's: a scalar."""


def set_input_size(model: SegmentAnything, size: int) -> None:
    """Run the model at another side S; positions are encoded relative to the frame, so weights do not change."""
    stride = model.spec.image_size // model.spec.embed_size
    model.prompt_encoder.image_size = size
    model.prompt_encoder.embed_size = size // stride


def encode(model: SegmentAnything, images: Tensor, valid: Tensor) -> Features:
    """Normalise, zero-pad and encode.

    Args:
        images: float32 (B, 3, S, S) on 0..255.
        valid: float32 (B, 1, S, S).
    """
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (model.spec.mean, model.spec.std))
    x = (images - mean) / std * valid
    # On CPUs the bf16 weight gradient of a depthwise convolution takes several times as long as in fp32.
    keep = x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=keep):
        return model.encode(x.contiguous(memory_format=torch.channels_last))


def repeat(features: Features, prompts: int) -> Features:
    """One row of features per prompt: batch B -> B * P."""
    return {name: x.repeat_interleave(prompts, 0) for name, x in features.items()}


def chosen_logits(logits: Tensor, scores: Tensor, ambiguous: Tensor) -> Tensor:
    """The answer that a user would see: mask 0, or for a single point the best-ranked of masks 1 to 3.

    Args:
        logits: (M, 4, h, w).
        scores: (M, 4).
        ambiguous: (M,) bool.

    Returns:
        (M, h, w).
    """
    best = torch.where(ambiguous, 1 + scores[:, 1:].argmax(1), torch.zeros_like(ambiguous, dtype=torch.long))
    return logits[torch.arange(len(logits), device=logits.device), best]


def answer(model: SegmentAnything, features: Features, prompts: Prompts, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Decode M prompts with the previous logits (M, h, w) fed back: float32 logits (M, 4, h, w) and scores (M, 4)."""
    flags = None if mask is None else torch.ones(len(mask), device=mask.device)
    logits, scores, *_ = model.decode(features, prompts.coords, prompts.labels, None if mask is None else mask[:, None],
                                      flags, fixed_slots=True)
    return logits.float(), scores.float()


def episode(model: SegmentAnything, batch: Batch, rounds: int, generator: torch.Generator,
            teacher: Teacher | None = None) -> dict[str, Tensor]:
    """Losses of one batch, averaged over the rounds.

    The first round has one point or one jittered box; later ones add a click from the error region and feed the
    previous logits back; the last one adds no click half of the time.

    Args:
        model: in training mode.
        batch: B images, M = B * P regions.
        rounds: 0 learns the teacher's embeddings alone.
        generator: on the model's device.
        teacher: adds its losses to ``loss``.

    Returns:
        The scalars of :func:`prompt_loss`, ``iou_first`` of the first round, and ``distill`` with a teacher.
    """
    size = batch.images.shape[-1]
    encoded = encode(model, batch.images, batch.valid)
    totals: dict[str, Tensor] = {"loss": encoded["image_embeddings"].new_zeros(())}
    features = repeat(encoded, len(batch.targets) // len(batch.images))
    prompts = first_prompts(batch.targets, batch.boxes, size, generator)
    mask: Tensor | None = None
    if teacher is not None:
        teacher.observe(batch)
        totals["distill"] = teacher.embedding_loss(encoded)
    for i in range(rounds):
        logits, scores = answer(model, features, prompts, mask)
        with torch.autocast(logits.device.type, enabled=False):
            parts = prompt_loss(logits, scores, batch.targets, prompts.ambiguous)
        if teacher is not None:
            totals["distill"] = totals["distill"] + teacher.answer_loss(prompts, logits, scores) / rounds
        if i == 0:
            totals["iou_first"] = parts["iou"].detach()
        for name, value in parts.items():
            totals[name] = totals[name] + value / rounds if name in totals else value / rounds
        if i == rounds - 1:
            break
        mask = chosen_logits(logits, scores, prompts.ambiguous).detach()
        points, labels = correction_clicks(mask, batch.targets, size, generator)
        if i == rounds - 2:
            without = torch.rand((), generator=generator, device=labels.device) < MASK_ONLY_RATE
            labels = torch.where(without, click_slots(mask), labels)
        prompts = prompts.clicked(points, labels)
    if teacher is not None:
        totals["loss"] = totals["loss"] + totals["distill"]
    return totals
