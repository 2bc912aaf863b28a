"""Core ML: 8-bit weights through coremltools, and 8-bit activations by quantize operators that the conversion keeps."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pocketsam.errors import UnsupportedModel
from pocketsam.export.coreml import PlanarImage, convert, coremltools, save, temporary_folder
from pocketsam.quantize.channels import Form
from pocketsam.quantize.correction import Layer
from pocketsam.quantize.grid import Grid, Weighted
from pocketsam.quantize.hooks import Hook, hooked
from pocketsam.quantize.ranges import UINT8, affine
from pocketsam.quantize.recipes import Job
from pocketsam.quiet import quiet
from pocketsam.runtimes.mil.program import load_package

WEIGHTED = ("conv", "conv_transpose", "linear")
SMALLEST = 1024


class CoreMlQuantizer:
    """``int8`` (W8A8; encoder only; the rest computes in fp16) and ``int8-weights``.

    Weights go through coremltools' ``linear_quantize_weights``. Activations are rounded to the ranges that PyTorch saw:
    ``quantized_decomposed`` operators in the module become Core ML's ``quantize`` and ``dequantize``. coremltools' own
    torch-side quantizer calibrates as well, but ``torch.export`` cannot trace what it returns (docs/adr/0006-int8.md).
    """

    name = "coreml"
    recipes: tuple[str, ...] = ("int8", "int8-weights")
    scales: Form = "multiply"
    rounds_outputs = True

    @staticmethod
    def grid() -> Grid:
        """coremltools' codes are symmetric and use the whole range."""
        return "full"

    def __init__(self, job: Job) -> None:
        """Raises UnsupportedModel for the decoder, whose package has a function for each prompt batch."""
        if job.spec.name != "encoder":
            raise UnsupportedModel("coremltools quantizes no package of several functions, so Core ML's decoder stays "
                                   "in float.")
        self.job = job

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        return {"coremltools": metadata.version("coremltools")}

    @staticmethod
    def check_source(path: Path) -> None:
        """Takes every artifact."""

    def layers(self) -> dict[str, NDArray[Any]]:
        """The weighted operators."""
        names = _weighted(self.job.source)
        layers = [] if self.job.prepared is None else self.job.prepared.layers
        if len(layers) != len(names):
            return dict.fromkeys(names, np.empty(0))
        return {name: layer.module.weight.numpy() for name, layer in zip(names, layers, strict=True)}

    def attention(self) -> list[str]:
        """None: attention stays in float."""
        return []

    def write(self, path: Path, keep: frozenset[str] = frozenset()) -> None:
        """Write the package, with the operators of ``keep`` in float."""
        with temporary_folder() as folder:
            if self.job.recipe == "int8-weights" or self.job.prepared is None:
                self._round_weights(self.job.source, path, keep)
                return
            prepared = self.job.prepared
            sources = _operators(self.job.source, prepared.layers)
            rounded = [i for i, name in enumerate(sources) if name not in keep]
            package = folder / "activations.mlpackage"
            save(self._convert(prepared.layers, rounded), package)
            names = _operators(package, prepared.layers)
            self._round_weights(package, path, frozenset(_weighted(package)) - {names[i] for i in rounded})

    def _convert(self, layers: Sequence[Layer], rounded: Sequence[int]) -> Any:
        module = copy.deepcopy(self.job.module)
        parts = dict(zip((id(m) for m in self.job.module.modules()), module.modules(), strict=True))
        chosen = [(layers[i], parts[id(layers[i].module)]) for i in rounded]
        with hooked(_rounding(chosen)):
            return convert(PlanarImage(module).eval(), self.job.spec, "fp16", 1)

    @staticmethod
    def _round_weights(source: Path, path: Path, keep: frozenset[str]) -> None:
        ct = coremltools()
        with quiet():
            from coremltools.optimize import coreml as cto

            config = cto.OptimizationConfig(
                global_config=cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=SMALLEST),
                op_type_configs={"matmul": None}, op_name_configs=dict.fromkeys(keep))
            save(cto.linear_quantize_weights(ct.models.MLModel(str(source), skip_model_load=True), config), path)


def _weighted(package: Path) -> list[str]:
    """The weighted operators; a product with a table of positions is none."""
    operations = load_package(package).functions["main"].operations
    return [o.outputs[0].name for o in operations if o.type in WEIGHTED]


def _operators(package: Path, layers: Sequence[Layer]) -> list[str]:
    """The operator of each layer; both stand in execution order.

    Raises:
        UnsupportedModel: there are more of the ones than of the others.
    """
    names = _weighted(package)
    if len(names) != len(layers):
        raise UnsupportedModel(f"the Core ML program has {len(names)} weighted operators and the model {len(layers)} "
                               "layers, so its activations cannot be quantized; use --precision int8-weights.")
    return names


def _rounding(layers: Sequence[tuple[Layer, Any]]) -> Iterator[Hook]:
    """Round what layers read, and what those without an activation write."""
    for layer, module in layers:
        assert isinstance(module, Weighted)
        yield module, "before", lambda _, i, layer=layer: (_rounded(i[0], layer.reads),)
        if not layer.activated:
            yield module, "after", lambda _, i, o, layer=layer: _rounded(o, layer.writes)


def _rounded(x: Tensor, span: tuple[float, float]) -> Tensor:
    import torch.ao.quantization.fx._decomposed  # registers the operators

    scale, zero = affine(*span)
    operators = torch.ops.quantized_decomposed
    codes = operators.quantize_per_tensor(x, scale, zero, 0, UINT8, torch.uint8)
    y: Tensor = operators.dequantize_per_tensor(codes, scale, zero, 0, UINT8, torch.uint8)
    return y
