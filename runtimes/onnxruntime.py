"""ONNX Runtime on the CPU."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import onnxruntime as ort

from pocketsam.bundle import Bundle, onnx_file
from pocketsam.doctor import cores
from pocketsam.errors import BundleError, first_line
from pocketsam.geometry import Frame
from pocketsam.images import Rgb
from pocketsam.runtime import Features, Tensors, check_tensors
from pocketsam.specs import GraphSpec

FORMAT = "onnx"


class OnnxRuntime:
    """Executes ``onnx`` artifacts."""

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        self.spec = bundle.spec
        self.slots = bundle.slots
        self._encoder = self._session(bundle, precision, threads, self.spec.encoder_graph())
        self._decoder = self._session(bundle, precision, threads, self.spec.decoder_graph(self.slots))
        self.clicks = bundle.has_clicks(FORMAT, precision)
        # Or all threads of a first batch of clicks would build the session.
        self._building = threading.Lock()
        self._click_session = functools.cache(
            lambda name: self._session(bundle, precision, 1, self.spec.graphs()[name]))
        self.click_workers = threads or cores()
        self.sparing = False
        self._shrink = ort.RunOptions()
        self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._info = {"runtime": "onnxruntime", "version": ort.__version__, "precision": precision,
                      "threads": threads, "weights_sha256": bundle.weights_sha256,
                      "artifacts_sha256": bundle.identity(FORMAT, precision)}

    @classmethod
    def open(cls, bundle: Bundle, precision: str = "fp32", threads: int | None = None) -> OnnxRuntime:
        """Open both graphs of a bundle.

        Raises:
            BundleError: an artifact is missing, damaged or does not follow the graph contract.
        """
        return cls(bundle, precision, threads)

    def encode(self, image: Rgb, frame: Frame) -> Features:
        names = [t.name for t in self.spec.feature_specs()]
        out = self._encoder.run(names, {"image": image}, self._shrink if self.sparing else None)
        return dict(zip(names, out, strict=True))

    def decode(self, features: Features, prompts: Tensors) -> Tensors:
        names = self.spec.decoder_graph(self.slots).output_names
        return dict(zip(names, self._decoder.run(names, {**features, **prompts}), strict=True))

    def click(self, graph: str, inputs: Tensors) -> Tensors:
        names = self.spec.graphs()[graph].output_names
        with self._building:
            session = self._click_session(graph)
        return dict(zip(names, session.run(names, inputs), strict=True))

    def info(self) -> dict[str, Any]:
        return dict(self._info)

    @staticmethod
    def _session(bundle: Bundle, precision: str, threads: int | None, graph: GraphSpec) -> ort.InferenceSession:
        path = bundle.file(bundle.find(FORMAT, precision, graph.name))
        session = open_session(path, threads)
        got = ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
        if got != (graph.input_names, graph.output_names):
            raise BundleError(f"{path} has inputs and outputs {got}, expected {graph.input_names} and "
                              f"{graph.output_names}; export the bundle again.")
        # "tensor(float)" and "tensor(uint8)".
        check_tensors(path, graph, {t.name: ({"float": "float32"}.get(t.type[7:-1], t.type[7:-1]), t.shape or [])
                                    for t in (*session.get_inputs(), *session.get_outputs())})
        return session


def open_session(path: Path, threads: int | None, profile: Path | None = None) -> ort.InferenceSession:
    """A CPU session with a fixed number of threads; no other provider is ever tried.

    Args:
        profile: prefix of the file that ONNX Runtime's profiler writes; None for no profiling.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Threads of a call that ended would spin on for 50 ms and take the next session's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        return ort.InferenceSession(str(onnx_file(path)), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime raises a dozen unrelated classes for a file that it refuses
        raise BundleError(f"ONNX Runtime {ort.__version__} refuses {path} ({first_line(e)}); "
                          "export the bundle again or change the onnxruntime version.") from e


