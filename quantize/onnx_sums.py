"""Sums of a quantized ONNX graph, brought back to float."""

from __future__ import annotations

from typing import Any

SUMS = ("Add",)


def sum_in_float(graph: Any) -> None:
    """Let sums read and hand on residual streams unrounded; the tool rounds a tensor for all that read it.

    What a quantized operator writes stays rounded, as it needs that to run in 8 bits.
    """
    makers = {o: n for n in graph.node for o in n.output}

    def rounded_from(name: str) -> str | None:
        """The float tensor behind QuantizeLinear and DequantizeLinear."""
        for kind in ("DequantizeLinear", "QuantizeLinear"):
            if name not in makers or makers[name].op_type != kind:
                return None
            name = makers[name].input[0]
        return name

    def is_float(name: str) -> bool:
        maker = makers.get(name)
        return maker is not None and (maker.op_type in SUMS or not any(rounded_from(i) for i in maker.input))

    for node in graph.node:
        for i, name in enumerate(node.input if node.op_type in SUMS else ()):
            if (source := rounded_from(name)) and is_float(source):
                node.input[i] = source
    for name in [o.name for o in graph.output]:
        if (source := rounded_from(name)) and is_float(source):
            _rename(graph, {name: f"{name}_rounded", source: name})


def _rename(graph: Any, names: dict[str, str]) -> None:
    """Rename tensors inside a graph; its outputs keep their names."""
    for node in graph.node:
        for tensors in (node.input, node.output):
            for i, name in enumerate(tensors):
                tensors[i] = names.get(name, name)
