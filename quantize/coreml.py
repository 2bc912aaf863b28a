"""Core ML: weights in 8 bits through coremltools, on the package."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from pocketsam.export.coreml import coremltools, quiet
from pocketsam.quantize.recipes import Job
from pocketsam.runtimes.mil.program import load_package

WEIGHTED = ("conv", "conv_transpose", "linear", "matmul")
SMALLEST = 1024


class CoreMlQuantizer:
    """``int8-weights`` only.

    W8A8 is refused: coremltools' torch-side quantizer calibrates, but what it returns holds quantized tensors that
    ``torch.export`` cannot trace, and tracing with ``torch.jit`` fails on numpy 2.4 (docs/adr/0006-int8.md).
    """

    name = "coreml"
    recipes: tuple[str, ...] = ("int8-weights",)

    def __init__(self, job: Job) -> None:
        self.job = job

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        return {"coremltools": metadata.version("coremltools")}

    def layers(self) -> list[str]:
        """Names of the weighted operators of the encoder; the decoder's functions are quantized whole."""
        if self.job.spec.name != "encoder":
            return []
        function = load_package(self.job.source).functions["main"]
        return [next(iter(o.outputs)).name for o in function.operations if o.type in WEIGHTED]

    def write(self, path: Path, keep: frozenset[str] = frozenset()) -> None:
        """Write the package, with the operators of ``keep`` in float."""
        ct = coremltools()
        with quiet():
            from coremltools.optimize import coreml as cto

            config = cto.OptimizationConfig(
                global_config=cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=SMALLEST),
                op_name_configs=dict.fromkeys(keep))
            cto.linear_quantize_weights(ct.models.MLModel(str(self.job.source), skip_model_load=True),
                                        config).save(str(path))
