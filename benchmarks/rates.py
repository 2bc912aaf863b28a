"""Measures matrix products and copies; run by :func:`pocketsam.benchmarks.ceiling.ceiling` in a process of its own.

    python -m pocketsam.benchmarks.rates THREADS

Prints one line of JSON: ``gemm_fp32``, ``gemm_int8`` and ``bandwidth`` per second.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], object]
SECONDS = 0.35
LEAST_CALLS = 4
# Beside this many times the last-level cache, what stays cached is negligible.
CACHE_FACTOR, LEAST_BYTES, MOST_BYTES = 4, 64 * 2**20, 256 * 2**20
CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def best_seconds(call: Call) -> float:
    """The shortest of repeated calls; the first one only warms up."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + SECONDS
    while len(times) < LEAST_CALLS or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def bandwidth(threads: int) -> float:
    """byte/s of a copy cut into one slice for each thread; numpy releases the interpreter's lock."""
    source = np.ones(_copy_bytes() // 8)
    target = np.zeros_like(source)
    pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        return 2 * source.nbytes / best_seconds(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)))


def _copy_bytes() -> int:
    try:
        cache = int(CACHE_SIZE.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        cache = 0  # not Linux: the least size is far beyond the caches of most
    return min(max(CACHE_FACTOR * cache, LEAST_BYTES), MOST_BYTES)


def side(threads: int) -> int:
    """Rows, inner size and columns of the product: enough work for each thread, small enough to repeat."""
    return 1024 if threads <= 4 else 2048


def numpy_product(threads: int) -> Call:
    """The environment set the threads before numpy was loaded."""
    a, b = (np.ones((side(threads), side(threads)), np.float32) for _ in range(2))
    return partial(np.matmul, a, b, out=np.empty_like(a))


def onnx_product(threads: int, integer: bool) -> Call:
    """ONNX Runtime with constant weights, which it packs once; u8 x s8 when ``integer``."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    shape = [side(threads), side(threads)]
    weight = np.ones(shape, np.int8 if integer else np.float32)
    kinds = (TensorProto.UINT8, TensorProto.INT32) if integer else (TensorProto.FLOAT, TensorProto.FLOAT)
    x, y = (helper.make_tensor_value_info(n, k, shape) for n, k in zip("xy", kinds, strict=True))
    node = helper.make_node("MatMulInteger" if integer else "MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    data = np.ones(shape, np.uint8 if integer else np.float32)
    return partial(session.run, None, {"x": data})


def openvino_product(threads: int) -> Call:
    """OpenVINO with constant weights, in f32 as its runtime here."""
    import openvino as ov
    from openvino import opset13

    ones = np.ones((side(threads), side(threads)), np.float32)
    x = opset13.parameter(ones.shape, np.float32, name="x")
    y = opset13.matmul(x, opset13.constant(ones), False, False)
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
                                "INFERENCE_NUM_THREADS": threads}
    request = ov.Core().compile_model(ov.Model([y], [x], "product"), "CPU", settings).create_infer_request()
    return partial(request.infer, {0: ones}, share_inputs=True, share_outputs=True)


def measure(threads: int) -> dict[str, float | None]:
    """Every installed engine, one after the other; the best one counts."""
    fp32: list[Callable[[int], Call]] = [numpy_product]
    has_onnx = find_spec("onnx") is not None and find_spec("onnxruntime") is not None
    if has_onnx:
        fp32.append(partial(onnx_product, integer=False))
    if find_spec("openvino") is not None:
        fp32.append(openvino_product)
    operations = 2 * side(threads)**3
    return {
        "bandwidth": bandwidth(threads),
        "gemm_fp32": operations / min(best_seconds(make(threads)) for make in fp32),
        "gemm_int8": operations / best_seconds(onnx_product(threads, integer=True)) if has_onnx else None,
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
