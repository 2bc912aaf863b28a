"""Percentiles, spread, and ratios with a confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Calls, least, percentiles and relative spread (p90 - p50) / p50 of call times in milliseconds."""
    p50, p90, p99 = (float(np.percentile(times, q)) for q in (50, 90, 99))
    return {"calls": len(times), "min_ms": round(min(times), 3), "p50_ms": round(p50, 3), "p90_ms": round(p90, 3),
            "p99_ms": round(p99, 3), "spread": round((p90 - p50) / p50, 4)}


def ratio(reference: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]],
          seed: int = 0) -> dict[str, float]:
    """How many times faster the candidate is, with a 95 % bootstrap interval over rounds.

    Rounds are the unit: within one, both met the same machine, so its drift cancels.

    Args:
        reference, candidate: for each round the call times of that round, in milliseconds.

    Returns:
        ``value``: median over rounds of the ratio of the rounds' medians; ``low`` and ``high``.
    """
    count = min(len(reference), len(candidate))
    rounds = np.array([np.median(reference[i]) / np.median(candidate[i]) for i in range(count)])
    picks = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    medians = np.median(rounds[picks], axis=1)
    low, high = np.percentile(medians, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return {"value": round(float(np.median(rounds)), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def disturbed(probes: Sequence[Sequence[float]], tolerance: float) -> list[bool]:
    """Rounds in which the machine was slowed: probes of fixed work took longer than the run's quickest one.

    Args:
        probes: for each round the probe times taken in it.
        tolerance: 0.2 allows 20 %.
    """
    if not probes:
        return []
    least = min(min(p) for p in probes)
    return [float(np.median(p)) > least * (1 + tolerance) for p in probes]
