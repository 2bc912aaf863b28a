"""A cache that holds every image of some packs decoded at one square size.

A *layer* of a pack is one person's or one kind's annotation of the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pocketsam.errors import LabelError
from pocketsam.labelled import Labelled, Stored, read_stored


@dataclass
class Cache:
    """Every image of some packs in one square frame, content at the top left, black elsewhere.

    Attributes:
        images: uint8 (N, S, S, 3).
        labels: int16 (L, S, S), one row per layer.
        content: (height, width) of each image inside the frame.
        layers: rows of ``labels`` per image.
        sources: source name per image.
        regions: number of regions per image, over all its layers, or over what was proposed where it has no layer.
        proposed: rows of ``labels`` per image that a teacher proposed (``propose.py``), or nothing at all.
    """

    images: Tensor
    labels: Tensor
    content: list[tuple[int, int]]
    layers: list[list[int]]
    sources: list[str]
    regions: list[int]
    proposed: list[list[int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return int(self.images.shape[1])


def build_cache(paths: Sequence[Path], size: int, workers: int = 2, limit: int | None = None) -> Cache:
    """Decode packs into one cache.

    Args:
        paths: the tars.
        size: side S of the frame; the long side of every image becomes S.
        workers: decoding threads.
        limit: at most this many images of each pack, spread evenly.
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    cache = Cache(torch.empty(0), torch.empty(0), [], [], [], [])

    def place(stored: Stored) -> tuple[Labelled, Tensor, list[Tensor], tuple[int, int]]:
        sample = stored.decode()
        return sample, *_place(sample, size)

    for path in paths:
        with ThreadPoolExecutor(workers) as pool:
            for sample, image, layers, content in pool.map(place, read_stored(path, limit=limit)):
                images.append(image)
                cache.layers.append(list(range(len(labels), len(labels) + len(layers))))
                labels.extend(layers)
                cache.content.append(content)
                cache.sources.append(sample.source)
                cache.regions.append(sum(int(layer.max()) for layer in layers))
    cache.images = torch.stack(images)
    cache.labels = torch.stack(labels) if labels else torch.zeros(0, size, size, dtype=torch.int16)
    return cache


def nearest_index(source: int, target: int) -> NDArray[np.int64]:
    """For each of ``target`` pixels the source pixel under its centre: int64 (target,)."""
    index: NDArray[np.int64] = np.minimum((np.arange(target) + 0.5) * source / target, source - 1).astype(np.int64)
    return index


def fit(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) scaled so that the long side is ``size``, rounded as the host does it."""
    scale = size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _numbered(layer: NDArray[np.int32], name: str) -> NDArray[np.int16]:
    """Region ids 1, 2, ... in the order of the given ones, which may be any; 0 stays.

    Raises:
        LabelError: more regions than 16 bits can number.
    """
    ids = np.unique(layer[layer > 0])
    if len(ids) > np.iinfo(np.int16).max:
        raise LabelError(f"a layer of {name} has {len(ids)} regions; expected at most {np.iinfo(np.int16).max}.")
    found: NDArray[np.int16] = np.where(layer > 0, np.searchsorted(ids, layer) + 1, 0).astype(np.int16)
    return found


def _place(sample: Labelled, size: int) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
    height, width = sample.image.shape[:2]
    h, w = fit(height, width, size)
    image = torch.zeros(size, size, 3, dtype=torch.uint8)
    resized = Image.fromarray(sample.image).resize((w, h), Image.Resampling.BILINEAR)
    image[:h, :w] = torch.from_numpy(np.array(resized))
    rows, columns = nearest_index(height, h), nearest_index(width, w)
    layers = []
    for layer in sample.layers:
        out = torch.zeros(size, size, dtype=torch.int16)
        out[:h, :w] = torch.from_numpy(_numbered(layer[rows][:, columns], sample.id))
        layers.append(out)
    return image, layers, (h, w)
