"""Training batches: images cut from the cache, and for each some regions of one layer chosen at random."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.errors import LabelError
from pocketsam.training.augment import (
    Augment,
    apply_colour,
    colour_factors,
    cut_image,
    cut_labels,
    sample_window,
    uniform,
)
from pocketsam.training.packs import Cache

MASK_STRIDE = 4
# In pixels of the decoder's masks; smaller regions have no reliable shape there.
LEAST_AREA = 10
TRIES = 20
# Of images with annotated and proposed layers, how often one of the latter is shown.
PROPOSED_RATE = 0.35


@dataclass(frozen=True)
class Cut:
    """A batch as it is made on the host and carried to the model's device.

    Attributes:
        images: uint8 (B, 3, S, S).
        valid: bool (B, 1, S, S), false where the image is padded.
        covered: uint8 (B * P, S / 4, S / 4), how many of the 16 pixels under each mask pixel belong to the region.
        boxes: float32 (B * P, 4), x0, y0, x1, y1 in the S x S frame.
        colour: float32 (3, B) brightness, contrast and saturation to apply.
        shown: int64 (B,), the image's place in the cache, or -1 where it was cut, scaled or flipped.
    """

    images: Tensor
    valid: Tensor
    covered: Tensor
    boxes: Tensor
    colour: Tensor
    shown: Tensor

    def batch(self, device: torch.device) -> Batch:
        """Move to the device and finish there."""
        images, valid, covered, boxes, colour = (
            t.to(device, non_blocking=True) for t in (self.images, self.valid, self.covered, self.boxes, self.colour))
        return Batch(apply_colour(images.float(), colour), valid.float(), covered.float() / MASK_STRIDE ** 2, boxes,
                     self.shown)


@dataclass(frozen=True)
class Batch:
    """B images with P regions each; row i * P + j of the targets belongs to image i.

    Attributes:
        images: float32 (B, 3, S, S) on the 0..255 scale.
        valid: float32 (B, 1, S, S), 0 where the image is padded.
        targets: float32 (B * P, S / 4, S / 4), the covered fraction of each pixel.
        boxes: float32 (B * P, 4), x0, y0, x1, y1 in the S x S frame.
        shown: int64 (B,), the image's place in the cache, or -1 where it was cut, scaled or flipped.
    """

    images: Tensor
    valid: Tensor
    targets: Tensor
    boxes: Tensor
    shown: Tensor


def image_weights(cache: Cache) -> Tensor:
    """Sampling weights (N,): each source counts with the square root of its number of regions.

    Raises:
        LabelError: no image has any.
    """
    regions, images = Counter[str](), Counter(cache.sources)
    for source, count in zip(cache.sources, cache.regions, strict=True):
        regions[source] += count
    if not any(regions.values()):
        raise LabelError("no photo of the packs has an annotated region; add packs with annotations, or let a model "
                         "propose regions.")
    weights = [regions[s] ** 0.5 / images[s] if count else 0.0
               for s, count in zip(cache.sources, cache.regions, strict=True)]
    return torch.tensor(weights)


def make_batch(cache: Cache, weights: Tensor, images: int, prompts: int, size: int, augment: Augment,
               generator: torch.Generator) -> Cut:
    """Draw a batch.

    Args:
        cache: decoded packs.
        weights: (N,) sampling weights.
        images: B.
        prompts: P.
        size: side S of the model frame, a multiple of 32.
        augment: strength.
        generator: on the CPU; decides images, layers, windows and regions.
    """
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor, int]] = []
    for _ in range(TRIES * images):
        row = _cut(cache, weights, prompts, size, augment, generator)
        if row is not None:
            rows.append(row)
        if len(rows) == images:
            break
    else:
        raise ValueError(f"no regions of at least {LEAST_AREA} mask pixels found in {TRIES * images} images")
    pixels, valid, covered, boxes, shown = zip(*rows, strict=True)
    return Cut(torch.stack(pixels), torch.stack(valid), torch.cat(covered), torch.cat(boxes),
               colour_factors(images, augment, generator), torch.tensor(shown))


def _cut(cache: Cache, weights: Tensor, prompts: int, size: int, augment: Augment,
         generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, int] | None:
    """One image with its regions, or None when the window shows none."""
    index = int(torch.multinomial(weights, 1, generator=generator))
    layers = cache.layers[index]
    if cache.proposed and cache.proposed[index] and (not layers or uniform(generator) < PROPOSED_RATE):
        layers = cache.proposed[index]
    layer = layers[int(torch.randint(len(layers), (), generator=generator))]
    window = sample_window(cache.content[index], cache.size, size, augment, generator)
    labels = cut_labels(cache.labels[layer], window, size)
    areas = torch.bincount(labels.flatten().long())
    visible = areas >= LEAST_AREA * MASK_STRIDE ** 2
    visible[0] = False
    ids = visible.nonzero()[:, 0]
    if not len(ids):
        return None
    order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(-(-prompts // len(ids)))])
    masks = labels == ids[order[:prompts]][:, None, None]
    image, valid = cut_image(cache.images[index], window, size)
    covered = F.avg_pool2d(masks.float(), MASK_STRIDE, divisor_override=1).to(torch.uint8)
    return image, valid, covered, boxes_of(masks), index if window.whole else -1


def boxes_of(masks: Tensor) -> Tensor:
    """Tight boxes of non-empty masks: (P, H, W) bool -> float32 (P, 4) x0, y0, x1, y1, the far sides exclusive."""
    columns, rows = masks.any(1).float(), masks.any(2).float()
    x0, y0 = columns.argmax(1), rows.argmax(1)
    x1, y1 = columns.shape[1] - columns.flip(1).argmax(1), rows.shape[1] - rows.flip(1).argmax(1)
    return torch.stack([x0, y0, x1, y1], 1).float()
