"""Global attention of OpenVINO graphs: its logits in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as opset

from pocketsam.quantize.openvino_ranges import MOVED, set_range

# Keys from which it pays; the windows of other models are small and quick (docs/adr/0006).
GLOBAL = 1024
LOGITS = "/logits"


def global_attention(model: ov.Model) -> list[str]:
    """Fused attention among at least ``GLOBAL`` keys, without a bias."""
    return [o.get_friendly_name() for o in model.get_ordered_ops() if o.get_type_name() == "ScaledDotProductAttention"
            and not o.get_attributes()["causal"] and o.input_value(1).get_shape()[-2] >= GLOBAL and _unbiased(o)]


def spell_out(model: ov.Model, names: Iterable[str]) -> list[str]:
    """Write these as product, softmax and product, so that the first can read 8 bits; OpenVINO computes the three in
    one kernel again, which has such a form.

    Returns:
        Names of the first products.
    """
    wanted, made = set(names), []
    for fused in [o for o in model.get_ordered_ops() if o.get_friendly_name() in wanted]:
        q, k, v = (fused.input_value(i) for i in range(3))
        if fused.get_input_size() <= 4:
            q = opset.multiply(q, np.float32(q.get_shape()[-1] ** -0.5))
        elif _scalar(fused, 4) != 1:
            q = opset.multiply(q, fused.input_value(4))
        logits = opset.matmul(q, k, False, True)
        logits.set_friendly_name(fused.get_friendly_name() + LOGITS)
        mixed = opset.matmul(opset.softmax(logits, -1), v, False, False)
        mixed.set_friendly_name(fused.get_friendly_name())
        fused.output(0).replace(mixed.output(0))
        made.append(logits.get_friendly_name())
    return made


def make_signed(model: ov.Model, names: Iterable[str]) -> None:
    """Give what these products read a signed range around zero: with any other OpenVINO computes them in float."""
    from pocketsam.quantize.grid import INT8

    wanted = set(names)
    for product in [o for o in model.get_ordered_ops() if o.get_friendly_name() in wanted]:
        for quantizer in quantizers(product):
            ends = [np.array(quantizer.input_value(i).get_node().data) for i in (1, 2)]
            step = max(float(np.abs(e).max()) for e in ends) / INT8
            set_range(quantizer, -(INT8 + 1) * step, INT8 * step)


def quantizers(product: Any) -> Iterator[Any]:
    """The FakeQuantize operators behind both inputs of a product."""
    for i in range(2):
        node = product.input_value(i).get_node()
        while node.get_type_name() in MOVED:
            node = node.input_value(0).get_node()
        if node.get_type_name() == "FakeQuantize":
            yield node


def _unbiased(fused: Any) -> bool:
    return fused.get_input_size() < 4 or _scalar(fused, 3) == 0


def _scalar(fused: Any, i: int) -> float | None:
    """The value of a constant input of one element."""
    node = fused.input_value(i).get_node()
    data = np.array(node.data) if node.get_type_name() == "Constant" else np.empty(0)
    return float(data.item()) if data.size == 1 else None
