"""The losses of the SAM paper (appendix A): focal and dice at 20 : 1, and regression of the predicted IoU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_WEIGHT = 20.0
DICE_WEIGHT = 1.0
IOU_WEIGHT = 1.0
GAMMA = 2.0


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss, averaged over pixels, without class balancing.

    With soft targets the modulating factor is |target - p| ** gamma, which is the usual one where the target is 0 or 1.

    Args:
        logits: (..., h, w).
        target: (..., h, w), the covered fraction of each pixel.

    Returns:
        (...).
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (entropy * (target - logits.sigmoid()).abs() ** GAMMA).mean((-2, -1))


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1) over the last two dimensions."""
    p = logits.sigmoid()
    overlap = (p * target).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (p.sum((-2, -1)) + target.sum((-2, -1)) + 1)


def mask_iou(logits: Tensor, target: Tensor) -> Tensor:
    """IoU of the thresholded masks over the last two dimensions; two empty masks agree fully."""
    a, b = logits > 0, target > 0.5
    union = (a | b).sum((-2, -1))
    return torch.where(union > 0, (a & b).sum((-2, -1)) / union.clamp(min=1), 1.0)


def divergence(logits: Tensor, taught: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two masks' probabilities, averaged over the last two dimensions.

    Args:
        logits, taught: (..., h, w); no gradient flows into ``taught``.
    """
    with torch.no_grad():
        probability = taught.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(taught, probability, reduction="none")
    return (F.binary_cross_entropy_with_logits(logits, probability, reduction="none") - entropy).mean((-2, -1))


def per_prompt(errors: Tensor, ambiguous: Tensor) -> Tensor:
    """(M, 4) errors of masks or scores -> (M,): the mean of 1 to 3 for a single point, 0 for any other prompt."""
    return torch.where(ambiguous, errors[:, 1:].mean(1), errors[:, 0])


def prompt_loss(logits: Tensor, scores: Tensor, target: Tensor, ambiguous: Tensor) -> dict[str, Tensor]:
    """Loss of a batch of prompts.

    A single point is ambiguous: of the masks 1 to 3 only the best one is back-propagated, while all three predicted
    IoUs are regressed. Every other prompt trains mask 0 alone.

    Args:
        logits: (M, 4, h, w).
        scores: (M, 4) predicted IoU.
        target: (M, h, w), the covered fraction of each pixel.
        ambiguous: (M,) bool, true for a single point.

    Returns:
        Scalars ``loss``, ``focal``, ``dice``, ``iou_error`` (mean square) and ``iou`` (of the trained mask).
    """
    targets = target[:, None].expand_as(logits)
    focal, dice = focal_loss(logits, targets), dice_loss(logits, targets)
    with torch.no_grad():
        true_iou = mask_iou(logits, targets)
        cost = FOCAL_WEIGHT * focal + DICE_WEIGHT * dice
        best = 1 + cost[:, 1:].argmin(1)
        chosen = torch.where(ambiguous, best, torch.zeros_like(best))[:, None]
    iou_error = per_prompt((scores - true_iou) ** 2, ambiguous).mean()
    parts = {"focal": focal.gather(1, chosen).mean(), "dice": dice.gather(1, chosen).mean(), "iou_error": iou_error}
    loss = FOCAL_WEIGHT * parts["focal"] + DICE_WEIGHT * parts["dice"] + IOU_WEIGHT * iou_error
    return {"loss": loss, **parts, "iou": true_iou.gather(1, chosen).mean()}
