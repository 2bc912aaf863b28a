"""LiteRT flatbuffers as data, read with the schema that ships with ai-edge-litert."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from pocketsam.benchmarks.work import Graph, Step, Tensor
from pocketsam.errors import BundleError, UnsupportedModel
from pocketsam.specs import GraphSpec

POOLS = ("AVERAGE_POOL_2D", "MAX_POOL_2D")
# Inputs (data, weights, bias) of the operators that multiply.
PLACES = {"CONV_2D": (0, 1, 2), "CONV_3D": (0, 1, 2), "DEPTHWISE_CONV_2D": (0, 1, 2), "FULLY_CONNECTED": (0, 1, 2),
          "TRANSPOSE_CONV": (2, 1, 3)}
# TFLite keeps buffer 0 and absent data for "no data"; a real buffer has an offset of its own only beyond 2 GB.
NO_OFFSET = 1


def read(path: Path, graph: GraphSpec, batch: int) -> Graph:
    """Read the signature of a ``litert`` artifact that takes ``batch`` prompts.

    Raises:
        BundleError: no LiteRT file, or it has no such signature.
    """
    return read_file(path, "encode" if graph.name == "encoder" else f"decode_{batch}")


def read_file(path: Path, signature: str | None) -> Graph:
    """Read one signature of any ``.tflite``; None for its first subgraph."""
    data = path.read_bytes()
    if data[4:8] != b"TFL3":
        raise BundleError(f"{path} is not a LiteRT file; export the bundle again.")
    try:
        model = schema.ModelT.InitFromPackedBuf(data)
        signatures = {s.signatureKey.decode(): s.subgraphIndex for s in model.signatureDefs or []}
    except Exception as e:  # a damaged flatbuffer fails anywhere, with struct.error, IndexError, UnicodeDecodeError...
        raise BundleError(f"{path} cannot be read as LiteRT ({str(e)[:200]}); export the bundle again.") from e
    if signature is not None and signature not in signatures:
        raise BundleError(f"{path} has the signatures {sorted(signatures)}, not {signature}; export the bundle again.")
    return _graph(model, model.subgraphs[0 if signature is None else signatures[signature]])


def _graph(model: Any, subgraph: Any) -> Graph:
    tensors = {str(i): _tensor(t) for i, t in enumerate(subgraph.tensors)}
    stored = frozenset(str(i) for i, t in enumerate(subgraph.tensors) if _has_data(model.buffers[t.buffer]))
    names = [_kind(code) for code in model.operatorCodes]
    steps = tuple(_step(tensors, names[op.opcodeIndex], op) for op in subgraph.operators)
    return Graph(tensors, stored, tuple(map(str, subgraph.inputs)), tuple(map(str, subgraph.outputs)), steps)


def _has_data(buffer: Any) -> bool:
    return (buffer.data is not None and len(buffer.data) > 0) or buffer.offset > NO_OFFSET


def _tensor(tensor: Any) -> Tensor:
    # A scalar may have no shape at all.
    shape = () if tensor.shape is None else tuple(int(n) for n in tensor.shape)
    return Tensor(shape, _bits(tensor.type))


@cache
def _bits(number: int) -> int:
    """``FLOAT32`` -> 32; booleans take a byte."""
    name = _names(schema.TensorType)[number]
    digits = re.search(r"\d+$", name)
    if name == "BOOL":
        return 8
    if digits is None:
        raise UnsupportedModel(f"a LiteRT tensor has the type {name}, whose size is not known.")
    return int(digits.group())


def _kind(code: Any) -> str:
    # Builtin codes beyond 127 are in the newer field; the older one stays at its limit.
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    name = _names(schema.BuiltinOperator)[number]
    return f"CUSTOM {code.customCode.decode()}" if name == "CUSTOM" else name


def _names(table: Any) -> dict[int, str]:
    return {v: k for k, v in vars(table).items() if isinstance(v, int)}


def _step(tensors: dict[str, Tensor], kind: str, op: Any) -> Step:
    inputs = tuple(str(i) for i in op.inputs if i >= 0)
    outputs = tuple(str(o) for o in op.outputs)
    given = [tensors[str(i)] if i >= 0 else None for i in op.inputs]
    activation = getattr(op.builtinOptions, "fusedActivationFunction", 0)
    extra = tensors[outputs[0]].elements if activation else 0
    return Step(kind, inputs, outputs, _flops(kind, given, tensors[outputs[0]], op.builtinOptions), extra)


def _flops(kind: str, given: list[Tensor | None], output: Tensor, options: Any) -> int | None:
    if kind in POOLS:
        return output.elements * int(options.filterWidth) * int(options.filterHeight)
    if kind == "BATCH_MATMUL":
        x = given[0]
        assert x is not None
        return 2 * output.elements * x.shape[-2 if options.adjX else -1]
    if kind not in PLACES:
        return None
    data, weight = given[PLACES[kind][0]], given[PLACES[kind][1]]
    assert data is not None
    assert weight is not None
    place = PLACES[kind][2]
    bias = output.elements if len(given) > place and given[place] is not None else 0
    return 2 * MULTIPLY_ADDS[kind](data, weight, output) + bias


# Weights: (O, H, W, I / groups), depthwise (1, H, W, O), fully connected (O, I), transposed (O, H, W, I).
MULTIPLY_ADDS: dict[str, Callable[[Tensor, Tensor, Tensor], int]] = {
    "CONV_2D": lambda x, w, y: y.elements * math.prod(w.shape[1:]),
    "CONV_3D": lambda x, w, y: y.elements * math.prod(w.shape[:-1]),
    "DEPTHWISE_CONV_2D": lambda x, w, y: y.elements * math.prod(w.shape[1:3]),
    "FULLY_CONNECTED": lambda x, w, y: y.elements * w.shape[-1],
    "TRANSPOSE_CONV": lambda x, w, y: x.elements * math.prod(w.shape[:-1]),
}
