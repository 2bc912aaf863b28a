"""Operator times by torch's profiler, of an opened reference runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pocketsam.benchmarks.operators import Row
from pocketsam.benchmarks.profiling import RUNS, WARMUP, least, sample_inputs
from pocketsam.errors import UnknownName, UsageError
from pocketsam.geometry import Frame
from pocketsam.runtime import Runtime


def profile(runtime: Runtime, graph: str, threads: int) -> list[Row]:
    """The least time of each operator with its input shapes, without the operators that it calls.

    Raises:
        UnknownName: neither ``encoder`` nor ``decoder``.
        UsageError: the runtime was opened with another number of threads.
    """
    opened = runtime.info()["threads"]
    if opened != threads:
        raise UsageError(f"threads is {threads}, but PyTorch runs with {opened}; open the runtime with "
                         f"threads={threads}.")
    call = _call(runtime, graph)
    for _ in range(WARMUP):
        call()
    return least(_run(call) for _ in range(RUNS))


def _call(runtime: Runtime, graph: str) -> Callable[[], Any]:
    spec = runtime.spec
    graphs = {"encoder": spec.encoder_graph(), "decoder": spec.decoder_graph(runtime.slots)}
    if graph not in graphs:
        raise UnknownName("graph", graph, graphs)
    inputs = sample_inputs(spec, runtime.slots, graphs[graph])
    if graph == "encoder":
        frame = Frame.of(spec.image_size, spec.image_size, spec)
        return lambda: runtime.encode(inputs["image"], frame)
    features = {t.name: inputs.pop(t.name) for t in spec.feature_specs()}
    return lambda: runtime.decode(features, inputs)


def _run(call: Callable[[], Any]) -> list[Row]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    averages: Any = profiler.key_averages(group_by_input_shape=True)
    return [Row(f"{a.key} {[s for s in a.input_shapes if s]}", a.key, a.self_cpu_time_total / 1e3)
            for a in averages if a.key.startswith("aten::")]
