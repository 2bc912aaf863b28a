"""Ranges of activations through ONNX Runtime's calibrator, in the memory of one inference."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime import quantization as ortq
from onnxruntime.quantization.calibrate import MinMaxCalibrater


def write_ranges(model: Path, nodes: set[str], inputs: Iterable[dict[str, Any]], path: Path, threads: int) -> None:
    """Write the lowest and highest value of what the nodes read and write, as ``quantize_static`` reads them.

    Args:
        model: with shapes.
        nodes: by name; products of computed tensors, the largest of all in a transformer, can so be left out.
        inputs: by name, one at a time.
    """
    with tempfile.TemporaryDirectory() as folder:
        calibrator = _Calibrator(model, nodes, Path(folder) / "augmented.onnx", threads)
        calibrator.augment_graph()
        calibrator.create_inference_session()
        calibrator.collect_data(_Reader(inputs))
        ortq.save_tensors_data(calibrator.compute_data(), path)


class _Calibrator(MinMaxCalibrater):  # type: ignore[misc]  # onnxruntime has no types
    """The tool's, which by itself keeps every tensor until the end: its minima and maxima are computed last then."""

    def __init__(self, model: Path, nodes: set[str], augmented: Path, threads: int) -> None:
        super().__init__(str(model), None, str(augmented))
        self._nodes, self._threads = nodes, threads

    def create_inference_session(self) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # In the order of the file, where each minimum stands behind what it looks at.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = False
        options.intra_op_num_threads = self._threads
        self.infer_session = ort.InferenceSession(self.augmented_model_path, options, ["CPUExecutionProvider"])

    def select_tensors_to_calibrate(self, model: Any) -> tuple[set[str], Any]:
        tensors, infos = super().select_tensors_to_calibrate(model)
        wanted = {t for n in model.graph.node if n.name in self._nodes for t in (*n.input, *n.output)}
        return tensors & wanted, infos


class _Reader(ortq.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Hands calibration inputs out one at a time."""

    def __init__(self, inputs: Iterable[dict[str, Any]]) -> None:
        self._inputs: Iterator[dict[str, Any]] = iter(inputs)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._inputs, None)
