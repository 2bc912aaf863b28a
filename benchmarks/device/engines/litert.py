"""LiteRT on a device; `pocketsam bench kit` puts this file beside bench_device.py as engine.py."""

from pathlib import Path
from typing import Any

try:
    import ai_edge_litert as package
    from ai_edge_litert.interpreter import Interpreter
except ModuleNotFoundError:
    import tflite_runtime as package
    from tflite_runtime.interpreter import Interpreter

VERSION = package.__version__


def opened(path: Path, graph: dict[str, Any], threads: int) -> Any:
    """A function from named arrays to named arrays."""
    runner = Interpreter(str(path), num_threads=threads).get_signature_runner(graph["signature"])
    return lambda feed: runner(**feed)
