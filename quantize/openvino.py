"""OpenVINO IR through NNCF."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import openvino as ov

from pocketsam.export.openvino import MODEL_FILE
from pocketsam.quantize.recipes import Job, wide_sums

WEIGHTED = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")


class OpenVinoQuantizer:
    """``int8``: NNCF post-training quantization, unsigned activations; ``int8-weights``: NNCF weight compression.

    Dynamic int8 is refused: OpenVINO has it for the large matrix products of language models only.
    """

    name = "openvino"
    recipes: tuple[str, ...] = ("int8", "int8-weights")

    def __init__(self, job: Job) -> None:
        self.job = job
        self._samples: list[Any] = []

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        return {"nncf": metadata.version("nncf")}

    def layers(self) -> list[str]:
        """Names of the operators with constant weights."""
        return [o.get_friendly_name() for o in self._read().get_ordered_ops() if _weighted(o)]

    def write(self, path: Path, keep: frozenset[str] = frozenset()) -> None:
        """Write the quantized IR, with the operators of ``keep`` in float."""
        with quiet():
            import nncf

            model = self._read()
            ignored = nncf.IgnoredScope(names=sorted({*keep, *self._products(model)}), validate=False)
            if self.job.recipe == "int8-weights":
                done = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=ignored)
            else:
                self._samples = self._samples or list(self.job.inputs(1))
                advanced = nncf.AdvancedQuantizationParameters(
                    overflow_fix=nncf.OverflowFix.DISABLE if wide_sums() else nncf.OverflowFix.ENABLE)
                done = nncf.quantize(model, nncf.Dataset(self._samples), subset_size=len(self._samples),
                                     preset=nncf.QuantizationPreset.MIXED, ignored_scope=ignored,
                                     advanced_parameters=advanced)
            path.mkdir(exist_ok=True)
            ov.save_model(done, path / MODEL_FILE, compress_to_fp16=False)

    def _read(self) -> ov.Model:
        return ov.Core().read_model(self.job.source / MODEL_FILE)

    @staticmethod
    def _products(model: ov.Model) -> list[str]:
        """Products of two computed tensors (attention, mask head): in 8 bits they collapse, so they stay in float."""
        return [o.get_friendly_name() for o in model.get_ordered_ops()
                if o.get_type_name() == "MatMul" and not _weighted(o)]


def _weighted(operator: Any) -> bool:
    if operator.get_type_name() not in WEIGHTED:
        return False
    sources = [operator.input_value(i).get_node() for i in range(operator.get_input_size())]
    return any(s.get_type_name() == "Constant" or _constant_behind(s) for s in sources)


def _constant_behind(node: Any) -> bool:
    """Weights may pass a conversion or a reshape before they reach their operator."""
    return (node.get_type_name() in ("Convert", "Reshape", "Transpose") and node.get_input_size() > 0
            and node.input_value(0).get_node().get_type_name() == "Constant")


@contextmanager
def quiet() -> Iterator[None]:
    """NNCF draws progress bars and logs its choices; errors are raised as ever."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with _no_bars():
            yield
    finally:
        logging.disable(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    import io
    from contextlib import redirect_stderr, redirect_stdout

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
