"""Sums of a quantized ONNX graph read and hand on what was not rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from pocketsam.quantize.onnx_sums import sum_in_float

STEP = 0.1
# No multiple of it is near half a step.
GAIN = 0.3137


def rounded(name: str) -> list[Any]:
    """``name`` -> ``name_q`` -> ``name_dq``."""
    return [helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]),
            helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_dq"])]


@pytest.fixture
def graph() -> Any:
    """A residual stream as the tool leaves it: x is float; two convolutions, a sum behind each, the last an output."""
    kernel = numpy_helper.from_array(np.full((1, 1, 1, 1), GAIN, np.float32), "kernel")
    nodes = [helper.make_node("Abs", ["image"], ["x"]), *rounded("x"),
             helper.make_node("Conv", ["x_dq", "kernel"], ["a"]), *rounded("a"),
             helper.make_node("Add", ["x_dq", "a_dq"], ["b"]), *rounded("b"),
             helper.make_node("Conv", ["b_dq", "kernel"], ["c"]), *rounded("c"),
             helper.make_node("Add", ["b_dq", "c_dq"], ["sum"]),
             helper.make_node("QuantizeLinear", ["sum", "scale", "zero"], ["sum_q"]),
             helper.make_node("DequantizeLinear", ["sum_q", "scale", "zero"], ["y"]),
             helper.make_node("Conv", ["y", "kernel"], ["z"])]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 4, 4]) for n in ("image", "y", "z")]
    constants = [kernel, numpy_helper.from_array(np.float32(STEP), "scale"),
                 numpy_helper.from_array(np.uint8(0), "zero")]
    return helper.make_graph(nodes, "block", infos[:1], infos[1:], constants)


def run(graph: Any, image: Any) -> Any:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return ort.InferenceSession(model.SerializeToString()).run(["y", "z"], {"image": image})


def test_streams_are_rounded_where_they_are_read_only(graph: Any) -> None:
    image = np.random.default_rng(0).uniform(0, 5, (1, 1, 4, 4)).astype(np.float32)

    def steps(x: Any) -> Any:
        return (np.rint(x / np.float32(STEP)) * np.float32(STEP)).astype(np.float32)

    before = run(graph, image)
    assert np.allclose(before[0], steps(before[0]), atol=1e-5)
    sum_in_float(graph)
    y, z = run(graph, image)
    b = image + steps(steps(image) * GAIN)
    expected = b + steps(steps(b) * GAIN)
    assert np.allclose(y, expected, atol=1e-5)
    assert not np.allclose(y, steps(y), atol=1e-3), "the output is not rounded"
    assert np.allclose(z, steps(expected) * GAIN, atol=1e-5), "what a convolution reads still is"
    assert [o.name for o in graph.output] == ["y", "z"]
