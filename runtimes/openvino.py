"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from pocketsam.batching import decode_padded
from pocketsam.bundle import IR_FILE, Bundle
from pocketsam.doctor import cores
from pocketsam.errors import BundleError, UsageError, first_line
from pocketsam.files import cache_root
from pocketsam.geometry import Frame
from pocketsam.images import Rgb
from pocketsam.registry import OPENVINO_PRECISIONS, RUNTIME_VARIABLES
from pocketsam.runtime import Features, Tensors, check_tensors
from pocketsam.specs import GraphSpec

FORMAT = "openvino"
# OpenVINO would pick bf16 or f16 by itself where the hardware has it, and masks would change with the machine.
INFERENCE_PRECISIONS = dict(zip(OPENVINO_PRECISIONS, ("FP32", "BF16", "FP16"), strict=True))
# With a model cache OpenVINO sets the process's locale to "C" while it compiles and back after: of two at once, the
# second takes "C" for what it should go back to, and the program reads its text files as ASCII from then on.
COMPILING = threading.Lock()


class OpenVinoRuntime:
    """Executes ``openvino`` artifacts, in f32 unless asked otherwise.

    The decoder is compiled for one prompt at once and for sixteen when a batch comes: static shapes took 33 ms where
    a dynamic batch took 60 ms (MobileSAM, one prompt).
    """

    def __init__(self, bundle: Bundle, precision: str, threads: int | None, inference_precision: str | None) -> None:
        self.spec = bundle.spec
        self.slots = bundle.slots
        self._core = ov.Core()
        computed = check_precision(self._core, inference_precision)
        self._config = {**settings(threads, computed), **cache_settings(cache_folder(precision, computed))}
        self._encoder = self._compile(self._read(bundle, precision, self.spec.encoder_graph()))
        graphs = self.spec.graphs(self.slots)
        # Or all threads that first ask for a graph would compile it.
        self._building = threading.Lock()
        self._batched = functools.cache(lambda name, size: self._resized(bundle, precision, graphs[name], size))
        self._batched("decoder", 1)
        self.clicks = bundle.has_clicks(FORMAT, precision)
        count = threads or cores()
        streams = {**self._config, "INFERENCE_NUM_THREADS": count, "NUM_STREAMS": count}
        # One more than streams: while a batch is copied in or out, every stream has another.
        self.click_workers = count + 1
        self._clicks = functools.cache(lambda name: self._compile(self._read(bundle, precision, graphs[name]), streams))
        self._info = {"runtime": "openvino", "version": ov.get_version(), "precision": precision, "threads": threads,
                      "inference_precision": computed, "weights_sha256": bundle.weights_sha256,
                      "artifacts_sha256": bundle.identity(FORMAT, precision)}
        if computed != "f32":
            self._info["note"] = f"computed in {computed}, as asked: masks differ from those of f32"

    @classmethod
    def open(cls, bundle: Bundle, precision: str = "fp32", threads: int | None = None,
             inference_precision: str | None = None) -> OpenVinoRuntime:
        """Open both graphs of a bundle.

        Args:
            inference_precision: ``f32``, ``bf16`` or ``f16``, what the processor computes in; by default the
                environment variable ``POCKETSAM_OPENVINO_PRECISION``, then ``f32``.

        Raises:
            BundleError: an artifact is missing, damaged or does not follow the graph contract.
            UsageError: an unknown inference precision, or one that this processor lacks.
        """
        return cls(bundle, precision, threads, inference_precision)

    def encode(self, image: Rgb, frame: Frame) -> Features:
        # A request of its own for each call, so that two threads do not share buffers.
        out = self._encoder.create_infer_request().infer({"image": image})
        return {t.name: np.array(out[t.name]) for t in self.spec.feature_specs()}

    def decode(self, features: Features, prompts: Tensors) -> Tensors:
        names = self.spec.decoder_graph(self.slots).output_names

        def run(size: int, padded: Tensors) -> Tensors:
            with self._building:
                compiled = self._batched("decoder", size)
            out = compiled.create_infer_request().infer({**features, **padded})
            return {n: np.array(out[n]) for n in names}

        return decode_padded(prompts, run)

    def click(self, graph: str, inputs: Tensors) -> Tensors:
        spec = self.spec.graphs()[graph]
        with self._building:
            compiled = self._clicks(graph)
        request = compiled.create_infer_request()
        # Threads that decode clicks come and go; `infer` computes in the thread that calls it, this in the streams.
        request.start_async(inputs, share_inputs=True)
        request.wait()
        return {n: np.array(request.get_tensor(n).data) for n in spec.output_names}

    def info(self) -> dict[str, Any]:
        return dict(self._info)

    def _resized(self, bundle: Bundle, precision: str, graph: GraphSpec, size: int) -> ov.CompiledModel:
        """A graph compiled for one prompt batch."""
        model = self._read(bundle, precision, graph)
        model.reshape({t.name: ov.PartialShape(list(t.concrete(size))) for t in graph.inputs})
        return self._compile(model)

    def _compile(self, model: ov.Model, config: dict[str, Any] | None = None) -> ov.CompiledModel:
        try:
            with COMPILING:
                return self._core.compile_model(model, "CPU", config or self._config)
        except RuntimeError as e:
            reason = next((line for line in reversed(str(e).splitlines()) if line.strip()), "no reason given")
            raise BundleError(f"OpenVINO {ov.get_version()} cannot compile the {model.get_friendly_name()} graph "
                              f"({reason.strip()[:200]}); export the bundle again or change the openvino "
                              "version.") from e

    def _path(self, bundle: Bundle, precision: str, graph: GraphSpec) -> Path:
        return bundle.file(bundle.find(FORMAT, precision, graph.name)) / IR_FILE

    def _read(self, bundle: Bundle, precision: str, graph: GraphSpec) -> ov.Model:
        path = self._path(bundle, precision, graph)
        try:
            model = self._core.read_model(path)
        except RuntimeError as e:
            raise BundleError(f"OpenVINO {ov.get_version()} refuses {path} ({first_line(e)}); "
                              "export the bundle again or change the openvino version.") from e
        got = ([i.get_any_name() for i in model.inputs], [o.get_any_name() for o in model.outputs])
        if got != (graph.input_names, graph.output_names):
            raise BundleError(f"{path} has inputs and outputs {got}, expected {graph.input_names} and "
                              f"{graph.output_names}; export the bundle again.")
        check_tensors(path, graph, {t.get_any_name(): _described(t) for t in (*model.inputs, *model.outputs)})
        return model


def _described(tensor: Any) -> tuple[str, list[int]]:
    """numpy's name of the dtype, and sizes, 0 for a free one."""
    sizes = [d.get_length() if d.is_static else 0 for d in tensor.get_partial_shape()]
    return tensor.get_element_type().to_dtype().name, sizes


def check_precision(core: ov.Core, asked: str | None) -> str:
    """The inference precision to compile for.

    Raises:
        UsageError: it is unknown, or the processor lacks it; OpenVINO would fall back to f32 without a word.
    """
    chosen = asked or os.environ.get(RUNTIME_VARIABLES["openvino"]) or "f32"
    if chosen not in INFERENCE_PRECISIONS:
        raise UsageError(f"inference precision {chosen!r} is unknown; choose one of {', '.join(INFERENCE_PRECISIONS)}.")
    held = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if INFERENCE_PRECISIONS[chosen] not in held:
        having = [p for p, name in INFERENCE_PRECISIONS.items() if name in held]
        raise UsageError(f"this processor does not compute in {chosen}; choose one of {', '.join(having)}.")
    return chosen


def settings(threads: int | None, inference_precision: str) -> dict[str, Any]:
    """How models are compiled, the cache apart."""
    chosen: dict[str, Any] = {"INFERENCE_PRECISION_HINT": inference_precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        chosen["INFERENCE_NUM_THREADS"] = threads
    return chosen


def cache_folder(precision: str, inference_precision: str) -> Path:
    """Where compiled models are kept: apart by OpenVINO version and precisions, so that none are ever mixed up."""
    return cache_root() / "openvino" / f"{ov.get_version()}-{precision}-{inference_precision}"


def cache_settings(folder: Path) -> dict[str, Any]:
    """Keep compiled models in a folder; where it cannot be made, compile them each time, which is only slower."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}
    return {"CACHE_DIR": str(folder)}
