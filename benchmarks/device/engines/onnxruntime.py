"""ONNX Runtime on a device; `pocketsam bench kit` puts this file beside bench_device.py as engine.py."""

from pathlib import Path
from typing import Any

import onnxruntime

VERSION = onnxruntime.__version__


def opened(path: Path, graph: dict[str, Any], threads: int) -> Any:
    """A function from named arrays to named arrays."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    # zip's strict needs Python 3.10, which a board may lack.
    return lambda feed: dict(zip(graph["outputs"], session.run(graph["outputs"], feed)))  # noqa: B905
