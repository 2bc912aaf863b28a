"""What all profilers share: inputs, the number of runs, and the least time of each operator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketsam.benchmarks.operators import Row
from pocketsam.prompts import middle_click
from pocketsam.specs import GraphSpec, ModelSpec

# The first runs allocate, tune and fill caches.
WARMUP, RUNS = 2, 5


def sample_inputs(spec: ModelSpec, slots: int, graph: GraphSpec) -> dict[str, NDArray[Any]]:
    """Seeded inputs of a graph: a random image, or random features with one click."""
    rng = np.random.default_rng(0)
    if graph.name == "encoder":
        return {t.name: rng.integers(0, 256, t.concrete(1), dtype=np.uint8) for t in graph.inputs}
    inputs: dict[str, NDArray[Any]] = {
        t.name: rng.standard_normal(t.concrete(1), dtype=np.float32) for t in spec.feature_specs()}
    return inputs | middle_click(spec, slots)


def least(runs: Iterable[Iterable[Row]]) -> list[Row]:
    """The least time of each node over several runs; nodes that share a name within a run are added first."""
    best: dict[str, Row] = {}
    for run in runs:
        sums: dict[str, Row] = {}
        for row in run:
            before = sums[row.name].ms if row.name in sums else 0.0
            sums[row.name] = Row(row.name, row.kind, row.ms + before, row.fallback)
        for name, row in sums.items():
            if name not in best or row.ms < best[name].ms:
                best[name] = row
    return list(best.values())
