"""OpenVINO on a device; `pocketsam bench kit` puts this file beside bench_device.py as engine.py."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino

VERSION = openvino.get_version()


def opened(path: Path, graph: dict[str, Any], threads: int) -> Any:
    """A function from named arrays to named arrays."""
    model = openvino.Core().read_model(path)
    model.reshape({name: openvino.PartialShape(t["shape"]) for name, t in graph["inputs"].items()})
    run = openvino.Core().compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads})
    # zip's strict needs Python 3.10, which a board may lack.
    return lambda feed: {n: np.array(v) for n, v in zip(graph["outputs"], run(feed).to_tuple())}  # noqa: B905
