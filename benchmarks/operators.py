"""Which operators take the time, by each runtime's own profiler, and which fall off its fast path.

The profiled model runs as its runtime runs it: the same threads, precision hints and fixed shapes. A profiler costs
time itself, so shares are what to read; milliseconds of a whole call come from timing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocketsam import registry
from pocketsam.benchmarks.work import graph_spec
from pocketsam.bundle import Bundle
from pocketsam.errors import PocketSamError, UsageError
from pocketsam.runtime import Runtime

# runtime -> function(bundle or opened runtime, precision, graph, threads) that returns its rows.
PROFILERS = {
    "onnxruntime": "pocketsam.benchmarks.profile_onnxruntime:profile",
    "openvino": "pocketsam.benchmarks.profile_openvino:profile",
    "pytorch": "pocketsam.benchmarks.profile_pytorch:profile",
}
WITHOUT = {
    "litert": "ai-edge-litert's Python package gives no times of single operators; TensorFlow's benchmark_model tool "
              "does with --enable_op_profiling=true",
    "coreml": "Core ML runs on Apple systems only, and its times are shown by Xcode's performance report",
}


class NoProfiler(PocketSamError):
    """A runtime that does not tell the time of single operators."""

    def __init__(self, runtime: str) -> None:
        super().__init__(f"operators of {runtime} cannot be timed here: {WITHOUT[runtime]}.")
        self.runtime = runtime


@dataclass(frozen=True)
class OperatorTime:
    """Time of one operator.

    Attributes:
        name: of the node, as the runtime knows it after its own fusions.
        kind: operator type, with the kernel where the runtime tells it.
        ms: the least of several runs.
        share: of the sum over all operators, 0 to 1.
    """

    name: str
    kind: str
    ms: float
    share: float


@dataclass(frozen=True)
class Row:
    """What a profiler says of one node: the least milliseconds over the runs, and whether a slow kernel ran it."""

    name: str
    kind: str
    ms: float
    fallback: bool = False


def slowest(bundle: Bundle | None, runtime: str | Runtime, precision: str, graph: str, threads: int,
            count: int = 10, compute: str = "") -> list[OperatorTime]:
    """The operators of one graph that take the most time, slowest first.

    Args:
        bundle: whose artifact runs; None with an opened PyTorch runtime, which has the model itself.
        runtime: a name, or an opened ``PyTorchRuntime``; in PyTorch one row is an operator with its input shapes, all
            its calls together.
        graph: ``encoder``, or ``decoder`` for one prompt.
        threads: CPU threads.
        count: how many to return.
        compute: what OpenVINO computes in, where that is not what its runtime would choose.

    Raises:
        NoProfiler: the runtime does not tell; the message says why.
        UsageError: ``count`` or ``threads`` below 1, PyTorch by its name alone or with other threads than it was
            opened with, or another runtime as an object.
        UnknownName: no such runtime, precision or graph.
        MissingDependency: the runtime is not installed.
    """
    if count < 1:
        raise UsageError(f"count is {count}; expected at least 1.")
    return _ranked(_profile(bundle, runtime, precision, graph, threads, compute))[:count]


def fallbacks(bundle: Bundle | None, runtime: str | Runtime, precision: str, graph: str, threads: int,
              compute: str = "") -> int | None:
    """How many operators run off the runtime's fast path.

    LiteRT: operators outside the XNNPACK delegate. OpenVINO: nodes whose kernel is a reference implementation. ONNX
    Runtime: nodes on another provider than the CPU's, which is the only one that is ever asked for. PyTorch: none.

    Returns:
        The number; None for Core ML, which cannot tell here.

    Raises:
        As :func:`slowest`, but LiteRT answers.
    """
    name = _checked(runtime, threads)
    if name == "coreml":
        return None
    if name == "pytorch":
        return 0
    if name == "litert":
        held = _needed(bundle, name)
        graph_spec(held, graph)
        opened: Any = registry.load("runtime", name).open(held, precision=precision, threads=threads)
        return sum(int(n) for n in opened.fallback_ops[graph].values())
    return sum(row.fallback for row in _profile(bundle, runtime, precision, graph, threads, compute))


def _profile(bundle: Bundle | None, runtime: str | Runtime, precision: str, graph: str, threads: int,
             compute: str = "") -> list[Row]:
    name = _checked(runtime, threads)
    if name in WITHOUT:
        raise NoProfiler(name)
    # The runtime's own module first: its import error is the one that names the command.
    registry.load("runtime", name)
    profile: Any = registry.entry(PROFILERS[name])
    if name == "pytorch":
        if isinstance(runtime, str):
            raise UsageError("a bundle holds no PyTorch weights; pass an opened PyTorch runtime instead of its name.")
        return list(profile(runtime, graph, threads))
    if not isinstance(runtime, str):
        raise UsageError(f"an opened {name} runtime cannot be profiled; pass the name {name!r} and the bundle.")
    held = _needed(bundle, name)
    asked = {"compute": compute} if name == "openvino" else {}
    return list(profile(held, precision, graph_spec(held, graph), threads, **asked))


def _checked(runtime: str | Runtime, threads: int) -> str:
    if threads < 1:
        raise UsageError(f"threads is {threads}; expected at least 1.")
    return registry.check("runtime", runtime if isinstance(runtime, str) else str(runtime.info()["runtime"]))


def _needed(bundle: Bundle | None, runtime: str) -> Bundle:
    if bundle is None:
        raise UsageError(f"the {runtime} runtime needs a bundle; only an opened PyTorch runtime does without.")
    return bundle


def _ranked(rows: list[Row]) -> list[OperatorTime]:
    total = sum(r.ms for r in rows)
    ranked = sorted(rows, key=lambda r: -r.ms)
    return [OperatorTime(r.name, r.kind, r.ms, r.ms / total if total else 0.0) for r in ranked]
