"""Ranges of FakeQuantize operators in OpenVINO graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
from openvino import opset13 as opset


def set_range(quantizer: Any, low: float, high: float) -> None:
    """Give a FakeQuantize one range for the whole tensor, on both its sides."""
    for i in range(1, 5):
        value = np.full([1] * len(quantizer.input_value(i).get_shape()), (low, high)[(i - 1) % 2], np.float32)
        quantizer.input(i).replace_source_output(opset.constant(value).output(0))
