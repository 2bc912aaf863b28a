"""Core ML packages as data, through our own reader of MIL programs; Core ML itself is not needed."""

from __future__ import annotations

import math
import re
from pathlib import Path

from torch import Tensor as Values

from pocketsam.benchmarks.kinds import attention
from pocketsam.benchmarks.work import Graph, Step, Tensor
from pocketsam.errors import BundleError, UnsupportedModel
from pocketsam.runtimes.mil.program import Function, Named, Operation, load_package
from pocketsam.specs import GraphSpec

# The activations first: a reduction counts its first input.
DATA_FIRST = ("x", "data", "input", "query")


def read(path: Path, graph: GraphSpec, batch: int) -> Graph:
    """Read the function of a ``coreml`` artifact that takes ``batch`` prompts.

    Raises:
        BundleError: no package, or it has no such function.
    """
    return read_package(path, None if graph.name == "encoder" else f"decode_{batch}")


def read_package(path: Path, function: str | None) -> Graph:
    """Read one function of any ``.mlpackage``; None for its default."""
    package = load_package(path)
    name = function or package.default
    if name not in package.functions:
        raise BundleError(f"{path} has the functions {sorted(package.functions)}, not {name}; export the bundle again.")
    return _Builder(package.functions[name]).graph()


class _Builder:
    """Collects tensors and steps; constants written into an operator get names of their own."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.tensors = {i.name: _declared(i) for i in function.inputs}
        self.stored: set[str] = set()
        self.values: dict[str, Values] = {}

    def graph(self) -> Graph:
        steps = []
        for number, operation in enumerate(self.function.operations):
            self.tensors |= {o.name: _declared(o) for o in operation.outputs}
            if operation.type == "const":
                self._keep(operation.outputs[0].name, operation.attributes["val"])
            else:
                steps.append(self._step(operation, f"{number}"))
        return Graph(self.tensors, frozenset(self.stored), tuple(i.name for i in self.function.inputs),
                     self.function.outputs, tuple(steps))

    def _keep(self, name: str, value: Values | list[str]) -> None:
        """Strings are settings and weigh nothing."""
        self.stored.add(name)
        if isinstance(value, Values):
            self.values[name] = value
            self.tensors[name] = Tensor(tuple(value.shape), value.element_size() * 8)
        else:
            self.tensors[name] = Tensor((0,), 8)

    def _step(self, operation: Operation, number: str) -> Step:
        names: dict[str, list[str]] = {}
        given = {**operation.inputs, **{k: (v,) for k, v in operation.attributes.items()}}
        for key in sorted(given, key=lambda k: k not in DATA_FIRST):
            for i, value in enumerate(given[key]):
                # No MIL name holds a space, so these cannot collide.
                name = value if isinstance(value, str) else f"{number} {key} {i}"
                if not isinstance(value, str):
                    self._keep(name, value)
                names.setdefault(key, []).append(name)
        inputs = tuple(n for rows in names.values() for n in rows)
        flops = self._flops(operation, {k: rows[0] for k, rows in names.items()})
        return Step(operation.type, inputs, tuple(o.name for o in operation.outputs), flops)

    def _flops(self, operation: Operation, names: dict[str, str]) -> int | None:
        kind, output = operation.type, math.prod(operation.outputs[0].shape)

        def shape(key: str) -> tuple[int, ...]:
            return self.tensors[names[key]].shape

        bias = output if "bias" in names else 0
        if kind == "conv":
            return 2 * output * math.prod(shape("weight")[1:]) + bias
        if kind == "conv_transpose":
            return 2 * math.prod(shape("x")) * math.prod(shape("weight")[1:]) + bias
        if kind == "linear":
            return 2 * output * shape("weight")[-1] + bias
        if kind == "matmul":
            transposed = "transpose_x" in names and bool(self.values[names["transpose_x"]].item())
            return 2 * output * shape("x")[-2 if transposed else -1]
        if kind == "scaled_dot_product_attention":
            return attention(shape("query"), shape("key"), shape("value"), "attn_mask" in names)
        if kind in ("avg_pool", "max_pool"):
            return output * math.prod(int(n) for n in self.values[names["kernel_sizes"]].tolist())
        return None


def _declared(named: Named) -> Tensor:
    """``fp16`` -> 16 bits, ``bool`` -> 8."""
    digits = re.search(r"\d+$", named.dtype)
    if digits is None and named.dtype not in ("bool", "string"):
        raise UnsupportedModel(f"a Core ML tensor has the type {named.dtype}, whose size is not known.")
    return Tensor(named.shape, int(digits.group()) if digits else 8)
