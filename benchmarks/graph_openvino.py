"""OpenVINO IR as data, reshaped to a concrete batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import openvino as ov

from pocketsam.benchmarks.kinds import attention
from pocketsam.benchmarks.work import Graph, Shapes, Step, Tensor
from pocketsam.bundle import IR_FILE
from pocketsam.errors import BundleError, first_line
from pocketsam.specs import GraphSpec

# Weight axes that are not multiplied with an input value: the output channel, and the group before it.
CONVOLUTIONS = {"Convolution": 1, "GroupConvolution": 2}
TRANSPOSED = {"ConvolutionBackpropData": 1, "GroupConvolutionBackpropData": 2}


def read(path: Path, graph: GraphSpec, batch: int) -> Graph:
    """Read an ``openvino`` artifact, a folder, with ``batch`` in place of its symbolic size.

    Raises:
        BundleError: OpenVINO refuses the file or the shapes.
    """
    return read_file(path / IR_FILE, {t.name: t.concrete(batch) for t in graph.inputs})


def read_file(path: Path, shapes: Shapes) -> Graph:
    """Read any ``.xml`` with the given input shapes."""
    try:
        model = ov.Core().read_model(path)
        model.reshape({name: ov.PartialShape(list(shape)) for name, shape in shapes.items()})
    except RuntimeError as e:
        raise BundleError(f"OpenVINO {ov.get_version()} refuses {path} ({first_line(e)}); export the "
                          "bundle again or change the openvino version.") from e
    return from_model(model)


def from_model(model: ov.Model) -> Graph:
    """A model in memory, its shapes fixed."""
    tensors: dict[str, Tensor] = {}
    found: dict[str, list[str]] = {"Constant": [], "Parameter": [], "Result": []}
    steps: list[Step] = []
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        inputs = [_name(port.get_source_output()) for port in op.inputs()]
        outputs = [_name(port) for port in op.outputs()]
        if kind == "Result":
            found[kind] += inputs
            continue
        tensors |= {_name(p): _tensor(p) for p in op.outputs() if p.get_partial_shape().is_static}
        if kind in found:
            found[kind] += outputs
        else:
            steps.append(Step(kind, tuple(inputs), tuple(outputs), _flops(op), nearest=_nearest(op)))
    return Graph(tensors, frozenset(found["Constant"]), tuple(found["Parameter"]), tuple(found["Result"]),
                 tuple(steps))


def _name(port: Any) -> str:
    return f"{port.get_node().get_name()}:{port.get_index()}"


def _tensor(port: Any) -> Tensor:
    op = port.get_node()
    # The plugin stores what it quantizes in a byte, though the file declares floats.
    quantized = op.get_type_name() == "FakeQuantize" and op.get_attributes()["levels"] <= 256
    return Tensor(tuple(port.get_shape()), 8 if quantized else int(port.get_element_type().bitwidth))


def _nearest(op: Any) -> bool:
    return bool(op.get_type_name() == "Interpolate" and op.get_attributes().get("mode") == "nearest")


def _flops(op: Any) -> int | None:
    kind = str(op.get_type_name())
    shapes: list[tuple[int, ...]] = [tuple(op.get_input_shape(i)) if op.get_input_partial_shape(i).is_static else ()
                                     for i in range(op.get_input_size())]
    output: tuple[int, ...] = tuple(op.get_output_shape(0)) if op.get_output_partial_shape(0).is_static else ()
    if kind in CONVOLUTIONS:
        return 2 * math.prod(output) * math.prod(shapes[1][CONVOLUTIONS[kind]:])
    if kind in TRANSPOSED:
        return 2 * math.prod(shapes[0]) * math.prod(shapes[1][TRANSPOSED[kind]:])
    if kind == "MatMul":
        return 2 * math.prod(output) * shapes[0][-2 if op.get_attributes()["transpose_a"] else -1]
    if kind == "ScaledDotProductAttention":
        return attention(shapes[0], shapes[1], shapes[2], len(shapes) > 3 and math.prod(shapes[3]) > 1)
    if kind in ("AvgPool", "MaxPool"):
        return math.prod(output) * math.prod(map(int, op.get_attributes()["kernel"]))
    return None
