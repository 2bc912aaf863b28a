"""Operator times by OpenVINO's performance counters."""

from __future__ import annotations

from typing import Any

import openvino as ov

from pocketsam.benchmarks.operators import Row
from pocketsam.benchmarks.profiling import RUNS, WARMUP, least, sample_inputs
from pocketsam.bundle import IR_FILE, Bundle
from pocketsam.errors import BundleError, first_line
from pocketsam.runtimes.openvino import FORMAT, check_precision, settings
from pocketsam.specs import GraphSpec

# How the CPU plugin names kernels that are plain loops.
REFERENCE = "ref"


def profile(bundle: Bundle, precision: str, graph: GraphSpec, threads: int, compute: str = "") -> list[Row]:
    """The least time of each node that ran; ``kind`` is its type and its kernel.

    Args:
        compute: what is computed in; by default what the runtime would choose.

    Raises:
        BundleError: the artifact is missing, damaged or refused.
    """
    inputs = sample_inputs(bundle.spec, bundle.slots, graph)
    path = bundle.file(bundle.find(FORMAT, precision, graph.name)) / IR_FILE
    core = ov.Core()
    try:
        model = core.read_model(path)
        model.reshape({t.name: ov.PartialShape(list(t.concrete(1))) for t in graph.inputs})
    except RuntimeError as e:
        raise BundleError(f"OpenVINO {ov.get_version()} refuses {path} ({first_line(e)}); export the "
                          "bundle again or change the openvino version.") from e
    # Not the runtime's cache: what is kept there was compiled without counters.
    config = {**settings(threads, check_precision(core, compute or None)), "PERF_COUNT": True}
    request = core.compile_model(model, "CPU", config).create_infer_request()
    return least(_run(request, inputs) for _ in range(WARMUP + RUNS))


def _run(request: Any, inputs: dict[str, Any]) -> list[Row]:
    request.infer(inputs)
    return [Row(i.node_name, f"{i.node_type} {i.exec_type}", i.real_time.total_seconds() * 1e3,
                i.exec_type.startswith(REFERENCE))
            for i in request.get_profiling_info() if i.status == ov.ProfilingInfo.Status.EXECUTED]
