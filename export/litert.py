"""LiteRT (TFLite) flatbuffers through litert-torch, with the contract's names and one signature a prompt batch."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketsam.batching import ENTRY_BATCHES
from pocketsam.export.graphs import Graph, example_inputs
from pocketsam.quiet import quiet
from pocketsam.specs import GraphSpec

# Settings of the converter's C++ part: no remarks, and no graphics card.
SETTINGS = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


class LiteRtExporter:
    """Writes ``litert/<graph>.<precision>.tflite``: signature ``encode``, or ``decode_1`` and ``decode_16``.

    fp16 stores the weights in half size; XNNPACK computes in fp32. The decoder keeps the official form: the absorbed
    one makes products of two computed tensors, for which XNNPACK packs on every call (60 ms against 30 ms).
    """

    name = "litert"
    runtime = "litert"
    extension = "tflite"
    precisions = ("fp32", "fp16")
    absorb = False

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        return {p: metadata.version(p) for p in ("torch", "litert-torch", "litert-converter", "ai-edge-quantizer")}

    @staticmethod
    def export(graph: Graph, spec: GraphSpec, precision: str, path: Path) -> None:
        """Convert one graph and write it."""
        with litert_quiet(), torch.no_grad():
            if precision == "fp32":
                _convert(graph, spec, path)
                return
            with tempfile.TemporaryDirectory() as folder:
                # The same export made the fp32 file of this graph a moment ago, where both precisions are asked for.
                full = path.with_name(f"{spec.name}.fp32.tflite")
                if not full.is_file():
                    full = Path(folder) / full.name
                    _convert(graph, spec, full)
                _half_weights(full, path)


def _convert(graph: Graph, spec: GraphSpec, path: Path) -> None:
    """Write the fp32 file, one signature a prompt batch."""
    import litert_torch

    named = _Named(graph, spec).eval()
    converter: Any = litert_torch
    for batch in ENTRY_BATCHES if spec.batched else (1,):
        inputs = dict(zip(spec.input_names, example_inputs(spec, batch), strict=True))
        converter = converter.signature(signature_name(spec, batch), named, sample_kwargs=inputs)
    converter.convert().export(str(path))


def signature_name(spec: GraphSpec, batch: int) -> str:
    """``encode``, ``decode_1`` or ``decode_16``; or a click graph's own name."""
    verb = {"encoder": "encode", "decoder": "decode"}.get(spec.name, spec.name)
    return f"{verb}_{batch}" if spec.batched else verb


class _Named(nn.Module):
    """Keyword inputs and dictionary outputs, which is how names reach the signature."""

    def __init__(self, graph: nn.Module, spec: GraphSpec) -> None:
        super().__init__()
        self.inner = graph
        self.spec = spec

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        out = self.inner(*(inputs[n] for n in self.spec.input_names))
        return dict(zip(self.spec.output_names, out, strict=True))


def _half_weights(source: Path, target: Path) -> None:
    from ai_edge_quantizer import qtyping, quantizer

    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
        compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True)
    tool = quantizer.Quantizer(str(source))
    tool.update_quantization_recipe(regex=".*", operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
                                    op_config=config, algorithm_key="float_casting")
    tool.quantize().export_model(str(target), overwrite=True)


@contextlib.contextmanager
def litert_quiet() -> Iterator[None]:
    """:func:`pocketsam.quiet.quiet`, with the settings of the C++ part, which writes to standard error itself."""
    added = {k: v for k, v in SETTINGS.items() if k not in os.environ}
    os.environ.update(added)
    try:
        with quiet():
            yield
    finally:
        for name in added:
            os.environ.pop(name, None)
