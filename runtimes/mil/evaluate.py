"""Executing a MIL program with torch on the CPU, one operator after the other.

fp16 is honoured value by value: an operator reads fp16 inputs as float32, computes in float32, and its result is
rounded to fp16 where the program declares fp16, so it overflows to infinity as on the device. Hardware that also
accumulates in fp16 can be worse than this; none can be better.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketsam.errors import BundleError
from pocketsam.runtimes.mil import constants, ops_elementwise, ops_linear, ops_reduce, ops_shape
from pocketsam.runtimes.mil.arguments import Arguments, Operator
from pocketsam.runtimes.mil.errors import UnknownOperator
from pocketsam.runtimes.mil.program import Function, Named, Operation, Package, Value, load_package

OPERATORS: dict[str, Operator] = {**ops_elementwise.TABLE, **ops_shape.TABLE, **ops_linear.TABLE, **ops_reduce.TABLE}
# These only move values, so fp16 needs no detour through float32.
MOVES = frozenset(ops_shape.TABLE)
TORCH = {"fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8, "uint8": torch.uint8,
         "int16": torch.int16, "uint16": torch.int32, "int32": torch.int32, "uint32": torch.int64,
         "int64": torch.int64, "bool": torch.bool}


class Evaluator:
    """One function of a ``.mlpackage``, ready to run; weights are decoded once.

    Args:
        path: the package folder.
        function: its name; None for the package's default.

    Raises:
        BundleError: the package is damaged or has no such function.
        UnknownOperator: it holds an operator that is not implemented; found on loading, not on the first run.
    """

    def __init__(self, path: Path | Package, function: str | None = None) -> None:
        self.package = path if isinstance(path, Package) else load_package(path)
        name = function or self.package.default
        if name not in self.package.functions:
            have = ", ".join(sorted(self.package.functions))
            raise BundleError(f"the Core ML package has the functions {have}, not {name}; export the bundle again.")
        self.function: Function = self.package.functions[name]
        self._constants: dict[str, Value] = {}
        self._steps: list[Operation] = []
        for operation in self.function.operations:
            self._prepare(operation)
        self._frees = self._last_uses()

    @property
    def input_names(self) -> list[str]:
        return [i.name for i in self.function.inputs]

    @property
    def output_names(self) -> list[str]:
        return list(self.function.outputs)

    @torch.inference_mode()
    def run(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Inputs by name with the declared shapes -> outputs by name.

        Raises:
            BundleError: an input is missing or has another shape than the program declares.
        """
        values: dict[str, Value] = dict(self._constants)
        for declared in self.function.inputs:
            given = inputs.get(declared.name)
            if given is None or tuple(given.shape) != declared.shape:
                raise BundleError(f"the Core ML program expects {declared.name} of shape {declared.shape}, got "
                                  f"{None if given is None else tuple(given.shape)}.")
            values[declared.name] = torch.from_numpy(np.ascontiguousarray(given)).to(TORCH[declared.dtype])
        for i, operation in enumerate(self._steps):
            for out, result in zip(operation.outputs, _execute(operation, values, OPERATORS), strict=True):
                values[out.name] = result
            for name in self._frees.get(i, ()):
                del values[name]
        return {name: _as_array(values[name]) for name in self.function.outputs}

    def _prepare(self, operation: Operation) -> None:
        if operation.type == "const":
            self._constants[operation.outputs[0].name] = operation.attributes["val"]
        elif operation.type.startswith("constexpr_"):
            if operation.type not in constants.TABLE:
                raise UnknownOperator(operation.type)
            (result,) = _execute(operation, self._constants, constants.TABLE)
            self._constants[operation.outputs[0].name] = result
        elif operation.type not in OPERATORS:
            raise UnknownOperator(operation.type)
        else:
            self._steps.append(operation)

    def _last_uses(self) -> dict[int, list[str]]:
        """Step -> variables that no later step reads; a result that nobody reads goes at once."""
        last: dict[str, int] = {}
        for i, operation in enumerate(self._steps):
            names = {o.name for o in operation.outputs}
            names |= {b for bindings in operation.inputs.values() for b in bindings if isinstance(b, str)}
            last.update(dict.fromkeys(names, i))
        frees: dict[int, list[str]] = {}
        for name, i in last.items():
            if name not in self.function.outputs and name not in self._constants:
                frees.setdefault(i, []).append(name)
        return frees


def _execute(operation: Operation, values: dict[str, Value],
             table: dict[str, Operator]) -> tuple[Tensor, ...]:
    given = {key: [values[b] if isinstance(b, str) else b for b in bindings]
             for key, bindings in operation.inputs.items()}
    given |= {key: [value] for key, value in operation.attributes.items()}
    arguments = Arguments(operation.type, given, promote=operation.type not in MOVES)
    result = table[operation.type](arguments)
    results = (result,) if isinstance(result, Tensor) else result
    return tuple(_declared(r, out, operation) for r, out in zip(results, operation.outputs, strict=True))


def _declared(result: Tensor, out: Named, operation: Operation) -> Tensor:
    """The result in its declared dtype, which rounds fp16; a wrong shape means that the operator is misread."""
    if tuple(result.shape) != out.shape:
        raise UnknownOperator(operation.type, f"a result of shape {out.shape}: computed {tuple(result.shape)}")
    return result.to(TORCH[out.dtype])


def _as_array(value: Value) -> NDArray[np.float32]:
    assert isinstance(value, Tensor)
    array: NDArray[np.float32] = value.contiguous().numpy()
    return array
