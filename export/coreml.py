"""Core ML packages (ML programs) through coremltools' torch.export frontend.

Conversion runs on any system; ``pocketsam.runtimes.mil`` proves the result where there is no Core ML.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pocketsam.batching import ENTRY_BATCHES
from pocketsam.export.graphs import EncoderGraph, Graph, example_inputs
from pocketsam.quiet import quiet
from pocketsam.specs import GraphSpec

# Layers with weights: what stands between a graph input and the first of them handles raw pixels and coordinates.
WEIGHTED = frozenset({"conv", "conv_transpose", "linear", "matmul"})
# What may stand between the product that makes attention logits and its softmax.
LOGIT_PATH = frozenset({"add", "sub", "mul", "real_div", "reshape", "transpose", "expand_dims", "squeeze",
                        "slice_by_index", "concat", "cast", "reduce_sum"})
# What may stand between the products of linear attention and their quotient.
SUM_PATH = LOGIT_PATH | {"matmul"}
# Squares of activations above 255 leave the range of fp16 inside a layer norm.
ALWAYS_FP32 = frozenset({"layer_norm", "softmax", "sin", "cos", "exp", "rsqrt"})


class CoreMlExporter:
    """Writes ``coreml/<graph>.<precision>.mlpackage``: the encoder for iOS 17, the decoder for iOS 18.

    The encoder takes an RGB image of side S; the decoder has the functions ``decode_1`` (default) and ``decode_16``
    for 1 and 16 prompts, which share their weights. All other inputs and all outputs are float32.
    """

    name = "coreml"
    runtime = "coreml"
    extension = "mlpackage"
    precisions = ("fp32", "fp16")
    absorb = True

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        return {"torch": torch.__version__, "coremltools": str(coremltools().__version__)}

    @staticmethod
    def export(graph: Graph, spec: GraphSpec, precision: str, path: Path) -> None:
        """Convert one graph and write its package."""
        with temporary_folder() as folder, quiet():
            if not spec.batched:
                module = PlanarImage(graph).eval() if isinstance(graph, EncoderGraph) else graph
                save(convert(module, spec, precision, 1), path)
                return
            ct = coremltools()
            functions = ct.utils.MultiFunctionDescriptor()
            for batch in ENTRY_BATCHES:
                single = folder / f"{batch}.mlpackage"
                save(convert(graph, spec, precision, batch), single)
                functions.add_function(str(single), "main", function_name(batch))
            functions.default_function_name = function_name(ENTRY_BATCHES[0])
            ct.utils.save_multifunction(functions, str(path))


def save(model: Any, path: Path) -> None:
    """Write an ``MLModel``."""
    model.save(str(path))
    # A debugging map that coremltools leaves beside the model; Core ML does not read it.
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for temporary files, those of coremltools too, which keeps a copy of each model until Python ends."""
    with tempfile.TemporaryDirectory() as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


class PlanarImage(nn.Module):
    """The encoder graph behind Core ML's image input: float (1, 3, S, S) RGB with values 0 to 255."""

    def __init__(self, graph: EncoderGraph) -> None:
        super().__init__()
        self.inner = graph

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        # The inner graph's own transposition undoes this one, and the converter drops both.
        features: tuple[Tensor, ...] = self.inner(image.permute(0, 2, 3, 1))
        return features


def function_name(batch: int) -> str:
    """The decoder function for a number of prompts."""
    return f"decode_{batch}"


def convert(module: nn.Module, spec: GraphSpec, precision: str, batch: int) -> Any:
    """A torch module to a coremltools ``MLModel`` with the contract's names.

    Goes through ``torch.export``, for its sizes are plain numbers: with traced modules, whose sizes are one-element
    arrays, coremltools 9.0 fails on numpy 2.4 or later (``int()`` of an array in its operator ``_cast``). This
    choice is the one place that works round it.

    Args:
        module: takes the inputs of ``spec``; an image as float (1, 3, S, S).
        precision: ``fp32`` or ``fp16`` compute and weights.
        batch: number of prompts.
    """
    ct = coremltools()
    with quiet(), torch.no_grad():
        inputs, examples = _inputs(ct, spec, batch)
        program = torch.export.export(module, examples).run_decompositions({})
        compute: Any = ct.precision.FLOAT32
        if precision == "fp16":
            compute = ct.transform.FP16ComputePrecision(op_selector=fits_fp16)
        return ct.convert(
            program, inputs=inputs, outputs=[ct.TensorType(name=t.name, dtype=np.float32) for t in spec.outputs],
            minimum_deployment_target=ct.target.iOS17, convert_to="mlprogram", compute_precision=compute,
            skip_model_load=True)


def _inputs(ct: Any, spec: GraphSpec, batch: int) -> tuple[list[Any], tuple[Tensor, ...]]:
    inputs, examples = [], []
    for tensor, example in zip(spec.inputs, example_inputs(spec, batch), strict=True):
        if tensor.dtype == "uint8":
            example = example.permute(0, 3, 1, 2).float().contiguous()
            inputs.append(ct.ImageType(name=tensor.name, shape=tuple(example.shape), scale=1.0, bias=[0.0, 0.0, 0.0],
                                       color_layout=ct.colorlayout.RGB))
        else:
            inputs.append(ct.TensorType(name=tensor.name, shape=tuple(example.shape), dtype=np.float32))
        examples.append(example)
    return inputs, tuple(examples)


def fits_fp16(operation: Any) -> bool:
    """Whether an operator of the MIL program may compute in fp16.

    Kept in fp32: layer norms and softmax; the products that make attention logits and all up to the softmax (they
    overflow in TinyViT); raw pixels, coordinates and labels up to the first layer (fp16 steps by half a pixel above
    512); what leads to a sine or cosine, whose argument spans many periods; the same for the spelled-out softmax
    (``exp``) and layer norm (``rsqrt``) of the click graphs; and linear attention up to its quotient, as in the
    official code (efficientvit/models/nn/ops.py, ``LiteMLA``), whose sums over positions overflow and whose 1e-15
    would be 0.
    """
    kind = operation.op_type
    if kind in ALWAYS_FP32 or _quotient(operation) or _raw(operation):
        return False
    return not ((kind in LOGIT_PATH | WEIGHTED and _leads_to(operation, _sensitive, LOGIT_PATH))
                or (kind in SUM_PATH and _leads_to(operation, _quotient, SUM_PATH)))


def _sensitive(operation: Any) -> bool:
    return operation.op_type in ALWAYS_FP32 - {"layer_norm"}


def _quotient(operation: Any) -> bool:
    """A division by what the graph computed."""
    return operation.op_type == "real_div" and operation.y.val is None


def _raw(operation: Any) -> bool:
    """No weighted layer between the graph's inputs and this result, nor is it one."""
    # The residual stream of a transformer is one chain of operators, too long for recursion.
    waiting, seen = [operation], {id(operation)}
    while waiting:
        here = waiting.pop()
        if here.op_type in WEIGHTED:
            return False
        for values in here.inputs.values():
            for value in values if isinstance(values, (list, tuple)) else [values]:
                if value.op is not None and id(value.op) not in seen:
                    seen.add(id(value.op))
                    waiting.append(value.op)
    return True


def _leads_to(operation: Any, end: Callable[[Any], bool], path: frozenset[str]) -> bool:
    """Whether operators of ``path``, or none, lie between this operator and an ``end`` that uses its results."""
    waiting, seen = [operation], {id(operation)}
    while waiting:
        for child in (child for out in waiting.pop().outputs for child in out.child_ops):
            if end(child):
                return True
            if child.op_type in path and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return False


def coremltools() -> Any:
    """The untyped coremltools package, imported without its remarks about torch versions and macOS."""
    with quiet():
        return importlib.import_module("coremltools")
