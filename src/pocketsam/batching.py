"""Prompt batches for engines whose graphs have fixed batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pocketsam.prompts import EMPTY_SLOT
from pocketsam.runtime import Tensors

# One prompt while a user clicks, sixteen for boxes and grids.
ENTRY_BATCHES = (1, 16)
# A graph of sixteen takes as long as 12 to 17 single prompts, however few of its places are filled (ADR 0004).
WORTH = 0.85


def decode_padded(prompts: Tensors, run: Callable[[int, Tensors], Tensors],
                  sizes: Sequence[int] = ENTRY_BATCHES) -> Tensors:
    """Decode B prompts with graphs of fixed batch sizes.

    A larger size is used when at least ``WORTH`` of it is there to decode; what is missing is filled up with empty
    prompts, whose answers are dropped.

    Args:
        prompts: ``decoder_inputs`` with leading dimension B.
        run: called with a size and prompts padded to it; returns outputs with that leading dimension.
        sizes: the batch sizes that exist, ascending.

    Returns:
        The outputs with leading dimension B.
    """
    total = len(prompts["point_labels"])
    parts: list[Tensors] = []
    start = 0
    while start < total:
        size = max(s for s in sizes if s == sizes[0] or total - start >= WORTH * s)
        count = min(size, total - start)
        out = run(size, {k: _padded(k, v[start:start + count], size) for k, v in prompts.items()})
        parts.append({k: v[:count] for k, v in out.items()})
        start += count
    return parts[0] if len(parts) == 1 else {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def _padded(name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
            size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if len(values) == size:
        return values
    fill = np.full((size - len(values), *values.shape[1:]), EMPTY_SLOT if name == "point_labels" else 0, np.float32)
    return np.concatenate([values, fill])
