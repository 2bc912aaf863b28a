"""Core ML: weights through coremltools on the package, W8A8 through its torch-side quantizer before conversion."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pocketsam.errors import UnsupportedModel
from pocketsam.export.coreml import PlanarImage, convert, coremltools, quiet
from pocketsam.quantize.recipes import Job

WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
SMALLEST = 1024
# The observers' moving average would forget all but the last images.
OBSERVER = "mix_max"


class CoreMlQuantizer:
    """``int8``: W8A8 of the encoder (quick on A17 Pro, M4 and later); ``int8-weights`` for both graphs.

    Core ML has no dynamic int8.
    """

    name = "coreml"
    recipes: tuple[str, ...] = ("int8", "int8-weights")

    def __init__(self, job: Job) -> None:
        self.job = job
        if job.recipe == "int8" and job.spec.name != "encoder":
            raise UnsupportedModel("coreml quantizes activations of the encoder only; the decoder has int8-weights.")

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        return {"coremltools": metadata.version("coremltools")}

    def layers(self) -> list[str]:
        """Names of the torch modules with weights, in the order of the module tree."""
        return [n for n, m in PlanarImage(self.job.module).named_modules() if isinstance(m, WEIGHTED)]

    def write(self, path: Path, keep: frozenset[str] = frozenset()) -> None:
        """Write the package, with the modules of ``keep`` in float."""
        if self.job.recipe == "int8-weights":
            _compress(self.job.source, path)
            return
        with quiet():
            module = self._calibrated(keep)
            convert(module, self.job.spec, "fp32", 1).save(str(path))
            (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)

    def _calibrated(self, keep: frozenset[str]) -> nn.Module:
        from coremltools.optimize.torch import quantization as ctq

        options: Any = {"quantization_scheme": "symmetric", "milestones": [0, 0, 10**6, 10**6],
                        "weight_per_channel": True}
        config = ctq.LinearQuantizerConfig(global_config=ctq.ModuleLinearQuantizerConfig(**options),
                                           module_name_configs=dict.fromkeys(keep))
        tool = ctq.LinearQuantizer(PlanarImage(self.job.module).eval(), config)
        inputs = (torch.from_numpy(np.ascontiguousarray(i["image"].transpose(0, 3, 1, 2), np.float32))
                  for i in self.job.inputs(1))
        first = next(inputs)
        prepared = tool.prepare(example_inputs=(first,), inplace=False)
        tool.step()
        with torch.no_grad():
            for image in (first, *inputs):
                prepared(image)
        done: nn.Module = tool.finalize(inplace=False)
        return done.eval()


def _compress(source: Path, path: Path) -> None:
    """int8 weights per channel in every function of a package."""
    ct = coremltools()
    with quiet():
        from coremltools.optimize import coreml as cto

        config = cto.OptimizationConfig(global_config=cto.OpLinearQuantizerConfig(
            mode="linear_symmetric", weight_threshold=SMALLEST))
        cto.linear_quantize_weights(ct.models.MLModel(str(source), skip_model_load=True), config).save(str(path))
