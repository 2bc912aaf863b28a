"""Regions that nobody annotated, proposed by a teacher.

Most photos of the packs label one animal, one person or some cells and nothing else, so a student sees few kinds of
region. Where little of a photo is labelled, a trained model is asked everywhere, as for segmenting everything, and what
it is sure of becomes further layers of the cache. Overlapping regions lie in different layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pocketsam.grids import point_grid
from pocketsam.models.prompt_encoder import PADDING_POINT
from pocketsam.models.sam import SegmentAnything
from pocketsam.training.evaluate import answer_to
from pocketsam.training.packs import Cache
from pocketsam.training.prompts import Prompts
from pocketsam.training.rounds import encode

# Photos of which annotations cover less than this are proposed for.
SPARSE = 0.6
# Sources that show no photos: a teacher of photos proposes noise there.
NO_PHOTOS = {"dsb2018", "magtile"}
GRID = 8
# Thresholds as SAM's automatic mask generator has them, a little lower because few points are asked.
LEAST_SCORE, LEAST_STABILITY, STABILITY_OFFSET = 0.86, 0.9, 1.0
LARGEST = 0.7
SAME_IOU = 0.7
LAYERS = 2
# Of the smaller of two regions in one layer, the most that the other may cover.
OVERLAP = 0.05
MOST = 32
IMAGES_AT_ONCE = 16
COARSE = 64


@torch.no_grad()
def propose(teacher: SegmentAnything, cache: Cache, bf16: bool = False) -> Cache:
    """The cache with proposed layers for its sparsely labelled images.

    Args:
        teacher: any model whose frame is padded right and bottom, on its device.
        cache: decoded packs, on the CPU.
        bf16: autocast the teacher.
    """
    place = next(teacher.parameters()).device
    teacher.eval().requires_grad_(False)
    sparse = [i for i in range(len(cache.sources)) if cache.sources[i] not in NO_PHOTOS and _covered(cache, i) < SPARSE]
    layers: list[Tensor] = []
    proposed: list[list[int]] = [[] for _ in cache.sources]
    regions = list(cache.regions)
    with torch.autocast(place.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(sparse), IMAGES_AT_ONCE):
            index = sparse[start:start + IMAGES_AT_ONCE]
            for i, found in zip(index, _propose(teacher, cache, index, place), strict=True):
                proposed[i] = list(range(len(cache.labels) + len(layers), len(cache.labels) + len(layers) + len(found)))
                layers += found
                if not cache.layers[i]:
                    regions[i] = sum(int(layer.max()) for layer in found)
    return replace(cache, labels=torch.cat([cache.labels, torch.stack(layers)]) if layers else cache.labels,
                   regions=regions, proposed=proposed)


def _covered(cache: Cache, index: int) -> float:
    """Labelled fraction of an image, in its best layer; 0 where it has none."""
    height, width = cache.content[index]
    return max((float((cache.labels[layer, :height, :width] > 0).float().mean()) for layer in cache.layers[index]),
               default=0.0)


def _propose(teacher: SegmentAnything, cache: Cache, index: list[int], place: torch.device) -> Iterator[list[Tensor]]:
    side = teacher.spec.image_size
    scale = side / cache.size
    images = cache.images[index].to(place).permute(0, 3, 1, 2).float()
    images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    content = [(cache.content[i][0] * scale, cache.content[i][1] * scale) for i in index]
    valid = torch.zeros(len(index), 1, side, side, device=place)
    for i, (height, width) in enumerate(content):
        valid[i, :, :round(height), :round(width)] = 1
    features = encode(teacher, images, valid)
    grid = torch.from_numpy(point_grid(GRID)).float().to(place)
    for i, (height, width) in enumerate(content):
        points = grid * torch.tensor([width, height], device=place)
        logits, scores = answer_to(teacher, {k: v[i:i + 1] for k, v in features.items()}, _clicks(points), None)
        inside = F.interpolate(valid[i:i + 1], logits.shape[-2:], mode="nearest")[0] > 0
        masks = logits[:, 1:].flatten(0, 1)
        yield [paint(masks[rows], cache.size, cache.content[index[i]])
               for rows in choose(masks, scores[:, 1:].flatten(), inside)]


def _clicks(points: Tensor) -> Prompts:
    """A lone click at each of (M, 2) in the teacher's frame, with its padding point."""
    labels = torch.tensor([1.0, PADDING_POINT], device=points.device).expand(len(points), -1)
    return Prompts(torch.stack([points, torch.zeros_like(points)], 1), labels, labels[:, 0] > 0)


def choose(logits: Tensor, scores: Tensor, inside: Tensor) -> list[list[int]]:
    """Sure, distinct masks, best first, spread over layers without overlap.

    Args:
        logits: (K, h, w).
        scores: (K,) predicted IoU.
        inside: bool (1, h, w), false where the frame is padded.

    Returns:
        Rows of the masks in each of at most ``LAYERS`` layers.
    """
    masks = (logits > 0) & inside
    high, low = (((logits > t) & inside).sum((1, 2)) for t in (STABILITY_OFFSET, -STABILITY_OFFSET))
    areas = masks.sum((1, 2))
    good = (scores > LEAST_SCORE) & (high >= LEAST_STABILITY * low) & (areas > 0) & (areas < LARGEST * inside.sum())
    flat = F.adaptive_avg_pool2d(masks[good].float(), COARSE).flatten(1)
    shared = _numpy(flat @ flat.T)
    size, rows, order = _numpy(flat.sum(1)), good.nonzero()[:, 0].tolist(), _numpy(-scores[good]).argsort()
    kept: list[int] = []
    layers: list[list[int]] = []
    for i in order.tolist():
        if len(kept) == MOST:
            break
        if kept and (shared[i, kept] / (size[i] + size[kept] - shared[i, kept])).max() > SAME_IOU:
            continue
        free = next((x for x in layers if (shared[i, x] <= OVERLAP * np.minimum(size[i], size[x])).all()), None)
        if free is None and len(layers) < LAYERS:
            layers.append(free := [])
        if free is not None:
            free.append(i)
            kept.append(i)
    return [[rows[i] for i in layer] for layer in layers]


def paint(logits: Tensor, size: int, content: tuple[int, int]) -> Tensor:
    """A label map: logits (K, h, w) of the whole frame -> int16 (S, S) on the CPU, 0 outside the content."""
    masks = F.interpolate(logits[None].float(), (size, size), mode="bilinear")[0] > 0
    ids = torch.arange(1, len(masks) + 1, device=masks.device, dtype=torch.int16)
    labels = (masks * ids[:, None, None]).amax(0).cpu()
    labels[content[0]:], labels[:, content[1]:] = 0, 0
    return labels


def _numpy(x: Tensor) -> NDArray[np.float32]:
    return x.float().cpu().numpy()
