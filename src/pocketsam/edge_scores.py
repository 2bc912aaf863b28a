"""The BSDS edge benchmark: thinned edges matched one to one with each annotator's, ODS, OIS and AP.

Needs scipy (``pip install 'pocketsam[tasks]'``); nothing else of the package does.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocketsam.errors import MissingDependency
from pocketsam.geometry import Bools
from pocketsam.resampling import Floats

# The benchmark's: two pixels match up to this fraction of the photo's diagonal apart.
TOLERANCE = 0.0075
THRESHOLDS = np.linspace(0.03, 0.99, 33)
Counts = NDArray[np.float64]


@dataclass(frozen=True)
class EdgeScores:
    """F-measure with one threshold for all photos, with the best one for each photo, and the area under the curve."""

    ods: float
    ois: float
    ap: float
    threshold: float


def boundaries(layer: NDArray[np.int32]) -> Bools:
    """bool (H, W): pixels whose right, lower or lower right neighbour belongs to another region."""
    padded = np.pad(layer, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    edge: Bools = (here != padded[:-1, 1:]) | (here != padded[1:, :-1]) | (here != padded[1:, 1:])
    return edge


def skeleton(edges: Bools) -> Bools:
    """Thin to lines of one pixel (Zhang and Suen 1984)."""
    x = np.pad(edges, 1)
    while True:
        before = int(x.sum())
        for first in (True, False):
            # Neighbours clockwise from the north.
            n = [x[:-2, 1:-1], x[:-2, 2:], x[1:-1, 2:], x[2:, 2:], x[2:, 1:-1], x[2:, :-2], x[1:-1, :-2], x[:-2, :-2]]
            count = np.sum(n, axis=0, dtype=np.int8)
            rises = np.sum([~a & b for a, b in zip(n, [*n[1:], n[0]], strict=True)], axis=0, dtype=np.int8)
            north, east, south, west = n[0], n[2], n[4], n[6]
            kept = ((north & east & south) | (east & south & west) if first
                    else (north & east & west) | (north & south & west))
            remove = x[1:-1, 1:-1] & (count >= 2) & (count <= 6) & (rises == 1) & ~kept
            x[1:-1, 1:-1] &= ~remove
        if int(x.sum()) == before:
            return x[1:-1, 1:-1].copy()


def match(found: Bools, truth: Bools, tolerance: float = TOLERANCE) -> tuple[Bools, int]:
    """Largest one-to-one assignment of edge pixels that lie close enough.

    Args:
        found, truth: bool (H, W), thin.
        tolerance: fraction of the diagonal.

    Returns:
        Which found pixels (in ``np.nonzero`` order) are matched, and how many.

    Raises:
        MissingDependency: scipy is not installed.
    """
    try:
        sparse = importlib.import_module("scipy.sparse")
        graphs = importlib.import_module("scipy.sparse.csgraph")
    except ModuleNotFoundError as e:
        raise MissingDependency("scipy", "tasks", "the edge benchmark") from e
    h, w = truth.shape
    radius = tolerance * float(np.hypot(h, w))
    reach = int(radius)
    index = np.full((h + 2 * reach, w + 2 * reach), -1)
    index[reach:reach + h, reach:reach + w][truth] = np.arange(int(truth.sum()))
    ys, xs = np.nonzero(found)
    sources, targets = [], []
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dy * dy + dx * dx <= radius * radius:
                hit = index[ys + reach + dy, xs + reach + dx]
                sources.append(np.flatnonzero(hit >= 0))
                targets.append(hit[hit >= 0])
    rows, columns = np.concatenate(sources), np.concatenate(targets)
    if not len(rows):
        return np.zeros(len(ys), np.bool_), 0
    graph = sparse.csr_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(len(ys), int(truth.sum())))
    partner = graphs.maximum_bipartite_matching(graph, perm_type="column")
    matched: Bools = partner >= 0
    return matched, int(matched.sum())


def count(strength: Floats, truths: Sequence[Bools], thresholds: NDArray[np.float64] = THRESHOLDS) -> Counts:
    """Counts of one photo at every threshold.

    Args:
        strength: float32 (H, W), 0 to 1.
        truths: bool (H, W) edges of each annotator.

    Returns:
        float64 (T, 4): found pixels matched by any annotator, found pixels; true pixels matched, true pixels (both
        summed over annotators).
    """
    thin = [skeleton(t) for t in truths]
    total = sum(int(t.sum()) for t in thin)
    rows = []
    for threshold in thresholds:
        found = skeleton(strength >= threshold)
        results = [match(found, t) for t in thin]
        anyone = np.logical_or.reduce([m for m, _ in results])
        rows.append((anyone.sum(), found.sum(), sum(n for _, n in results), total))
    return np.array(rows, np.float64)


def summarize(counts: Sequence[Counts], thresholds: NDArray[np.float64] = THRESHOLDS) -> EdgeScores:
    """ODS, OIS and AP over photos."""
    whole = np.sum(counts, axis=0)
    precision, recall, f = _prf(whole)
    best = int(f.argmax())
    chosen = np.sum([c[int(_prf(c)[2].argmax())] for c in counts], axis=0)
    return EdgeScores(float(f[best]), float(_prf(chosen[None])[2][0]), area(precision, recall),
                      float(thresholds[best]))


def area(precision: Counts, recall: Counts) -> float:
    """Area under precision over recall as the benchmark sums it: steps of 0.01, nothing outside the measured recalls.

    Args:
        precision, recall: float64 (T,); of thresholds with the same recall the first counts.
    """
    known, first = np.unique(recall, return_index=True)
    if len(known) < 2:
        return 0.0
    return float(np.interp(np.linspace(0, 1, 101), known, precision[first], left=0, right=0).sum() * 0.01)


def _prf(counts: Counts) -> tuple[Counts, Counts, Counts]:
    p = counts[:, 0] / np.maximum(counts[:, 1], 1)
    r = counts[:, 2] / np.maximum(counts[:, 3], 1)
    return p, r, 2 * p * r / np.maximum(p + r, 1e-12)
