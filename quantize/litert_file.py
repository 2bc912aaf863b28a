"""What is left to do in a quantized flatbuffer, so that it takes less room."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from numpy.typing import NDArray

from pocketsam.quantize.tables import in_8_bits, is_table


def compact(path: Path) -> None:
    """Store tables that are added in 8 bits, and equal vectors once."""
    model = flatbuffer_utils.read_model(str(path))
    for graph in model.subgraphs:
        _store_tables(model, graph)
    # What only a table pointed to.
    used = {t.buffer for g in model.subgraphs for t in g.tensors} | {m.buffer for m in model.metadata or ()}
    for i, buffer in enumerate(model.buffers):
        if i not in used:
            buffer.data = None
    builder = _Sharing(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(builder.Output())


class _Sharing(flatbuffers.Builder):  # type: ignore[misc]  # flatbuffers has no types
    """Writes equal arrays once: the zero points of symmetric weights, eight bytes a channel, are zeros everywhere."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.known: dict[str, int] = {}

    def CreateNumpyVector(self, array: NDArray[Any]) -> int:  # noqa: N802 (flatbuffers' name)
        key = array.dtype.str + hashlib.sha256(array.tobytes()).hexdigest()
        if key not in self.known:
            self.known[key] = super().CreateNumpyVector(array)
        return self.known[key]


def _store_tables(model: Any, graph: Any) -> None:
    """Put a DEQUANTIZE behind each table; it runs once, when the interpreter starts."""
    added = {i for o in graph.operators if model.operatorCodes[o.opcodeIndex].builtinCode == schema.BuiltinOperator.ADD
             for i in o.inputs}
    for index in sorted(i for i in added if _is_float_table(model, graph.tensors[i])):
        _store(model, graph, index)


def _is_float_table(model: Any, tensor: Any) -> bool:
    return (tensor.type == schema.TensorType.FLOAT32 and is_table(tuple(tensor.shape))
            and model.buffers[tensor.buffer].data is not None)


def _store(model: Any, graph: Any, index: int) -> None:
    """Let a constant be computed from its codes."""
    tensor = graph.tensors[index]
    table = in_8_bits(np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.float32).reshape(tensor.shape))
    codes, buffer = schema.TensorT(), schema.BufferT()
    buffer.data = table.codes.reshape(-1).view(np.uint8)
    codes.name, codes.shape, codes.type, codes.buffer = (tensor.name + b"_int8", tensor.shape, schema.TensorType.INT8,
                                                         len(model.buffers))
    codes.quantization = schema.QuantizationParametersT()
    codes.quantization.scale = table.scales
    codes.quantization.zeroPoint = np.zeros(len(table.scales), np.int64)
    codes.quantization.quantizedDimension = table.axis
    operator = schema.OperatorT()
    operator.opcodeIndex = _code(model, schema.BuiltinOperator.DEQUANTIZE)
    operator.inputs, operator.outputs = [len(graph.tensors)], [index]
    operator.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
    operator.builtinOptions = schema.DequantizeOptionsT()
    model.buffers.append(buffer)
    graph.tensors.append(codes)
    graph.operators.insert(0, operator)
    # Buffer 0 is the empty one of computed tensors.
    tensor.buffer = 0


def _code(model: Any, builtin: int) -> int:
    """The index of an operator among those of the model; added if it is new."""
    for i, code in enumerate(model.operatorCodes):
        if code.builtinCode == builtin:
            return i
    code = schema.OperatorCodeT()
    # The older field holds small codes too, and is read by runtimes that lack the newer one; 5 takes scales by channel.
    code.builtinCode = code.deprecatedBuiltinCode = builtin
    code.version = 5
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
