"""Latency, load time and peak memory, measured so that the ratios can be trusted.

Every target lives in a process of its own, pinned to as many cores as it has threads. Targets take turns, round by
round, so that a drift of the machine meets all of them. A probe of fixed work runs before each turn; a round in which
the probe was slowed is measured again, a bounded number of times. Both graphs share one process, because that is what
an application loads: peak memory is that of the pair.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketsam.benchmarks.processes import Guest, Worker, available_mb
from pocketsam.benchmarks.statistics import disturbed, ratio, summary
from pocketsam.benchmarks.targets import EVALUATOR_NOTE, Target, described
from pocketsam.errors import BenchmarkError

GRAPHS = ("encoder", "decoder")
TOLERANCE = 0.2
# Of 200,000 numbers: one to ten milliseconds each.
PROBE_SORTS = 5
# Share of the available memory that all processes together may hold at any time.
ROOM = 0.8
Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: turns of each target.
        calls: timed calls of each graph in a turn, after one that only wakes the threads.
        warmup: calls before the first round.
        extra: rounds that may be measured again because the machine was disturbed.
        cold: open everything once more with empty caches, for the cold start.
    """

    rounds: int = 10
    calls: tuple[int, int] = (2, 20)
    warmup: int = 5
    extra: int = 5
    cold: bool = True


QUICK = Plan(rounds=3, calls=(1, 5), warmup=1, extra=0, cold=False)


@dataclass
class Measured:
    """What was seen of one target.

    Attributes:
        status: ``ok``, or what went wrong or why it is not timed.
        facts: of the opening: load_ms, first_ms by graph, version, note.
        cold: the same with empty caches, or empty.
        resident: its process stays between turns; otherwise there was no room, and it is opened anew for each.
        times: graph -> for each kept round the call times in milliseconds.
    """

    target: Target
    status: str = "ok"
    facts: dict[str, Any] = field(default_factory=dict)
    cold: dict[str, Any] = field(default_factory=dict)
    peak_mb: float = 0.0
    resident: bool = True
    times: dict[str, list[list[float]]] = field(default_factory=lambda: {g: [] for g in GRAPHS})


def measure(targets: list[Target], plan: Plan, report: Report,
            keep: Callable[[list[Measured], dict[str, Any]], None] = lambda rows, quality: None) -> dict[str, Any]:
    """Time all targets.

    Args:
        keep: called after every round with what is known so far, so that an interrupted run leaves its results.

    Returns:
        How calm the machine was: ``rounds`` kept, ``repeated`` and ``disturbed`` rounds, ``probe_spread``.

    Raises:
        BenchmarkError: no target could be timed; the message says why of each.
    """
    rows = [Measured(t) for t in targets]
    with tempfile.TemporaryDirectory() as folder:
        # Apart, so that no cold start finds what another one compiled.
        caches = [Path(folder) / str(i) for i in range(len(rows))]
        if plan.cold:
            for row, cache in zip(rows, caches, strict=True):
                _open_once(row, cache, report)
        with _opened(rows, caches, report) as workers:
            quality = _rounds(rows, workers, plan, report, keep)
    if not any(row.times[g] for row in rows for g in GRAPHS):
        reasons = "; ".join(f"{row.target.label}: {row.status.rstrip('.')}" for row in rows)
        raise BenchmarkError(f"nothing could be timed: {reasons}.")
    return quality


def results(rows: list[Measured], against: str = "") -> list[dict[str, Any]]:
    """JSON-safe numbers of each target, in the order of the rows; ratios to PyTorch of the same thread count.

    Args:
        against: a runtime that ratios are taken to as well: its first row of the same thread count that has times.
    """
    out = []
    for row in rows:
        peers = [r for r in rows if r.target.threads == row.target.threads]
        eager = next((r for r in peers if r.target.reference), None)
        other = next((r for r in peers if r.target.runtime == against and any(r.times.values())), None)
        entry: dict[str, Any] = {"status": row.status, "load_ms": row.facts.get("load_ms"), "peak_mb": row.peak_mb,
                                 "resident": row.resident, "version": row.facts.get("version", ""),
                                 "cold": row.cold or None}
        for graph in GRAPHS:
            entry[graph] = _graph(row, graph, eager, other)
        out.append(entry)
    return out


def _graph(row: Measured, graph: str, eager: Measured | None, other: Measured | None) -> dict[str, Any] | None:
    if row.status != "ok" or not row.times[graph]:
        return None
    data = {**summary([t for times in row.times[graph] for t in times]), "first_ms": row.facts["first_ms"][graph]}
    for name, peer in (("times_pytorch", eager), ("times_against", other)):
        if peer is not None and peer.times[graph]:
            data[name] = ratio(peer.times[graph], row.times[graph])
    if "times_against" in data and other is not None:
        base = other.target
        data["times_against"]["to"] = f"{base.runtime} {described(base.precision, base.compute)}"
    return data


def _open_once(row: Measured, cache: Path, report: Report) -> None:
    if not is_timed(row.target):
        return
    report(f"cold start of {row.target.label}")
    worker = Worker(row.target, cache)
    worker.close()
    if "problem" not in worker.facts:
        row.peak_mb = worker.facts["peak_mb"]
        first = worker.facts["first_ms"]
        row.cold = {"load_ms": worker.facts["load_ms"], **{f"first_{g}_ms": first[g] for g in GRAPHS}}


def is_timed(target: Target) -> bool:
    """Whether its times say anything on this machine: those of the Core ML evaluator do not."""
    return target.runtime != "coreml" or sys.platform == "darwin"


@contextmanager
def _opened(rows: list[Measured], caches: list[Path], report: Report) -> Iterator[dict[int, Worker]]:
    """Row index -> its worker; what cannot be opened becomes a status, and what finds no room a guest."""
    workers: dict[int, Worker] = {}
    available = available_mb()
    room = float("inf") if available is None else ROOM * available
    try:
        for i, row in enumerate(rows):
            if not is_timed(row.target):
                row.status = EVALUATOR_NOTE
                continue
            report(f"opening {row.target.label}")
            # What it will take is known from the cold start, or guessed by the others.
            _make_room(rows, workers, room, row.peak_mb or max((rows[k].peak_mb for k in workers), default=0.0))
            worker = Worker(row.target, caches[i])
            if "problem" in worker.facts:
                row.status, row.peak_mb = str(worker.facts["problem"]), 0.0
                worker.close()
                continue
            row.facts, row.peak_mb = worker.facts, worker.facts["peak_mb"]
            workers[i] = worker
            _make_room(rows, workers, room, 0.0)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def _make_room(rows: list[Measured], workers: dict[int, Worker], room: float, coming: float) -> None:
    """Turn workers into guests, the largest first, until the others fit beside the largest guest, or what is coming.

    Args:
        coming: megabytes of one that is about to be opened.
    """
    by_size = sorted((i for i in workers if rows[i].resident), key=lambda i: rows[i].peak_mb)
    while by_size:
        staying = sum(rows[i].peak_mb for i in by_size)
        guests = [rows[i].peak_mb for i in workers if not rows[i].resident]
        if staying + max([coming, *guests]) <= room:
            return
        i = by_size.pop()
        rows[i].resident, workers[i] = False, Guest(workers[i])


def _rounds(rows: list[Measured], workers: dict[int, Worker], plan: Plan, report: Report,
            keep: Callable[[list[Measured], dict[str, Any]], None]) -> dict[str, Any]:
    probes: list[list[float]] = []
    taken: list[dict[int, dict[str, list[float]]]] = []
    for _ in range(3):
        _probe()
    if plan.warmup:
        report(f"warming up, {plan.warmup} calls each")
        _turns(rows, workers, (plan.warmup, plan.warmup))
    repeated = 0
    while workers and len(taken) < plan.rounds + repeated:
        calm = len(taken) - sum(disturbed(probes, TOLERANCE))
        report(f"round {len(taken) + 1}, {calm} calm of {plan.rounds}")
        probe, times = _turns(rows, workers, plan.calls)
        probes.append(probe)
        taken.append(times)
        bad = disturbed(probes, TOLERANCE)
        repeated = min(plan.extra, sum(bad))
        quality = _settle(rows, taken, probes, plan.rounds, repeated)
        keep(rows, quality)
    return _settle(rows, taken, probes, plan.rounds, repeated)


def _settle(rows: list[Measured], taken: list[dict[int, dict[str, list[float]]]], probes: list[list[float]],
            wanted: int, repeated: int) -> dict[str, Any]:
    """Keep the calmest rounds, as many as were planned, and say how calm they were."""
    order = sorted(range(len(taken)), key=lambda i: float(np.median(probes[i])))
    kept = sorted(order[:wanted])
    for i, row in enumerate(rows):
        row.times = {g: [taken[k][i][g] for k in kept if i in taken[k]] for g in GRAPHS}
    flat = [p for k in kept for p in probes[k]]
    bad = disturbed(probes, TOLERANCE)
    spread = float((np.percentile(flat, 90) - np.median(flat)) / np.median(flat)) if flat else 0.0
    return {"rounds": len(kept), "repeated": repeated, "disturbed": sum(bad[k] for k in kept),
            "probe_spread": round(spread, 4)}


def _turns(rows: list[Measured], workers: dict[int, Worker],
           calls: tuple[int, int]) -> tuple[list[float], dict[int, dict[str, list[float]]]]:
    """One turn of every worker; a worker that dies leaves the run and its row says so."""
    probe: list[float] = []
    times: dict[int, dict[str, list[float]]] = {}
    for i, worker in list(workers.items()):
        probe.append(_probe())
        got: dict[str, list[float]] = {}
        for graph, count in zip(GRAPHS, calls, strict=True):
            answer = worker.time(graph, count + 1)
            if "problem" in answer:
                rows[i].status = str(answer["problem"])
                worker.close()
                del workers[i]
                break
            # The first call of a turn only wakes the threads.
            got[graph] = answer["times"][1:]
            rows[i].peak_mb = answer["peak_mb"]
        else:
            times[i] = got
            worker.rest()
    return probe, times


def _probe() -> float:
    """Milliseconds of fixed single-threaded work: slower only if the machine is."""
    numbers = _numbers()
    start = time.perf_counter()
    for _ in range(PROBE_SORTS):
        # In place: new memory would count the kernel's work for it, which is slow after a large process has ended.
        np.copyto(numbers[1], numbers[0])
        numbers[1].sort()
    return (time.perf_counter() - start) * 1e3


@functools.cache
def _numbers() -> NDArray[np.float64]:
    """(2, 200000): random numbers, and room to sort them in."""
    return np.tile(np.random.default_rng(0).random(200_000), (2, 1))
