"""What the evaluator cannot execute, by name."""

from __future__ import annotations

from pocketsam.errors import UnsupportedModel


class UnknownOperator(UnsupportedModel):
    """The program holds an operator, or a variant of one, that the evaluator does not implement."""

    def __init__(self, operator: str, detail: str = "") -> None:
        variant = f" with {detail}" if detail else ""
        super().__init__(f"the MIL evaluator does not implement the operator {operator!r}{variant}; add it to "
                         "pocketsam.runtimes.mil, or run this file on macOS.")
        self.operator = operator
