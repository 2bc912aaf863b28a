"""LiteRT through ai-edge-quantizer."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

from pocketsam.batching import ENTRY_BATCHES
from pocketsam.export.litert import _quiet as quiet
from pocketsam.export.litert import signature_name
from pocketsam.quantize.grid import Grid
from pocketsam.quantize.recipes import Job

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED")
# What stands between weighted layers and costs a conversion each way when left in float. Softmax, normalisation and
# products of two computed tensors (attention) are left out on purpose: they stay in float.
BETWEEN = ("ADD", "RESIZE_NEAREST_NEIGHBOR")


class LiteRtQuantizer:
    """``int8``: static a8w8 in XNNPACK's int8 kernels; ``int8-dynamic``; ``int8-weights``."""

    name = "litert"
    recipes: tuple[str, ...] = ("int8", "int8-dynamic", "int8-weights")

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

    def layers(self) -> list[str]:
        """Names of the tensors that weighted operators write."""
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        interpreter = Interpreter(model_path=str(self.job.source),
                                  experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
        names = {int(d["index"]): str(d["name"]) for d in interpreter.get_tensor_details()}
        return [names[int(o["outputs"][0])] for o in interpreter._get_ops_details() if o["op_name"] in WEIGHTED]

    def write(self, path: Path, keep: frozenset[str] = frozenset()) -> None:
        """Write the quantized flatbuffer, with the operators that write the tensors of ``keep`` in float."""
        with quiet():
            tool = self._tool(keep)
            if tool.need_calibration and self._statistics is None:
                self._statistics = tool.calibrate(self._samples(), num_threads=self.job.threads)
            tool.quantize(self._statistics).export_model(str(path), overwrite=True)

    def _samples(self) -> dict[str, Any]:
        batches = ENTRY_BATCHES if self.job.spec.name == "decoder" else (1,)
        return {signature_name(self.job.spec, b): list(self.job.inputs(b)) for b in batches}

    def _tool(self, keep: frozenset[str]) -> Any:
        from ai_edge_quantizer import qtyping, quantizer

        tool = quantizer.Quantizer(str(self.job.source))
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
