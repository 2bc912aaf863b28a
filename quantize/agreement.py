"""Measuring a candidate against a reference: in masks and in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pocketsam.images import Rgb
from pocketsam.parity import Agreement, compare
from pocketsam.predictor import Predictor
from pocketsam.runtime import Runtime

ROUNDS = 12
WARMUP = 2
# Calls that take long need fewer: after so many seconds no further round is begun, but for the least number.
SECONDS, LEAST_ROUNDS = 30.0, 3
# Ratios within this of 1 are equal on a shared machine: neither faster nor slower.
NOISE = 1.03


def agreement(reference: Runtime, candidate: Runtime, images: Sequence[Rgb], seed: int = 0) -> Agreement:
    """Mask agreement of two runtimes (:func:`pocketsam.parity.compare`)."""
    return compare(Predictor(reference), Predictor(candidate), images, seed)


def time_ratio(fast: Callable[[], Any], base: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """How many times faster ``fast`` is than ``base``: median over interleaved rounds, so that drift cancels.

    Args:
        rounds: fewer, at least three, where they take more than half a minute.
    """
    end = time.perf_counter() + SECONDS
    for _ in range(WARMUP):
        fast()
        base()
        if time.perf_counter() > end - SECONDS / 2:
            break
    ratios = []
    for i in range(rounds):
        if i >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        order = (fast, base) if i % 2 else (base, fast)
        spent = {}
        for call in order:
            start = time.perf_counter()
            call()
            spent[call] = time.perf_counter() - start
        ratios.append(spent[base] / spent[fast])
    return round(float(np.median(ratios)), 2)


def slower(ratio: float | None) -> bool:
    """Whether a time ratio to fp32 says slower, beyond noise; None is not measured."""
    return ratio is not None and ratio * NOISE < 1
