"""FakeQuantize operators of OpenVINO graphs: their ranges, and who reads what they round."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as opset

# What may stand between a rounded tensor and the layer that reads it: values are moved, or stay on their grid.
MOVED = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "Slice", "StridedSlice", "Gather",
         "Concat", "Pad", "Convert", "Relu", "Clamp")
# These are quicker in 8 bits, whoever reads them.
RESIZED = ("Interpolate", "AvgPool", "MaxPool")


def set_range(quantizer: Any, low: float, high: float) -> None:
    """Give a FakeQuantize one range for the whole tensor, on both its sides."""
    for i in range(1, 5):
        value = np.full([1] * len(quantizer.input_value(i).get_shape()), (low, high)[(i - 1) % 2], np.float32)
        quantizer.input(i).replace_source_output(opset.constant(value).output(0))


def leave_to_layers(model: ov.Model, layers: Collection[str]) -> None:
    """Let only layers and resizing read what is rounded, and all else what lies before: the tool also rounds what
    positions are added to, and with it a whole residual stream.

    Args:
        layers: names of the operators that compute in 8 bits.
    """
    for quantizer in [o for o in model.get_ordered_ops() if o.get_type_name() == "FakeQuantize"]:
        for target in list(quantizer.output(0).get_target_inputs()):
            if not _reaches(target.get_node(), layers):
                target.replace_source_output(quantizer.input_value(0))


def _reaches(node: Any, layers: Collection[str]) -> bool:
    if node.get_friendly_name() in layers or node.get_type_name() in RESIZED:
        return True
    return node.get_type_name() in MOVED and any(
        _reaches(t.get_node(), layers) for o in node.outputs() for t in o.get_target_inputs())
