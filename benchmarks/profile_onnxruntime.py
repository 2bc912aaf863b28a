"""Operator times by ONNX Runtime's profiler."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from pocketsam.benchmarks.operators import Row
from pocketsam.benchmarks.profiling import RUNS, WARMUP, least, sample_inputs
from pocketsam.bundle import Bundle
from pocketsam.runtimes.onnxruntime import FORMAT, open_session
from pocketsam.specs import GraphSpec

CPU = "CPUExecutionProvider"
SUFFIX = "_kernel_time"


def profile(bundle: Bundle, precision: str, graph: GraphSpec, threads: int) -> list[Row]:
    """The least time of each node; names are those after ONNX Runtime's own fusions.

    Raises:
        BundleError: the artifact is missing or damaged.
    """
    inputs = sample_inputs(bundle.spec, bundle.slots, graph)
    path = bundle.file(bundle.find(FORMAT, precision, graph.name))
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, threads, Path(folder) / "profile")
        for _ in range(WARMUP + RUNS):
            session.run(graph.output_names, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return least(_runs(events)[WARMUP:])


def _runs(events: list[dict[str, Any]]) -> list[list[Row]]:
    """The kernel events cut into runs: each ``model_run`` spans its own."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")
    kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith(SUFFIX)]
    return [[_row(e) for e in kernels if start <= e["ts"] <= end] for start, end in spans]


def _row(event: dict[str, Any]) -> Row:
    # The same node name can stand at two places after fusions.
    name = f"{event['name'].removesuffix(SUFFIX)} #{event['args']['node_index']}"
    return Row(name, event["args"]["op_name"], event["dur"] / 1e3, event["args"]["provider"] != CPU)
