"""Tables that a graph adds, such as attention biases and positions: stored in 8 bits, added in float."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketsam.quantize.grid import INT8

# Numbers below which a table is not worth an operator.
SMALLEST = 1024


class Table(NamedTuple):
    """Codes (the table's shape, int8), scales (n,) float32, and the axis of size n that they belong to."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    axis: int

    def column(self) -> NDArray[np.float32]:
        """The scales in a shape that multiplies the codes."""
        return self.scales.reshape([-1 if i == self.axis else 1 for i in range(self.codes.ndim)])


def is_table(shape: tuple[int, ...]) -> bool:
    """Large and of two dimensions or more; biases of channels are too few and matter too much."""
    return int(np.prod(shape)) >= SMALLEST and sum(side > 1 for side in shape) > 1


def in_8_bits(table: NDArray[np.float32]) -> Table:
    """Round to the nearest of symmetric codes, with a scale for each index of the axis where that loses least."""
    def error(found: Table) -> float:
        return float(np.square(found.codes * found.column() - table).sum())

    return min((along(table, axis) for axis, side in enumerate(table.shape) if side > 1), key=error)


def along(table: NDArray[np.float32], axis: int) -> Table:
    """Round to the nearest of symmetric codes, with a scale for each index of an axis."""
    others = tuple(i for i in range(table.ndim) if i != axis)
    scales = np.maximum(np.abs(table).max(others, keepdims=True) / INT8, 1e-12).astype(np.float32)
    return Table(np.rint(table / scales).clip(-INT8, INT8).astype(np.int8), scales.reshape(-1), axis)
