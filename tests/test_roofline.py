"""The roofline: work against arithmetic and between formats, the machine's rates, and the operators' times."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketsam.benchmarks import kinds, rates
from pocketsam.benchmarks.roofline import (
    Ceiling,
    NoProfiler,
    Work,
    ceiling,
    count,
    fallbacks,
    floor_ms,
    slowest,
)
from pocketsam.benchmarks.work import Graph, Step, Tensor, work_of
from pocketsam.bundle import Bundle, read_bundle
from pocketsam.errors import BundleError, UnknownName, UnsupportedModel, UsageError

F32 = 4


@pytest.fixture(scope="module")
def toy(toy_bundle: Path) -> Bundle:
    return read_bundle(toy_bundle)


def onnx_work(path: Path, nodes: list[Any], x: tuple[int | str, ...], y: int, weights: dict[str, Any],
              concrete: tuple[int, ...] | None = None) -> Work:
    """The work of a graph x -> y of rank ``y`` written with the onnx package."""
    onnx = pytest.importorskip("onnx")
    from pocketsam.benchmarks.graph_onnx import read_file

    h, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", kind, x)],
                         [h.make_tensor_value_info("y", kind, [None] * y)],
                         [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()])
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9), str(path))
    return work_of(read_file(path, {"x": concrete} if concrete else {}))


def node(*args: Any, **kwargs: Any) -> Any:
    return pytest.importorskip("onnx").helper.make_node(*args, **kwargs)


def ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def test_a_convolution_with_bias_and_activation(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w", "b"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1], group=2),
             node("Relu", ["c"], ["y"])]
    work = onnx_work(tmp_path / "m.onnx", nodes, (1, 4, 8, 8), 4, {"w": ones(6, 2, 3, 3), "b": ones(6)})
    out = 6 * 4 * 4
    assert work.by_operator == {"Conv": 2 * out * 2 * 9 + out, "Relu": out}
    assert work.flops == sum(work.by_operator.values())
    # The activation works in place: the input is read, the weights are read, the result is written.
    assert work.bytes == F32 * (4 * 64 + 6 * 2 * 9 + 6 + out)


def test_a_deconvolution(tmp_path: Path) -> None:
    nodes = [node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])]
    work = onnx_work(tmp_path / "m.onnx", nodes, (1, 4, 5, 5), 4, {"w": ones(4, 3, 2, 2)})
    assert work.flops == 2 * 4 * 25 * 3 * 4


def test_a_matrix_product_with_a_symbolic_batch(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Softmax", ["m"], ["s"]), node("Transpose", ["s"], ["y"])]
    work = onnx_work(tmp_path / "m.onnx", nodes, ("batch", 7, 16), 3, {"w": ones(16, 5)}, (3, 7, 16))
    out = 3 * 7 * 5
    assert work.by_operator == {"MatMul": 2 * out * 16, "Softmax": out}
    assert work.bytes == F32 * (3 * 7 * 16 + 16 * 5 + 2 * out + 2 * out + out)


def test_what_follows_from_shapes_and_constants_costs_nothing(tmp_path: Path) -> None:
    nodes = [node("Shape", ["x"], ["s"]), node("Mul", ["w", "w"], ["ww"]), node("Expand", ["ww", "s"], ["e"]),
             node("Add", ["x", "e"], ["y"])]
    work = onnx_work(tmp_path / "m.onnx", nodes, (4, 5), 2, {"w": ones(5)})
    assert work == Work(20, F32 * (20 + 5 + 20), {"Add": 20})


def test_quantized_activations_weigh_a_byte(tmp_path: Path) -> None:
    """Between two quantizers only small numbers travel; the graph's own input and output stay floats."""
    chain = [("QuantizeLinear", "s z"), ("DequantizeLinear", "s z"), ("MatMul", "w"), ("QuantizeLinear", "s z"),
             ("DequantizeLinear", "s z"), ("MatMul", "w")]
    names = ["x", "a", "b", "c", "d", "e", "y"]
    nodes = [node(kind, [names[i], *rest.split()], [names[i + 1]]) for i, (kind, rest) in enumerate(chain)]
    weights = {"w": ones(16, 16), "s": np.float32(1), "z": np.zeros((), np.uint8)}
    work = onnx_work(tmp_path / "m.onnx", nodes, (4, 16), 2, weights)
    assert work.by_operator == {"MatMul": 2 * 2 * 4 * 16 * 16}
    assert work.bytes == F32 * (64 + 256 + 64) + F32 + 1 + 2 * 64 + 2 * 64


def test_gemm_follows_its_transposition(tmp_path: Path) -> None:
    nodes = [node("Gemm", ["x", "w", "b"], ["y"], transA=1)]
    work = onnx_work(tmp_path / "m.onnx", nodes, (16, 3), 2, {"w": ones(16, 5), "b": ones(5)})
    assert work.flops == 2 * 3 * 5 * 16 + 15


def test_a_file_that_is_no_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from pocketsam.benchmarks.graph_onnx import read_file

    (tmp_path / "m.onnx").write_bytes(b"no model at all")
    with pytest.raises(BundleError, match="cannot be read as ONNX"):
        read_file(tmp_path / "m.onnx", {})


def test_views_and_reductions() -> None:
    tensors = {"x": Tensor((2, 8), 16), "r": Tensor((16,), 16), "m": Tensor((1,), 16)}
    steps = (Step("RESHAPE", ("x",), ("r",)), Step("MEAN", ("r",), ("m",)))
    assert work_of(Graph(tensors, frozenset(), ("x",), ("m",), steps)) == Work(16, 2 * 17, {"MEAN": 16})


def test_an_unknown_operator_is_named() -> None:
    tensors = {"x": Tensor((2,), 32), "y": Tensor((2,), 32)}
    graph = Graph(tensors, frozenset(), ("x",), ("y",), (Step("Einsum", ("x",), ("y",)),))
    with pytest.raises(UnsupportedModel, match="'Einsum'"):
        work_of(graph)


def test_each_operator_kind_is_in_one_table() -> None:
    groups = (kinds.VIEWS, kinds.MOVES, kinds.ELEMENTWISE, kinds.NORMALS, kinds.REDUCTIONS)
    assert sum(map(len, groups)) == len(frozenset().union(*groups))


def test_every_core_ml_operator_has_a_cost() -> None:
    """All that our evaluator executes: products aside, each is in a table."""
    from pocketsam.runtimes.mil import ops_elementwise, ops_reduce, ops_shape

    named = {*ops_elementwise.TABLE, *ops_reduce.TABLE, *ops_shape.TABLE}
    assert not [n for n in sorted(named) if kinds.cost(n) is None]


@pytest.fixture(scope="module")
def works(toy_everywhere: Path) -> dict[tuple[str, str, int], Work]:
    """The work of every fp32 graph of the toy model by format, graph and batch."""
    bundle = read_bundle(toy_everywhere)
    return {(f, g, n): count(bundle, f, "fp32", g, n) for f in bundle.formats()
            for g, n in (("encoder", 1), ("decoder", 1), ("decoder", 16))}


@pytest.mark.slow
@pytest.mark.parametrize(("graph", "batch"), [("encoder", 1), ("decoder", 1), ("decoder", 16)])
def test_formats_agree(works: dict[tuple[str, str, int], Work], graph: str, batch: int) -> None:
    """LiteRT's decoder keeps the official projections, which the other formats absorb: it is compared apart."""
    flops = {f: w.flops for (f, g, n), w in works.items() if (g, n) == (graph, batch)}
    assert len(flops) == 4
    if graph == "decoder":
        flops.pop("litert")
    assert max(flops.values()) <= 1.1 * min(flops.values()), flops


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_litert_agrees_with_torch(works: dict[tuple[str, str, int], Work], toy_checkpoint: Path, graph: str) -> None:
    """The products and convolutions of torch's own counter, which counts nothing else."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pocketsam.export.graphs import DecoderGraph, EncoderGraph, example_inputs
    from pocketsam.models.loading import load_model

    model = load_model("toy_sam", toy_checkpoint, None)
    spec = model.spec.encoder_graph() if graph == "encoder" else model.spec.decoder_graph()
    module: Any = EncoderGraph(model) if graph == "encoder" else DecoderGraph(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*example_inputs(spec, batch=1))
    ours = works["litert", graph, 1].by_operator
    products = sum(n for k, n in ours.items() if k in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED",
                                                       "BATCH_MATMUL", "TRANSPOSE_CONV"))
    assert products == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.slow
def test_half_size_weights_are_fewer_bytes(toy_everywhere: Path, works: dict[tuple[str, str, int], Work]) -> None:
    bundle = read_bundle(toy_everywhere)
    half = [f for f in bundle.formats() if any(a.format == f and a.precision == "fp16" for a in bundle.artifacts)]
    assert half
    for format_ in half:
        work = count(bundle, format_, "fp16", "encoder")
        assert work.bytes < works[format_, "encoder", 1].bytes, format_
        assert work.flops == pytest.approx(works[format_, "encoder", 1].flops, rel=0.02), format_


@pytest.mark.slow
def test_litert_gives_no_times_and_counts_fallbacks(toy_everywhere: Path) -> None:
    bundle = read_bundle(toy_everywhere)
    with pytest.raises(NoProfiler, match="benchmark_model"):
        slowest(bundle, "litert", "fp32", "encoder", 1)
    number = fallbacks(bundle, "litert", "fp32", "decoder", 1)
    assert number is not None
    assert number >= 0
    assert fallbacks(bundle, "coreml", "fp32", "decoder", 1) is None
    openvino = slowest(bundle, "openvino", "fp32", "decoder", 1)
    assert sum(r.share for r in openvino) <= 1 + 1e-9
    assert fallbacks(bundle, "openvino", "fp32", "decoder", 1) is not None


def test_rates_of_this_machine() -> None:
    one = ceiling(1)
    assert one.threads == 1
    # A megabyte a second or an exaflop would be an error of units, on any machine.
    assert 1e8 < one.gemm_fp32 < 1e13
    assert 1e7 < one.bandwidth < 1e12
    assert one.gemm_int8 is None or 1e8 < one.gemm_int8 < 1e14


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_no_rates(toy: Bundle, threads: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        ceiling(threads)
    with pytest.raises(UsageError, match="at least 1"):
        slowest(toy, "onnxruntime", "fp32", "encoder", threads)


def test_importing_needs_no_engine() -> None:
    code = ("import sys, pocketsam.benchmarks.roofline, pocketsam.benchmarks.rates\n"
            "assert not {'torch', 'onnx', 'onnxruntime', 'openvino', 'ai_edge_litert', 'coremltools'} & {*sys.modules}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def test_floor_is_the_longer_of_both_limits() -> None:
    machine = Ceiling(gemm_fp32=1e9, gemm_int8=4e9, bandwidth=1e8, threads=1)
    assert floor_ms(Work(10**9, 1, {}), machine, "fp32") == 1e3
    assert floor_ms(Work(10**9, 1, {}), machine, "int8") == 250
    assert floor_ms(Work(1, 10**8, {}), machine, "fp16") == 1e3
    with pytest.raises(UnknownName, match="precision"):
        floor_ms(Work(1, 1, {}), machine, "fp23")
    with pytest.raises(UsageError, match="int8 rate"):
        floor_ms(Work(1, 1, {}), Ceiling(1e9, None, 1e8, 1), "int8")


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_operator_times_of_onnxruntime(toy: Bundle, graph: str) -> None:
    rows = slowest(toy, "onnxruntime", "fp32", graph, 1, count=5)
    assert len(rows) == 5
    assert [r.ms for r in rows] == sorted((r.ms for r in rows), reverse=True)
    assert len({r.name for r in rows}) == 5
    assert 0 < sum(r.share for r in rows) <= 1 + 1e-9
    assert fallbacks(toy, "onnxruntime", "fp32", graph, 1) == 0


def test_operator_times_of_pytorch(toy_checkpoint: Path) -> None:
    import torch

    import pocketsam

    before = torch.get_num_threads()
    runtime = pocketsam.load("toy_sam", checkpoint=toy_checkpoint, runtime="pytorch", threads=1).runtime
    try:
        rows = slowest(None, runtime, "fp32", "decoder", 1)
        assert rows[0].kind.startswith("aten::")
        assert 0 < sum(r.share for r in rows) <= 1 + 1e-9
        assert fallbacks(None, runtime, "fp32", "decoder", 1) == 0
        with pytest.raises(UsageError, match="threads=3"):
            slowest(None, runtime, "fp32", "decoder", 3)
    finally:
        torch.set_num_threads(before)


def test_caches_of_all_clusters_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        folder = tmp_path / f"cpu{cpu}/cache/index3"
        folder.mkdir(parents=True)
        (folder / "size").write_text("32768K\n")
        (folder / "shared_cpu_list").write_text(f"{shared}\n")
    monkeypatch.setattr(rates, "CPUS", tmp_path)
    assert rates._cache_bytes() == 2 * 32 * 2**20
    assert rates._copy_bytes() == rates.MOST_BYTES


MISTAKES: dict[str, tuple[Callable[[Bundle], object], type[Exception], str]] = {
    "format": (lambda b: count(b, "onx", "fp32", "encoder"), UnknownName, "did you mean 'onnx'"),
    "absent": (lambda b: count(b, "litert", "fp32", "encoder"), BundleError, "not litert"),
    "precision": (lambda b: count(b, "onnx", "fp23", "encoder"), UnknownName, "precision"),
    "graph": (lambda b: count(b, "onnx", "fp32", "encodr"), UnknownName, "did you mean 'encoder'"),
    "batch": (lambda b: count(b, "onnx", "fp32", "encoder", 2), UsageError, "the onnx encoder takes 1"),
    "fixed": (lambda b: count(b, "litert", "fp32", "decoder", 3), UsageError, "takes 1 or 16"),
    "none": (lambda b: count(b, "onnx", "fp32", "decoder", 0), UsageError, "at least 1"),
    "runtime": (lambda b: slowest(b, "onnxrutime", "fp32", "encoder", 1), UnknownName, "did you mean 'onnxruntime'"),
    "pytorch": (lambda b: slowest(b, "pytorch", "fp32", "encoder", 1), UsageError, "opened PyTorch runtime"),
    "coreml": (lambda b: slowest(b, "coreml", "fp32", "encoder", 1), NoProfiler, "Apple"),
    "bundle": (lambda b: slowest(None, "onnxruntime", "fp32", "encoder", 1), UsageError, "needs a bundle"),
    "count": (lambda b: slowest(b, "onnxruntime", "fp32", "encoder", 1, count=0), UsageError, "count is 0"),
    "which": (lambda b: slowest(b, "onnxruntime", "fp32", "encodr", 1), UnknownName, "did you mean 'encoder'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(toy: Bundle, case: str) -> None:
    call, error, message = MISTAKES[case]
    with pytest.raises(error, match=message):
        call(toy)
