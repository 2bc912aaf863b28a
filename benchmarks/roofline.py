"""The roofline of a bundle in one place: its work, the machine's limits, and where the time goes.

    work = count(bundle, "onnx", "fp32", "encoder")
    floor = floor_ms(work, ceiling(threads=2), "fp32")
    slowest(bundle, "onnxruntime", "fp32", "encoder", threads=2)
"""

from __future__ import annotations

from pocketsam.benchmarks.ceiling import Ceiling, ceiling, floor_ms
from pocketsam.benchmarks.operators import NoProfiler, OperatorTime, fallbacks, slowest
from pocketsam.benchmarks.work import Work, count

__all__ = ["Ceiling", "NoProfiler", "OperatorTime", "Work", "ceiling", "count", "fallbacks", "floor_ms",
           "slowest"]
