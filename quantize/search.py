"""Which layers stay in float when masks miss the gate: ranked by what each gives back in masks, in bounded time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pocketsam.errors import PocketSamError
from pocketsam.files import cache_root, staged_file
from pocketsam.images import Rgb

# Layers are tried in contiguous groups: neighbours share the conversions between int8 and float.
GROUPS = 8
# What 8-bit attention logits may cost in mean mask IoU, and must gain in time.
ATTENTION_LOSS, ATTENTION_GAIN = 0.002, 1.03
Measure = Callable[[frozenset[str], Sequence[Rgb]], dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        keep: names of layers in float.
        measured: agreement on the judging images.
        path: one row a step: layers in float, mean agreement on the calibration images, time ratio to fp32.
        attention: the same of logits of global attention in float and in 8 bits, where the format has these.
    """

    keep: tuple[str, ...]
    measured: dict[str, Any]
    path: list[dict[str, Any]] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What the bundle records."""
        return {"float_layers": list(self.keep), "search": self.path,
                **({"attention": self.attention} if self.attention else {})}


class Search:
    """Greedy over groups of layers.

    Args:
        layers: names in execution order.
        measure: writes the artifact with some layers in float and returns its agreement on images.
        judges: images of the gate.
        trials: calibration images, on which candidates are compared.
        seconds: bound; 0 measures the plain recipe only.
        key: under which finished measurements are remembered, so that an interrupted search goes on.
        ratio: time ratio to fp32 of the artifact that was written last.
    """

    def __init__(self, layers: list[str], measure: Measure, judges: Sequence[Rgb],
                 trials: Sequence[Rgb], gate: float, seconds: float, key: str, report: Callable[[str], None],
                 ratio: Callable[[], float | None]) -> None:
        self.layers, self.measure, self.judges, self.trials = layers, measure, judges, trials
        self.gate, self.seconds, self.report, self.ratio = gate, seconds, report, ratio
        self.store = cache_root() / "quantize" / f"{key[:80]}.json"
        self.known: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError):
            self.known = json.loads(self.store.read_text(encoding="utf-8"))

    def run(self) -> Found:
        """The plain recipe if it passes, else the best set of float layers that was found in time."""
        best = Found((), self.measure(frozenset(), self.judges))
        if self._passes(best) or self.seconds <= 0:
            return best
        end = time.monotonic() + self.seconds
        names = self.layers
        size = max(1, -(-len(names) // GROUPS))
        left = [frozenset(names[i:i + size]) for i in range(0, len(names), size)]
        keep: frozenset[str] = frozenset()
        path: list[dict[str, Any]] = []
        while left and time.monotonic() < end:
            scores: dict[frozenset[str], dict[str, Any]] = {}
            for group in left:
                if scores and time.monotonic() >= end:
                    break
                scores[group] = self._trial(keep | group)
            chosen = max(scores, key=lambda g: (scores[g]["mean"], scores[g]["ratio"] or 0))
            keep |= chosen
            left.remove(chosen)
            path.append({"float_layers": sorted(chosen), **scores[chosen]})
            found = Found(tuple(n for n in names if n in keep), self.measure(keep, self.judges), path)
            self.report(f"{len(keep)} of {len(names)} layers in float: mean mask IoU "
                        f"{found.measured['all']['mean']:.4f}, gate {self.gate}")
            if found.measured["all"]["mean"] > best.measured["all"]["mean"]:
                best = found
            if self._passes(found):
                return found
        # The artifact on disk is that of the last trial.
        return Found(best.keep, self.measure(frozenset(best.keep), self.judges), path)

    def _passes(self, found: Found) -> bool:
        return bool(found.measured["all"]["mean"] >= self.gate)

    def _trial(self, keep: frozenset[str]) -> dict[str, Any]:
        name = "\n".join(sorted(keep))
        if name not in self.known:
            mean = self.measure(keep, self.trials)["all"]["mean"]
            self.known[name] = {"mean": round(mean, 5), "ratio": self.ratio()}
            with suppress(PocketSamError), staged_file(self.store) as staged:
                staged.write_text(json.dumps(self.known), encoding="utf-8")
        return self.known[name]


def try_attention(layers: frozenset[str], measure: Measure, trials: Sequence[Rgb], ratio: Callable[[], float | None],
                  report: Callable[[str], None]) -> tuple[frozenset[str], list[dict[str, Any]]]:
    """Compare logits of global attention in float and in 8 bits.

    Args:
        layers: names of attention layers; nothing is measured where there are none.
        measure, trials, ratio: as for :class:`Search`.

    Returns:
        Which of them stay in float (none where 8 bits are faster and keep the masks, else all), and what was measured.
    """
    if not layers:
        return layers, []
    rows = [{"int8": not keep, "mean": measure(keep, trials)["all"]["mean"], "ratio": ratio()}
            for keep in (layers, frozenset[str]())]
    plain, rounded = rows
    faster = None in (plain["ratio"], rounded["ratio"]) or rounded["ratio"] >= ATTENTION_GAIN * plain["ratio"]
    chosen = faster and rounded["mean"] >= plain["mean"] - ATTENTION_LOSS
    where = "in 8 bits" if chosen else "stay in float"
    report(f"attention logits {where}: mean mask IoU in float {plain['mean']:.4f}, "
           f"in 8 bits {rounded['mean']:.4f}; {plain['ratio']} and {rounded['ratio']} x as fast as fp32")
    return (frozenset() if chosen else layers), rows
