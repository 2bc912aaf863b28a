"""ONNX files as data: shapes by ONNX's own inference for a concrete batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx

from pocketsam.benchmarks.work import Graph, Shapes, Step, Tensor
from pocketsam.bundle import onnx_file
from pocketsam.errors import BundleError, UnsupportedModel
from pocketsam.specs import GraphSpec

# Larger constants only pass through shape inference, which needs their shapes alone.
SMALL_BYTES = 4096
# (data, weights) -> multiply-adds; the two inputs' places differ in the quantized operators.
CONVOLUTIONS = {"Conv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3)}
PRODUCTS = {"MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3), "Gemm": (0, 1)}
BIASES = {"Conv": 2, "Gemm": 2, "ConvTranspose": 2, "QLinearConv": 8}


def read(path: Path, graph: GraphSpec, batch: int) -> Graph:
    """Read an ``onnx`` artifact with ``batch`` in place of its symbolic size.

    Raises:
        BundleError: no ONNX file, or its shapes contradict each other.
        UnsupportedModel: an operator with a graph inside.
    """
    return read_file(path, {t.name: t.concrete(batch) for t in graph.inputs})


def read_file(path: Path, shapes: Shapes) -> Graph:
    """Read any ONNX file with the given input shapes."""
    try:
        model = onnx.load(str(onnx_file(path)), load_external_data=False)
        sizes = {i.name: _constant(i) for i in model.graph.initializer}
        _prepare(model, shapes)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except Exception as e:  # onnx and protobuf raise classes of their own
        raise BundleError(f"{path} cannot be read as ONNX ({str(e)[:200]}); export the bundle again.") from e
    tensors = {v.name: t for v in (*model.graph.input, *model.graph.value_info, *model.graph.output)
               if (t := _tensor(v)) is not None} | sizes
    inputs = tuple(i.name for i in model.graph.input if i.name not in sizes)
    shell = Graph(tensors, frozenset(sizes), inputs, tuple(o.name for o in model.graph.output), ())
    steps = tuple(_step(shell, n) for n in model.graph.node)
    return Graph(shell.tensors, shell.stored, shell.inputs, shell.outputs, steps)


def _prepare(model: Any, shapes: Shapes) -> None:
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            dim.dim_value = size
    # Old annotations may carry symbolic sizes that the concrete ones would contradict.
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for constant in model.graph.initializer:
        if len(constant.raw_data) > SMALL_BYTES:
            constant.raw_data = b""


def _constant(initializer: Any) -> Tensor:
    return Tensor(tuple(initializer.dims), _bits(initializer.data_type))


def _tensor(value: Any) -> Tensor | None:
    """None where a size is not known."""
    kind = value.type.tensor_type
    if not kind.HasField("shape") or any(not d.HasField("dim_value") for d in kind.shape.dim):
        return None
    return Tensor(tuple(d.dim_value for d in kind.shape.dim), _bits(kind.elem_type))


def _bits(data_type: int) -> int:
    name = str(onnx.TensorProto.DataType.Name(data_type))
    if name in ("INT4", "UINT4", "FLOAT4E2M1"):
        return 4
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def _step(graph: Graph, node: Any) -> Step:
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
        raise UnsupportedModel(f"the operator {node.op_type!r} holds a graph of its own, whose work cannot be counted.")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    # An omitted optional input has an empty name.
    step = Step(node.op_type, tuple(i for i in node.input if i), tuple(o for o in node.output if o))
    flops = _flops(graph, step, list(node.input), attributes)
    nearest = node.op_type in ("Resize", "Upsample") and attributes.get("mode", b"nearest") == b"nearest"
    return Step(step.kind, step.inputs, step.outputs, flops, nearest=nearest)


def _flops(graph: Graph, step: Step, names: list[str], attributes: dict[str, Any]) -> int | None:
    kind = step.kind

    def tensor(place: int) -> Tensor:
        return graph.tensor(names[place], step)

    def output() -> int:
        return graph.tensor(step.outputs[0], step).elements

    bias_at = BIASES.get(kind)
    has_bias = bias_at is not None and len(names) > bias_at and bool(names[bias_at])
    bias = output() if has_bias else 0
    if kind in CONVOLUTIONS:
        return 2 * output() * math.prod(tensor(CONVOLUTIONS[kind][1]).shape[1:]) + bias
    if kind == "ConvTranspose":
        return 2 * tensor(0).elements * math.prod(tensor(1).shape[1:]) + bias
    if kind in PRODUCTS:
        inner = tensor(PRODUCTS[kind][0]).shape[0 if attributes.get("transA") else -1]
        return 2 * output() * inner + bias
    if kind in ("AveragePool", "MaxPool"):
        return output() * math.prod(map(int, attributes["kernel_shape"]))
    return None
