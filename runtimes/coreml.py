"""Core ML packages: executed by Core ML on macOS, and by the MIL evaluator elsewhere, to verify them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketsam.batching import ENTRY_BATCHES, decode_padded
from pocketsam.bundle import Bundle
from pocketsam.errors import BundleError, MissingDependency, UsageError, first_line
from pocketsam.geometry import Frame
from pocketsam.images import Rgb
from pocketsam.registry import RUNTIME_VARIABLES
from pocketsam.runtime import Features, Tensors
from pocketsam.specs import GraphSpec

FORMAT = "coreml"
COMPUTE_UNITS = ("ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE")
ON_MACOS = sys.platform == "darwin"
NOTE = "Core ML exists on Apple systems only; this evaluator verifies the artifact and says nothing of its speed"

__version__ = metadata.version("coremltools")


class Program(Protocol):
    """One function of a package."""

    @property
    def input_names(self) -> list[str]: ...

    @property
    def output_names(self) -> list[str]: ...

    def run(self, inputs: dict[str, NDArray[Any]]) -> Tensors:
        """Arrays by name -> float32 outputs by name; an image input is float32 (1, 3, S, S) RGB, 0 to 255."""
        ...


class CoreMlRuntime:
    """Executes ``coreml`` artifacts.

    The branch for macOS follows coremltools' documentation and could not be run where this was written: treat it as
    unproven until a Mac has run ``pocketsam verify`` with it.
    """

    def __init__(self, bundle: Bundle, precision: str, threads: int | None, compute_unit: str | None) -> None:
        self.spec = bundle.spec
        self.slots = bundle.slots
        unit = compute_unit or os.environ.get(RUNTIME_VARIABLES["coreml"]) or COMPUTE_UNITS[0]
        if unit not in COMPUTE_UNITS:
            raise UsageError(f"compute unit {unit!r} is unknown; choose one of {', '.join(COMPUTE_UNITS)}.")
        self._info: dict[str, Any] = {"runtime": "coreml", "version": __version__, "precision": precision,
                                      "threads": threads, "weights_sha256": bundle.weights_sha256,
                                      "artifacts_sha256": bundle.identity(FORMAT, precision)}
        self._info |= {"engine": "coreml", "compute_unit": unit} if ON_MACOS else {
            "engine": "mil-evaluator", "note": NOTE}
        encoder, decoder = self.spec.encoder_graph(), self.spec.decoder_graph(self.slots)
        functions = [f"decode_{b}" for b in ENTRY_BATCHES]
        open_all = _on_macos if ON_MACOS else _evaluators
        (self._encoder,) = open_all(_path(bundle, precision, encoder), [None], unit, threads)
        decoders = open_all(_path(bundle, precision, decoder), functions, unit, threads)
        self._decoders = dict(zip(ENTRY_BATCHES, decoders, strict=True))
        for program, graph in [(self._encoder, encoder), *((d, decoder) for d in decoders)]:
            _check(program, graph)
        self.clicks = bundle.has_clicks(FORMAT, precision)
        self.click_workers = 1

        @functools.cache
        def click(name: str) -> Program:
            graph = self.spec.graphs()[name]
            (program,) = open_all(_path(bundle, precision, graph), [None], unit, threads)
            _check(program, graph)
            return program

        self._click = click

    @classmethod
    def open(cls, bundle: Bundle, precision: str = "fp32", threads: int | None = None,
             compute_unit: str | None = None) -> CoreMlRuntime:
        """Open both graphs of a bundle.

        Args:
            threads: of the evaluator, a setting of the whole process; Core ML manages its own.
            compute_unit: on macOS ``ALL``, ``CPU_ONLY``, ``CPU_AND_GPU`` or ``CPU_AND_NE``; by default the environment
                variable ``POCKETSAM_COREML_UNIT``, then ``ALL``.

        Raises:
            BundleError: an artifact is missing, damaged or does not follow the graph contract.
            UnknownOperator: the evaluator does not implement an operator of the program.
        """
        return cls(bundle, precision, threads, compute_unit)

    def encode(self, image: Rgb, frame: Frame) -> Features:
        planes = np.ascontiguousarray(image.transpose(0, 3, 1, 2), np.float32)
        return self._encoder.run({"image": planes})

    def decode(self, features: Features, prompts: Tensors) -> Tensors:
        return decode_padded(prompts, lambda size, padded: self._decoders[size].run({**features, **padded}))

    def click(self, graph: str, inputs: Tensors) -> Tensors:
        return self._click(graph).run(inputs)

    def info(self) -> dict[str, Any]:
        return dict(self._info)


class _CoreMlProgram:
    """One function executed by Core ML through coremltools' ``MLModel``."""

    def __init__(self, path: Path, function: str | None, unit: str) -> None:
        import coremltools

        ct: Any = coremltools
        try:
            self._model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[unit], function_name=function)
        except Exception as e:  # Core ML's errors come through in several classes
            raise BundleError(f"Core ML refuses {path} ({first_line(e)}); export the bundle again, or check that this "
                              "macOS is 15 or newer.") from e
        description = self._model.get_spec().description
        for candidate in description.functions:
            if candidate.name == function:
                description = candidate
        self._inputs = [i.name for i in description.input]
        self._outputs = [o.name for o in description.output]
        self._images = {i.name for i in description.input if i.type.WhichOneof("Type") == "imageType"}

    @property
    def input_names(self) -> list[str]:
        return list(self._inputs)

    @property
    def output_names(self) -> list[str]:
        return list(self._outputs)

    def run(self, inputs: dict[str, NDArray[Any]]) -> Tensors:
        given = {k: _as_picture(v) if k in self._images else v for k, v in inputs.items()}
        out = self._model.predict(given)
        return {n: np.asarray(out[n], np.float32) for n in self._outputs}


def _as_picture(planes: NDArray[Any]) -> Any:
    """float (1, 3, S, S) RGB, 0 to 255 -> the PIL image that Core ML takes."""
    from PIL import Image

    return Image.fromarray(planes[0].transpose(1, 2, 0).astype(np.uint8), "RGB")


def _on_macos(path: Path, functions: Sequence[str | None], unit: str, threads: int | None) -> list[Program]:
    return [_CoreMlProgram(path, f, unit) for f in functions]


def _evaluators(path: Path, functions: Sequence[str | None], unit: str, threads: int | None) -> list[Program]:
    try:
        import torch
    except ModuleNotFoundError as e:
        raise MissingDependency("torch", "torch", "running Core ML files off a Mac, by the evaluator,") from e

    from pocketsam.runtimes.mil.evaluate import Evaluator
    from pocketsam.runtimes.mil.program import load_package

    if threads is not None:
        torch.set_num_threads(threads)
    package = load_package(path)
    return [Evaluator(package, f) for f in functions]


def _path(bundle: Bundle, precision: str, graph: GraphSpec) -> Path:
    return bundle.file(bundle.find(FORMAT, precision, graph.name))


def _check(program: Program, graph: GraphSpec) -> None:
    """Names only: Core ML keeps no order."""
    got = (sorted(program.input_names), sorted(program.output_names))
    if got != (sorted(graph.input_names), sorted(graph.output_names)):
        raise BundleError(f"the Core ML {graph.name} has inputs and outputs {got}, expected {graph.input_names} and "
                          f"{graph.output_names}; export the bundle again.")
