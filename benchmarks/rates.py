"""Measures matrix products and copies; run by :func:`pocketsam.benchmarks.ceiling.ceiling` in a process of its own.

    python -m pocketsam.benchmarks.rates THREADS

Prints one line of JSON: ``gemm_fp32``, ``gemm_int8``, ``gemm_bf16``, ``gemm_f16`` and ``bandwidth`` per second.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], object]
SECONDS = 0.2
LEAST_CALLS = 4
# Beside this many times the last-level cache, what stays cached is negligible.
CACHE_FACTOR, LEAST_BYTES, MOST_BYTES = 4, 64 * 2**20, 256 * 2**20
# One call copies this much and goes on where the last one stopped: short calls find a quiet moment on a busy machine.
SLICE_BYTES = 8 * 2**20
CPUS = Path("/sys/devices/system/cpu")


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
    """byte/s of copies by several threads; numpy releases the interpreter's lock."""
    whole = _copy_bytes()
    source = np.ones(whole // 8)
    target = np.zeros_like(source)
    # No two threads may copy the same slice at once.
    step = min(SLICE_BYTES, whole // (2 * threads)) // 8
    pairs = cycle([(target[i:i + step], source[i:i + step]) for i in range(0, len(source) - step + 1, step)])
    with ThreadPoolExecutor(threads) as pool:
        def copy() -> None:
            """Each thread takes a slice of its own."""
            for done in [pool.submit(np.copyto, *next(pairs)) for _ in range(threads)]:
                done.result()

        return 2 * threads * step * 8 / best_seconds(copy)


def _copy_bytes() -> int:
    return min(max(CACHE_FACTOR * _cache_bytes(), LEAST_BYTES), MOST_BYTES)


def _cache_bytes() -> int:
    """Last-level cache of all cores together; clusters of cores have one each."""
    sizes: dict[str, int] = {}
    for folder in CPUS.glob("cpu[0-9]*/cache/index3"):
        # Not Linux, or hidden: the least size is far beyond the caches of most.
        with suppress(OSError, ValueError):
            shared = (folder / "shared_cpu_list").read_text("ascii").strip()
            sizes[shared] = int((folder / "size").read_text("ascii").strip().removesuffix("K")) * 1024
    return sum(sizes.values())


def sides(threads: int) -> tuple[int, ...]:
    """Rows, inner size and columns of the products: enough work for each thread, small enough to repeat."""
    return (512, 1024) if threads <= 4 else (1024, 2048)


def numpy_product(threads: int, side: int) -> Call:
    """The environment set the threads before numpy was loaded."""
    a, b = (np.ones((side, side), np.float32) for _ in range(2))
    return partial(np.matmul, a, b, out=np.empty_like(a))


def onnx_product(threads: int, side: int, integer: bool) -> Call:
    """ONNX Runtime with constant weights, which it packs once; u8 x s8 when ``integer``."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    shape = [side, side]
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


def openvino_product(threads: int, side: int, compute: str = "f32") -> Call:
    """OpenVINO with constant weights, in f32 as its runtime here, or in what it may be asked for."""
    import openvino as ov
    from openvino import opset13

    ones = np.ones((side, side), np.float32)
    x = opset13.parameter(ones.shape, np.float32, name="x")
    y = opset13.matmul(x, opset13.constant(ones), False, False)
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": compute, "PERFORMANCE_HINT": "LATENCY",
                                "INFERENCE_NUM_THREADS": threads}
    request = ov.Core().compile_model(ov.Model([y], [x], "product"), "CPU", settings).create_infer_request()
    return partial(request.infer, {0: ones}, share_inputs=True, share_outputs=True)


def half_rates(threads: int) -> dict[str, float | None]:
    """Products in 16 bits, where OpenVINO says that the processor has them."""
    held: Any = ()
    if find_spec("openvino") is not None:
        import openvino as ov

        held = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {f"gemm_{c}": rate(partial(openvino_product, compute=c), threads) if name in held else None
            for c, name in (("bf16", "BF16"), ("f16", "FP16"))}


def rate(make: Callable[[int, int], Call], threads: int) -> float:
    """Operations a second of the best size."""
    return max(2 * side**3 / best_seconds(make(threads, side)) for side in sides(threads))


def measure(threads: int) -> dict[str, float | None]:
    """Every installed engine, one after the other; the best one counts."""
    fp32: list[Callable[[int, int], Call]] = [numpy_product]
    has_onnx = find_spec("onnx") is not None and find_spec("onnxruntime") is not None
    if has_onnx:
        fp32.append(partial(onnx_product, integer=False))
    if find_spec("openvino") is not None:
        fp32.append(openvino_product)
    return {
        "bandwidth": bandwidth(threads),
        "gemm_fp32": max(rate(make, threads) for make in fp32),
        "gemm_int8": rate(partial(onnx_product, integer=True), threads) if has_onnx else None,
        **half_rates(threads),
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
