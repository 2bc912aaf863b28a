"""Measuring many candidates against one reference: answers of the float model are computed once and remembered."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pocketsam.geometry import Frame
from pocketsam.images import Rgb
from pocketsam.parity import Agreement, compare
from pocketsam.predictor import Predictor
from pocketsam.runtime import Features, Runtime, Tensors

ROUNDS = 12
WARMUP = 2
# Ratios within this of 1 are equal on a shared machine: neither faster nor slower.
NOISE = 1.03


class Remembered:
    """A runtime that answers the same question once; for references in searches.

    Args:
        runtime: the one that computes.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.spec, self.slots = runtime.spec, runtime.slots
        self.clicks, self.click_workers = runtime.clicks, runtime.click_workers
        self._known: dict[str, dict[str, Any]] = {}

    def encode(self, image: Rgb, frame: Frame) -> Features:
        return self._once({"image": image}, lambda: self.runtime.encode(image, frame))

    def decode(self, features: Features, prompts: Tensors) -> Tensors:
        return self._once({**features, **prompts}, lambda: self.runtime.decode(features, prompts))

    def click(self, graph: str, inputs: Tensors) -> Tensors:
        return self.runtime.click(graph, inputs)

    def info(self) -> dict[str, Any]:
        return self.runtime.info()

    def _once(self, inputs: dict[str, Any], call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name, value in inputs.items():
            digest.update(f"{name}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).data)
        key = digest.hexdigest()
        if key not in self._known:
            self._known[key] = call()
        # The caller may write into arrays; what is remembered must stay as it was.
        return {k: v.copy() for k, v in self._known[key].items()}


def agreement(reference: Runtime, candidate: Runtime, images: Sequence[Rgb], seed: int = 0) -> Agreement:
    """Mask agreement of two runtimes (:func:`pocketsam.parity.compare`)."""
    return compare(Predictor(reference), Predictor(candidate), images, seed)


def time_ratio(fast: Callable[[], Any], base: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """How many times faster ``fast`` is than ``base``: median over interleaved rounds, so that drift cancels."""
    for _ in range(WARMUP):
        fast()
        base()
    ratios = []
    for i in range(rounds):
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
