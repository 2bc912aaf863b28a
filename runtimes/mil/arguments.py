"""The inputs of one operator, read by name with the type that the operator expects."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Result = Tensor | tuple[Tensor, ...]


class Arguments:
    """Inputs by MIL parameter name; a missing optional parameter gives the default of the MIL documentation.

    Args:
        operator: its name, for messages.
        values: tensors and strings, one or several for each parameter.
        promote: whether fp16 tensors are handed out as float32.
    """

    def __init__(self, operator: str, values: dict[str, list[Tensor | list[str]]], promote: bool) -> None:
        self.operator = operator
        self._values = values
        self._promote = promote

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Tensor:
        """The tensor given for a required parameter."""
        value = self._values[name][0]
        assert isinstance(value, Tensor), f"{self.operator}: {name} is text"
        return self._read(value)

    def optional(self, name: str) -> Tensor | None:
        """The tensor of an optional parameter, or None."""
        if name not in self:
            return None
        return self[name]

    def all(self, name: str) -> list[Tensor]:
        """Every tensor of a variadic parameter."""
        return [self._read(v) for v in self._values[name] if isinstance(v, Tensor)]

    def ints(self, name: str, default: list[int] | None = None) -> list[int]:
        """A vector of integers."""
        if name not in self:
            assert default is not None, f"{self.operator}: {name} is missing"
            return default
        return [int(v) for v in self[name].reshape(-1).tolist()]

    def int(self, name: str, default: int | None = None) -> int:
        """A scalar integer."""
        return self.ints(name, None if default is None else [default])[0]

    def float(self, name: str, default: float | None = None) -> float:
        """A scalar number."""
        if name not in self:
            assert default is not None, f"{self.operator}: {name} is missing"
            return default
        return float(self[name].item())

    def flag(self, name: str, default: bool = False) -> bool:
        """A scalar truth value."""
        return bool(self[name].item()) if name in self else default

    def text(self, name: str, default: str = "") -> str:
        """A string."""
        if name not in self:
            return default
        value = self._values[name][0]
        return "" if isinstance(value, Tensor) else value[0]

    def _read(self, value: Tensor) -> Tensor:
        return value.float() if self._promote and value.is_floating_point() else value


Operator = Callable[[Arguments], Result]
