"""ONNX through ONNX Runtime's tools: QDQ for ``int8``, DequantizeLinear behind weights for the other."""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime import quantization as ortq
from onnxruntime.quantization.shape_inference import quant_pre_process

from pocketsam.errors import UnsupportedModel
from pocketsam.quantize.onnx_ranges import write_ranges
from pocketsam.quantize.onnx_sums import SUMS, sum_in_float
from pocketsam.quantize.recipes import Job, narrow_grid
from pocketsam.quantize.tables import SMALLEST, Table, along, in_8_bits, is_table
from pocketsam.quiet import quiet

if TYPE_CHECKING:
    from pocketsam.quantize.channels import Form

CONVOLUTIONS = ("Conv", "ConvTranspose")
# Their 8-bit kernel can write floats; that of convolutions cannot, and MatMul's fails on batches (ONNX Runtime 1.32).
WRITE_FLOATS = ("Gemm",)
WEIGHTED = (*CONVOLUTIONS, *WRITE_FLOATS, "MatMul")
# What stands between weighted layers; softmax, normalisation and products of computed tensors stay in float, and sums:
# each would round a residual stream once more.
BETWEEN = ("Resize", "Clip", "Relu")


class OnnxQuantizer:
    """``int8``: QDQ, u8 activations, s8 weights per channel on a grid whose sums do not saturate; ``int8-weights``.

    Dynamic int8 is refused: ONNX Runtime turns convolutions into ConvInteger, which is several times slower than float.
    """

    name = "onnx"
    recipes: tuple[str, ...] = ("int8", "int8-weights")
    scales: Form = "divide"
    rounds_outputs = True

    grid = staticmethod(narrow_grid)

    def __init__(self, job: Job) -> None:
        self.job = job
        self.check_source(job.source)
        self._folder = tempfile.TemporaryDirectory()
        self._prepared = Path(self._folder.name) / "prepared.onnx"
        with quiet():
            quant_pre_process(str(job.source), str(self._prepared), skip_symbolic_shape=True)

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        return {"onnxruntime": metadata.version("onnxruntime")}

    @staticmethod
    def check_source(path: Path) -> None:
        """Raises UnsupportedModel if the tool cannot read an artifact: one with its weights apart is too large."""
        if path.is_dir():
            raise UnsupportedModel("ONNX Runtime's quantizer takes models below 2 GiB; make int8 of this one for "
                                   "another format.")

    def layers(self) -> dict[str, NDArray[Any]]:
        """The nodes with constant weights."""
        model = onnx.load(str(self._prepared))
        values = {i.name: i for i in model.graph.initializer}
        return {n.name: numpy_helper.to_array(values[n.input[1]]) for n in self._weighted(model)}

    def attention(self) -> list[str]:
        """None: attention stays in float."""
        return []

    def write(self, path: Path, keep: frozenset[str] = frozenset()) -> None:
        """Write the quantized model, with the nodes of ``keep`` in float."""
        if self.job.recipe == "int8-weights":
            self._write_weights(path, keep)
            return
        model = onnx.load(str(self._prepared))
        weighted = {n.name for n in self._weighted(model)}
        between = {n.name for n in model.graph.node if n.op_type in BETWEEN}
        wanted = weighted - keep
        # Written before the first file, and read for each.
        ranges = Path(self._folder.name) / "ranges.json"
        with quiet():
            if not ranges.exists():
                write_ranges(self._prepared, weighted | between, self.job.inputs(1), ranges, self.job.threads)
            # Unsigned weights would not saturate either, and are ten times slower than fp32 on AVX2.
            ortq.quantize_static(
                str(self._prepared), str(path), None, quant_format=ortq.QuantFormat.QDQ,
                per_channel=True, extra_options={"TensorQuantOverrides": self._overrides(model, wanted),
                                                 "OpTypesToExcludeOutputQuantization": list(WRITE_FLOATS)},
                activation_type=ortq.QuantType.QUInt8,
                weight_type=ortq.QuantType.QInt8, op_types_to_quantize=[*WEIGHTED, *BETWEEN],
                nodes_to_quantize=sorted(wanted | between), calibration_cache_path=ranges)
        model = onnx.load(str(path))
        sum_in_float(model.graph)
        _save(model, path)

    def _overrides(self, model: Any, wanted: set[str]) -> dict[str, list[dict[str, Any]]]:
        """The scales of weights that were rounded before, and ranges of activations; the tool would take others."""
        values = {i.name: i for i in model.graph.initializer}
        found: dict[str, list[dict[str, Any]]] = {}
        for node in self._weighted(model):
            layer = self.job.layer_of(numpy_helper.to_array(values[node.input[1]]))
            if node.name not in wanted or layer is None or layer.scales is None:
                continue
            found[node.input[1]] = [
                {"axis": 0 if node.op_type == "Conv" else 1, "scale": s, "zero_point": np.array(0, np.int8),
                 "quant_type": ortq.QuantType.QInt8} for s in layer.scales.numpy()]
            found[node.input[0]] = [_span(layer.reads)]
            # Behind a matrix product the bias is still to come.
            if node.op_type in CONVOLUTIONS and not layer.fused:
                found[node.output[0]] = [_span(layer.writes)]
        return found

    def _weighted(self, model: Any) -> list[Any]:
        constants = {i.name for i in model.graph.initializer}
        return [n for n in model.graph.node if n.op_type in WEIGHTED and n.input[1] in constants]

    def _write_weights(self, path: Path, keep: frozenset[str]) -> None:
        model = onnx.load(str(self._prepared))
        values = {i.name: i for i in model.graph.initializer}
        done: dict[str, str] = {}
        for node in self._weighted(model):
            name = node.input[1]
            if node.name in keep or np.prod(values[name].dims) < SMALLEST:
                continue
            if name not in done:
                axis = 0 if node.op_type == "Conv" or _transposed(node) else 1
                done[name] = _dequantized(model.graph, name, along(numpy_helper.to_array(values[name]), axis))
            node.input[1] = done[name]
        _save(model, path)


def _span(ends: tuple[float, float]) -> dict[str, Any]:
    """An override of the tool's."""
    return {"rmin": np.float32(ends[0]), "rmax": np.float32(ends[1])}


def _transposed(node: Any) -> bool:
    return node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)


def _dequantized(graph: Any, name: str, table: Table) -> str:
    """Add codes, scales and the operator that joins them; returns its output's name."""
    names = [f"{name}_{end}" for end in ("int8", "scale", "float")]
    graph.initializer.extend([numpy_helper.from_array(table.codes, names[0]),
                              numpy_helper.from_array(table.scales, names[1])])
    graph.node.insert(0, helper.make_node("DequantizeLinear", names[:2], names[2:], axis=table.axis,
                                          name=f"{names[2]}_node"))
    return names[2]


def _save(model: Any, path: Path) -> None:
    """Write a graph with its tables in 8 bits, and without constants that nothing reads."""
    graph = model.graph
    tables = {i.name: i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT and is_table(tuple(i.dims))}
    done: dict[str, str] = {}
    for node in [n for n in graph.node if n.op_type in SUMS]:
        for i, name in enumerate(node.input):
            if name in tables:
                done[name] = done.get(name) or _dequantized(graph, name,
                                                            in_8_bits(numpy_helper.to_array(tables[name])))
                node.input[i] = done[name]
    used = {i for n in graph.node for i in n.input}
    left = [i for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)
    onnx.save(model, str(path))
