"""Simulated prompts (SAM paper, appendix A): a point or a jittered box first, then clicks in the error region.

Everything is batched over M prompts and runs on the model's device. Masks here are at the decoder's resolution
(h, w) = (S / 4, S / 4); coordinates are XY pixels in the S x S frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.models.prompt_encoder import EMPTY_SLOT, PADDING_POINT

BOX_JITTER = 0.1
# The paper's 20 pixels at S = 1024.
BOX_JITTER_MOST = 20 / 1024
# Of the boxes, those left tight: detectors draw them so, people do not.
TIGHT_RATE = 0.5
FOREGROUND = 0.5
DEPTH_STEPS = 12
BOX_SLOTS = 2


@dataclass
class Prompts:
    """A growing set of prompts: two slots for a box (or the padding point), then one slot per click.

    Attributes:
        coords: (M, N, 2) XY.
        labels: (M, N).
        ambiguous: (M,) bool, true while the prompt is a single point.
    """

    coords: Tensor
    labels: Tensor
    ambiguous: Tensor

    def clicked(self, points: Tensor, labels: Tensor) -> Prompts:
        """Add one click to every prompt; label ``EMPTY_SLOT`` adds none.

        Args:
            points: (M, 2) XY.
            labels: (M,).
        """
        return Prompts(torch.cat([self.coords, points[:, None]], 1), torch.cat([self.labels, labels[:, None]], 1),
                       torch.zeros_like(self.ambiguous))


def first_prompts(targets: Tensor, boxes: Tensor, size: int, generator: torch.Generator,
                  box_rate: float = 0.5) -> Prompts:
    """A box, tight or jittered, or a point for each mask.

    Args:
        targets: (M, h, w) covered fraction of each pixel.
        boxes: (M, 4) x0, y0, x1, y1 of the masks in the S x S frame.
        size: S.
        generator: on the same device.
        box_rate: probability of a box.
    """
    m = len(targets)
    is_box = torch.rand(m, generator=generator, device=targets.device) < box_rate
    tight = torch.rand(m, 1, generator=generator, device=targets.device) < TIGHT_RATE
    corners = torch.where(tight, boxes, jitter_boxes(boxes, size, generator)).reshape(m, BOX_SLOTS, 2)
    points = sample_points(targets > FOREGROUND, size, generator)
    coords = torch.cat([torch.where(is_box[:, None, None], corners, torch.zeros_like(corners)), points[:, None]], 1)
    as_box = torch.tensor([2.0, 3.0, EMPTY_SLOT], device=targets.device)
    as_point = torch.tensor([PADDING_POINT, EMPTY_SLOT, 1.0], device=targets.device)
    return Prompts(coords, torch.where(is_box[:, None], as_box, as_point), ~is_box)


def jitter_boxes(boxes: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Noise on each corner with a standard deviation of 10 % of the side, at most 20 / 1024 of the frame."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = torch.randn(boxes.shape, generator=generator, device=boxes.device) * BOX_JITTER * sides
    most = BOX_JITTER_MOST * size
    return (boxes + noise.clamp(-most, most)).clamp(0, size)


def correction_clicks(logits: Tensor, targets: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A click in the error region of each mask, positive where the mask misses, negative where it spills.

    Args:
        logits: (M, h, w) of the previous answer.
        targets: (M, h, w).

    Returns:
        (M, 2) XY and (M,) labels. A mask without error is clicked inside the object.
    """
    truth = targets > FOREGROUND
    error = (logits > 0) ^ truth
    error = torch.where(error.flatten(1).any(1)[:, None, None], error, truth)
    points = sample_points(error, size, generator)
    cells = (points * (targets.shape[-1] / size)).long().clamp(0, targets.shape[-1] - 1)
    rows = torch.arange(len(targets), device=targets.device)
    return points, truth[rows, cells[:, 1], cells[:, 0]].float()


def sample_points(masks: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random point in each mask: half of them anywhere, half drawn towards the middle, as people click.

    Args:
        masks: (M, h, w) bool; an empty mask gives an arbitrary point.

    Returns:
        (M, 2) XY in the S x S frame, anywhere inside the chosen pixel.
    """
    m, h, w = masks.shape
    weight = torch.where(torch.rand(m, 1, 1, generator=generator, device=masks.device) < 0.5,
                         masks.float(), depth(masks) ** 2)
    noise = torch.rand(masks.shape, generator=generator, device=masks.device)
    # The largest of u ** (1 / weight) is a draw with probability proportional to the weight.
    keys = torch.where(weight > 0, noise.clamp(min=1e-9).log() / weight.clamp(min=1e-9), -torch.inf)
    index = keys.flatten(1).argmax(1)
    cell = torch.stack([index % w, index // w], -1)
    inside = torch.rand(m, 2, generator=generator, device=masks.device)
    return (cell + inside.clamp(0.01, 0.99)) * (size / h)


def depth(masks: Tensor, steps: int = DEPTH_STEPS) -> Tensor:
    """How many 3 x 3 erosions each pixel survives, at most ``steps``: (M, h, w) bool -> float32, 0 outside."""
    x = masks[:, None].float()
    total = x.clone()
    for _ in range(steps - 1):
        x = -F.max_pool2d(-F.pad(x, (1, 1, 1, 1)), 3, 1)
        total += x
    return total[:, 0]


def click_slots(mask: Tensor) -> Tensor:
    """Labels for a round without a new click: ``EMPTY_SLOT`` for each of the (M,) prompts."""
    return torch.full(mask.shape[:1], float(EMPTY_SLOT), device=mask.device)
