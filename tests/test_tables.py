"""Tables that graphs add are stored in 8 bits, and what is added stays float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketsam.quantize.tables import in_8_bits, is_table

SHAPE = (1, 5, 32, 32)


def uneven() -> NDArray[np.float32]:
    """A table whose heads differ by a factor of 100 each."""
    values = np.random.default_rng(0).normal(size=SHAPE)
    return (values * np.power(100.0, np.arange(5))[:, None, None]).astype(np.float32)


def test_the_axis_is_the_one_that_loses_least() -> None:
    table = in_8_bits(uneven())
    assert table.axis == 1
    error = np.abs(table.codes * table.column() - uneven())
    assert (error <= table.column() / 2 * 1.001).all()
    assert in_8_bits(uneven().transpose(0, 2, 3, 1)).axis == 3


def test_a_bias_is_no_table() -> None:
    assert is_table(SHAPE)
    assert not is_table((1, 4096, 1, 1))
    assert not is_table((1, 8, 8))
    assert (in_8_bits(np.zeros(SHAPE, np.float32)).codes == 0).all()


class Adds(nn.Module):
    """Reads one image-like tensor and adds a table twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.from_numpy(uneven())

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.table).relu() + self.table


def onnx_file(folder: Path) -> Path:
    from pocketsam.quantize.onnx import _save

    path = folder / "adds.onnx"
    torch.onnx.export(Adds(), (torch.zeros(SHAPE),), str(path), dynamo=True, external_data=False, verbose=False,
                      input_names=["x"])
    _save(onnx.load(str(path)), path)
    return path


def openvino_file(folder: Path) -> Path:
    from pocketsam.bundle import IR_FILE
    from pocketsam.export.openvino import save
    from pocketsam.quantize.openvino import _store_tables

    model = ov.convert_model(Adds(), example_input=torch.zeros(SHAPE))
    _store_tables(model)
    save(model, folder / "adds.ir")
    return folder / "adds.ir" / IR_FILE


def litert_file(folder: Path) -> Path:
    import litert_torch

    from pocketsam.quantize.litert_file import compact

    path = folder / "adds.tflite"
    litert_torch.convert(Adds().eval(), (torch.zeros(SHAPE),)).export(str(path))
    compact(path)
    return path


def run_onnx(path: Path, x: NDArray[np.float32]) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]


def run_openvino(path: Path, x: NDArray[np.float32]) -> Any:
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    return ov.Core().compile_model(str(path), "CPU", precise)([x])[0]


def run_litert(path: Path, x: NDArray[np.float32]) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


@pytest.mark.parametrize(("make", "run"), [(onnx_file, run_onnx), (openvino_file, run_openvino),
                                           (litert_file, run_litert)], ids=["onnx", "openvino", "litert"])
def test_every_format_adds_the_rounded_table(tmp_path: Path, make: Any, run: Any) -> None:
    path = make(tmp_path)
    stored = sum(f.stat().st_size for f in ([path] if path.suffix != ".xml" else path.parent.iterdir()))
    # One byte a number, once, where float would take four.
    assert stored < 2.5 * uneven().size
    table = in_8_bits(uneven())
    rounded = table.codes * table.column()
    x = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    assert np.allclose(run(path, x), np.maximum(x + rounded, 0) + rounded, rtol=1e-5, atol=1e-5)
    assert not np.allclose(run(path, x), np.maximum(x + uneven(), 0) + uneven(), rtol=1e-5, atol=1e-5)
