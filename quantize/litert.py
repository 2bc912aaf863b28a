"""LiteRT through ai-edge-quantizer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketsam.batching import ENTRY_BATCHES
from pocketsam.errors import UnsupportedModel
from pocketsam.export.litert import litert_quiet, signature_name
from pocketsam.quantize.grid import Grid
from pocketsam.quantize.litert_file import compact
from pocketsam.quantize.recipes import Job

if TYPE_CHECKING:
    from pocketsam.quantize.channels import Form
    from pocketsam.quantize.ranges import Range

CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE")
WEIGHTED = (*CONVOLUTIONS, "FULLY_CONNECTED")
# The interpreter's name for what the quantizer calls otherwise.
NAMES = {"TRANSPOSE_CONV": "CONV_2D_TRANSPOSE"}
# What stands between weighted layers and costs a conversion each way when left in float. Softmax, normalisation and
# products of two computed tensors (attention) are left out on purpose: they stay in float.
BETWEEN = ("RESIZE_NEAREST_NEIGHBOR",)
# Bytes of float weights above which ai-edge-quantizer 0.10 makes them two-dimensional, but not their scales.
LARGE = 32 * 2**20


class Operator(NamedTuple):
    """A weighted operator: names of the tensors that it reads and writes, and its weights."""

    kind: str
    reads: str
    writes: str
    weights: NDArray[Any]


class LiteRtQuantizer:
    """``int8``: static a8w8 in XNNPACK's int8 kernels; ``int8-dynamic``; ``int8-weights``."""

    name = "litert"
    recipes: tuple[str, ...] = ("int8", "int8-dynamic", "int8-weights")
    scales: Form = "bound"
    rounds_outputs = True

    @staticmethod
    def grid() -> Grid:
        """Its kernels add in 32 bits."""
        return "full"

    def __init__(self, job: Job) -> None:
        self.job = job
        self._statistics: Any = None

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        return {"ai-edge-quantizer": metadata.version("ai-edge-quantizer")}

    @staticmethod
    def check_source(path: Path) -> None:
        """Takes every artifact."""

    def layers(self) -> dict[str, NDArray[Any]]:
        """The tensors that weighted operators write."""
        return {o.writes: o.weights for o in self._operators()}

    def attention(self) -> list[str]:
        """None: attention stays in float."""
        return []

    def write(self, path: Path, keep: frozenset[str] = frozenset()) -> None:
        """Write the quantized flatbuffer, with the operators that write the tensors of ``keep`` in float."""
        with litert_quiet():
            from ai_edge_quantizer.calibrator import CalibrationMode

            tool = self._tool(keep)
            if tool.need_calibration and self._statistics is None:
                # The other mode keeps every tensor of the graph in memory: 4.6 GB for a decoder of 16 prompts, not 0.3.
                self._statistics = tool.calibrate(self._samples(), num_threads=self.job.threads,
                                                  mode=CalibrationMode.CALIBRATION_PROFILER_BASED)
                for name, (low, high) in self._ranges().items():
                    self._statistics[name].update(min=np.full_like(self._statistics[name]["min"], low),
                                                  max=np.full_like(self._statistics[name]["max"], high))
            with large_kernels():
                tool.quantize(self._statistics).export_model(str(path), overwrite=True)
            compact(path)

    def _samples(self) -> dict[str, Any]:
        batches = ENTRY_BATCHES if self.job.spec.name == "decoder" else (1,)
        return {signature_name(self.job.spec, b): list(self.job.inputs(b)) for b in batches}

    def _operators(self) -> Iterator[Operator]:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        interpreter = Interpreter(model_path=str(self.job.source),
                                  experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
        interpreter.allocate_tensors()
        names = {int(d["index"]): str(d["name"]) for d in interpreter.get_tensor_details()}
        for operator in interpreter._get_ops_details():
            if (kind := NAMES.get(operator["op_name"], operator["op_name"])) in WEIGHTED:
                # A transposed convolution names the shape of its output first.
                reads, weights = operator["inputs"][2 if kind == "CONV_2D_TRANSPOSE" else 0], operator["inputs"][1]
                yield Operator(kind, names[int(reads)], names[int(operator["outputs"][0])],
                               interpreter.get_tensor(int(weights)))

    def _ranges(self) -> dict[str, Range]:
        """Ranges of activations that PyTorch found better than the extremes."""
        found: dict[str, Range] = {}
        for operator in self._operators():
            if (layer := self.job.layer_of(operator.weights)) is not None:
                found[operator.reads] = layer.reads
                # Behind a matrix product the bias may still be to come.
                if operator.kind in CONVOLUTIONS and not layer.fused:
                    found[operator.writes] = layer.writes
        return found

    def _tool(self, keep: frozenset[str]) -> Any:
        from ai_edge_quantizer import qtyping, quantizer

        class Quantizer(quantizer.Quantizer):  # type: ignore[misc]  # the tool has no types
            """Checks that every tensor was calibrated without what the tool does for it: allocate all of them at once,
            31 GB for SAM ViT-B.
            """

            def _ensure_model_qsv_sufficient(self, calibration_result: dict[str, Any]) -> None:
                if missing := [name for name, found in calibration_result.items() if not found]:
                    raise UnsupportedModel(f"LiteRT's calibration found no range of {missing[0]!r}.")

        tool = Quantizer(str(self.job.source))
        for name in (*WEIGHTED, *BETWEEN) if self.job.recipe == "int8" else WEIGHTED:
            operation = qtyping.TFLOperationName(name)
            if self.job.recipe == "int8":
                tool.add_static_config(".*", operation, activation_num_bits=8, weight_num_bits=8)
            elif self.job.recipe == "int8-dynamic":
                tool.add_dynamic_config(".*", operation, num_bits=8)
            else:
                tool.add_weight_only_config(".*", operation, num_bits=8)
        for layer in sorted(keep):
            # An operator's scope is the list of tensors that it writes, each followed by a semicolon.
            tool.update_quantization_recipe(regex=f"(^|;){re.escape(layer)};", algorithm_key="no_quantize",
                                            operation_name=qtyping.TFLOperationName.ALL_SUPPORTED)
        return tool


@contextmanager
def large_kernels() -> Iterator[None]:
    """Let the tool quantize convolution kernels of more than ``LARGE`` bytes, which it refuses: part by part."""
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor as functions

    whole = functions.uniform_quantize

    def in_parts(data: NDArray[Any], params: Any, is_blockwise: bool = False) -> NDArray[Any]:
        if data.ndim < 3 or data.nbytes <= LARGE or is_blockwise:
            return np.asarray(whole(data, params, is_blockwise))
        parts = np.array_split(np.arange(len(data)), min(len(data), -(-data.nbytes // LARGE)))
        by_output = len(params.scale) == len(data)
        return np.concatenate([
            whole(data[i], dataclasses.replace(params, scale=params.scale[i], zero_point=params.zero_point[i])
                  if by_output else params) for i in parts])

    functions.uniform_quantize = in_parts
    try:
        yield
    finally:
        functions.uniform_quantize = whole
