"""Tables of formats, runtimes and models: name -> ``module:attribute``, imported only when asked for."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple

from pocketsam.errors import MissingDependency, UnknownName


class Package(NamedTuple):
    """What must be installed: import name, distribution name, the extra of pocketsam that brings it, and other
    distributions that bring the same.
    """

    module: str
    distribution: str
    extra: str
    others: tuple[str, ...] = ()


class Needs(NamedTuple):
    """Distributions that must be installed, each imported by its name with underscores, and the extras with all."""

    distributions: tuple[str, ...]
    extras: str


FORMATS = {
    "onnx": "pocketsam.export.onnx:OnnxExporter",
    "openvino": "pocketsam.export.openvino:OpenVinoExporter",
    "litert": "pocketsam.export.litert:LiteRtExporter",
    "coreml": "pocketsam.export.coreml:CoreMlExporter",
}

RUNTIMES = {
    "pytorch": "pocketsam.runtimes.pytorch:PyTorchRuntime",
    "onnxruntime": "pocketsam.runtimes.onnxruntime:OnnxRuntime",
    "openvino": "pocketsam.runtimes.openvino:OpenVinoRuntime",
    "litert": "pocketsam.runtimes.litert:LiteRtRuntime",
    "coreml": "pocketsam.runtimes.coreml:CoreMlRuntime",
}

QUANTIZERS = {
    "onnx": "pocketsam.quantize.onnx:OnnxQuantizer",
    "openvino": "pocketsam.quantize.openvino:OpenVinoQuantizer",
    "litert": "pocketsam.quantize.litert:LiteRtQuantizer",
    "coreml": "pocketsam.quantize.coreml:CoreMlQuantizer",
}

# Precisions that are made from fp32 artifacts, described in ``pocketsam.quantize.recipes``.
RECIPES = ("int8", "int8-dynamic", "int8-weights")

MODELS = {
    "lite0": "pocketsam.models.lite0:lite0",
    "sam_vit_b": "pocketsam.models.builders:sam_vit_b",
    "sam_vit_l": "pocketsam.models.builders:sam_vit_l",
    "sam_vit_h": "pocketsam.models.builders:sam_vit_h",
    "mobile_sam": "pocketsam.models.builders:mobile_sam",
    "repvit_sam": "pocketsam.models.builders:repvit_sam",
    "edge_sam": "pocketsam.models.builders:edge_sam",
    "sam_hq_vit_b": "pocketsam.models.builders:sam_hq_vit_b",
    "sam_hq_vit_tiny": "pocketsam.models.builders:sam_hq_vit_tiny",
    "efficient_sam_ti": "pocketsam.models.builders:efficient_sam_ti",
    "efficient_sam_s": "pocketsam.models.builders:efficient_sam_s",
    "efficientvit_sam_l0": "pocketsam.models.builders:efficientvit_sam_l0",
    "efficientvit_sam_l1": "pocketsam.models.builders:efficientvit_sam_l1",
    "efficientvit_sam_l2": "pocketsam.models.builders:efficientvit_sam_l2",
    "efficientvit_sam_xl0": "pocketsam.models.builders:efficientvit_sam_xl0",
    "efficientvit_sam_xl1": "pocketsam.models.builders:efficientvit_sam_xl1",
    "sam2.1_tiny": "pocketsam.models.builders:sam21_tiny",
    "sam2.1_small": "pocketsam.models.builders:sam21_small",
    "sam2.1_base_plus": "pocketsam.models.builders:sam21_base_plus",
    "sam2.1_large": "pocketsam.models.builders:sam21_large",
    "edgetam": "pocketsam.models.builders:edgetam",
    "efficienttam_ti": "pocketsam.models.builders:efficienttam_ti",
    "efficienttam_s": "pocketsam.models.builders:efficienttam_s",
}

# The format that each runtime executes; PyTorch needs the checkpoint, not an artifact.
RUNTIME_FORMATS = {"onnxruntime": "onnx", "openvino": "openvino", "litert": "litert", "coreml": "coreml"}

RUNTIME_PACKAGES = {
    "pytorch": Package("torch", "torch", "torch"),
    "onnxruntime": Package("onnxruntime", "onnxruntime", "onnx",
                           ("onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")),
    "openvino": Package("openvino", "openvino", "openvino"),
    "litert": Package("ai_edge_litert", "ai-edge-litert", "litert", ("tflite-runtime",)),
    "coreml": Package("coremltools", "coremltools", "coreml"),
}

# Environment variables that steer a runtime in every command: what computes, and in which precision.
RUNTIME_VARIABLES = {"coreml": "POCKETSAM_COREML_UNIT", "openvino": "POCKETSAM_OPENVINO_PRECISION"}
# What OpenVINO may be asked to compute in, first what it does unasked.
OPENVINO_PRECISIONS = ("f32", "bf16", "f16")
# The argument of each runtime's ``open`` for the same.
RUNTIME_OPTIONS = {"coreml": "compute_unit", "openvino": "inference_precision"}
# What an export is proven with, whatever the environment variables say.
EXACT_COMPUTE = {"coreml": "ALL", "openvino": OPENVINO_PRECISIONS[0]}

# What exporting to a format needs.
FORMAT_PACKAGES = {
    "onnx": Needs(("torch", "onnx", "onnxscript", "onnxruntime"), "export"),
    "openvino": Needs(("torch", "onnx", "onnxscript", "openvino"), "export"),
    "litert": Needs(("torch", "litert-torch", "ai-edge-quantizer", "ai-edge-litert"), "all"),
    "coreml": Needs(("torch", "coremltools"), "export,coreml"),
}
# What quantizing for it needs.
QUANTIZER_PACKAGES = {**FORMAT_PACKAGES, "openvino": Needs(("torch", "openvino", "nncf"), "all")}

# Bytes of one file: offsets of the flatbuffer have 31 bits.
FORMAT_LIMITS = {"litert": 2 ** 31}

_TABLES = {"format": FORMATS, "runtime": RUNTIMES, "model": MODELS, "quantizer": QUANTIZERS}


def check(kind: str, name: str) -> str:
    """Return ``name`` if the table of ``kind`` (format, runtime, model) has it.

    Raises:
        UnknownName: it does not; the message suggests the nearest name.
    """
    if name not in _TABLES[kind]:
        raise UnknownName(kind, name, _TABLES[kind])
    return name


def entry(target: str) -> Any:
    """Import ``module:attribute``."""
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)


def load(kind: str, name: str) -> Any:
    """Import and return the object registered as ``name`` in the table of ``kind``.

    Raises:
        UnknownName: no such name.
        MissingDependency: a package of a runtime, format or quantizer is not installed, also one that is imported
            only later; the message gives the command.
    """
    target = _TABLES[kind][check(kind, name)]
    if kind == "format":
        _check_installed(FORMAT_PACKAGES[name], f"exporting to {name}")
    if kind == "quantizer":
        _check_installed(QUANTIZER_PACKAGES[name], f"quantizing for {name}")
    try:
        return entry(target)
    except ModuleNotFoundError as e:
        if kind == "runtime" and (e.name or "").split(".")[0] == RUNTIME_PACKAGES[name].module:
            raise missing_runtime(name) from e
        raise


def _check_installed(needs: Needs, purpose: str) -> None:
    for distribution in needs.distributions:
        if importlib.util.find_spec(distribution.replace("-", "_")) is None:
            raise MissingDependency(distribution, needs.extras, purpose)


def formats_of(size: int | None) -> list[str]:
    """The formats whose files can hold a model of that many bytes in fp32; all where the size is not known."""
    return [f for f in FORMATS if size is None or size < FORMAT_LIMITS.get(f, size + 1)]


def missing_runtime(name: str) -> MissingDependency:
    """The error that names the pip command for a runtime."""
    package = RUNTIME_PACKAGES[name]
    return MissingDependency(package.distribution, package.extra, f"the {name} runtime")
