"""LiteRT (TFLite) on the CPU through XNNPACK, with ai-edge-litert or the older tflite-runtime."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

try:
    from ai_edge_litert.interpreter import Interpreter

    ENGINE = "ai-edge-litert"
except ModuleNotFoundError as missing:
    try:
        from tflite_runtime.interpreter import Interpreter
    except ModuleNotFoundError:
        raise missing from None
    ENGINE = "tflite-runtime"

from pocketsam.batching import ENTRY_BATCHES, decode_padded
from pocketsam.bundle import Bundle
from pocketsam.doctor import cores
from pocketsam.errors import BundleError, first_line
from pocketsam.geometry import Frame
from pocketsam.images import Rgb
from pocketsam.runtime import Features, Tensors, check_tensors
from pocketsam.specs import GraphSpec

FORMAT = "litert"


class LiteRtRuntime:
    """Executes ``litert`` artifacts."""

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        self.spec = bundle.spec
        self.slots = bundle.slots
        # An interpreter's tensors are one set of buffers: calls take turns.
        self._lock = threading.Lock()
        encoder, decoder = self.spec.encoder_graph(), self.spec.decoder_graph(self.slots)
        self._encoder = _interpreter(bundle.file(bundle.find(FORMAT, precision, "encoder")), threads)
        self._decoder = _interpreter(bundle.file(bundle.find(FORMAT, precision, "decoder")), threads)
        self._encode = _runner(self._encoder, "encode", encoder)
        self._decode = {n: _runner(self._decoder, f"decode_{n}", decoder) for n in ENTRY_BATCHES}
        self.clicks = bundle.has_clicks(FORMAT, precision)
        self.click_workers = threads or cores()
        self._click_path = functools.cache(lambda name: bundle.file(bundle.find(FORMAT, precision, name)))
        # Interpreters of a click graph that nobody uses at the moment, with their runners.
        self._idle: dict[str, list[tuple[Any, Any]]] = {}
        self._info = {"runtime": "litert", "version": metadata.version(ENGINE), "engine": ENGINE,
                      "precision": precision, "threads": threads, "weights_sha256": bundle.weights_sha256,
                      "artifacts_sha256": bundle.identity(FORMAT, precision)}

    @classmethod
    def open(cls, bundle: Bundle, precision: str = "fp32", threads: int | None = None) -> LiteRtRuntime:
        """Open both graphs of a bundle.

        Raises:
            BundleError: an artifact is missing, damaged or does not follow the graph contract.
        """
        return cls(bundle, precision, threads)

    def encode(self, image: Rgb, frame: Frame) -> Features:
        with self._lock:
            return dict(self._encode(image=image))

    def decode(self, features: Features, prompts: Tensors) -> Tensors:
        def run(size: int, padded: Tensors) -> Tensors:
            return dict(self._decode[size](**features, **padded))

        with self._lock:
            return decode_padded(prompts, run)

    def click(self, graph: str, inputs: Tensors) -> Tensors:
        spec = self.spec.graphs()[graph]
        with self._lock:
            idle = self._idle.setdefault(graph, [])
            # A runner does not keep its interpreter alive.
            pair = idle.pop() if idle else _with_runner(_interpreter(self._click_path(graph), 1), graph, spec)
        out = dict(pair[1](**inputs))
        with self._lock:
            idle.append(pair)
        return out

    def info(self) -> dict[str, Any]:
        return {**self._info, "fallback_ops": self.fallback_ops}

    @functools.cached_property
    def fallback_ops(self) -> dict[str, dict[str, int]]:
        """How many operators of each kind run outside the XNNPACK delegate, by graph."""
        return {"encoder": fallback_ops(self._encoder), "decoder": fallback_ops(self._decoder)}


def _interpreter(path: Path, threads: int | None) -> Any:
    try:
        # The delegate is applied here, so that a file it cannot take fails on loading and not on the first call.
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as e:
        raise BundleError(f"{ENGINE} {metadata.version(ENGINE)} refuses {path} ({first_line(e)}); "
                          f"export the bundle again or change the {ENGINE} version.") from e
    return interpreter


def _runner(interpreter: Any, name: str, graph: GraphSpec) -> Any:
    signatures = interpreter.get_signature_list()
    got = signatures.get(name)
    expected = {"inputs": sorted(graph.input_names), "outputs": sorted(graph.output_names)}
    if got is None or {k: sorted(v) for k, v in got.items()} != expected:
        raise BundleError(f"the LiteRT file has signatures {signatures}, expected {name} with {expected}; "
                          "export the bundle again.")
    runner = interpreter.get_signature_runner(name)
    details = {**runner.get_input_details(), **runner.get_output_details()}
    check_tensors("the LiteRT file", graph, {k: (np.dtype(d["dtype"]).name, d["shape"].tolist())
                                             for k, d in details.items()})
    return runner


def _with_runner(interpreter: Any, name: str, graph: GraphSpec) -> tuple[Any, Any]:
    return interpreter, _runner(interpreter, name, graph)


def fallback_ops(interpreter: Any) -> dict[str, int]:
    """Walk back from the outputs: an operator that no delegate node stands for runs in the built-in kernels."""
    nodes = interpreter._get_ops_details()
    by_output: dict[int, dict[str, Any]] = {}
    for node in sorted(nodes, key=lambda n: n["op_name"] == "DELEGATE"):
        by_output.update({int(t): node for t in node["outputs"]})
    todo = [int(d["index"]) for d in interpreter.get_output_details()]
    seen: set[int] = set()
    names: list[str] = []
    while todo:
        node = by_output.get(todo.pop(), {"index": -1})
        if node["index"] in seen or node["index"] < 0:
            continue
        seen.add(node["index"])
        if node["op_name"] != "DELEGATE":
            names.append(str(node["op_name"]))
        todo += [int(t) for t in np.asarray(node["inputs"]).tolist() if t >= 0]
    return dict(sorted(Counter(names).items()))
