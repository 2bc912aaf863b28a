"""Where "segment everything" looks: the grid of points and the overlapping crops (SAM paper, appendix B)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Crop:
    """A part of the photo, in pixels: x0, y0 inclusive and x1, y1 exclusive; layer 0 is the whole photo."""

    x0: int
    y0: int
    x1: int
    y1: int
    layer: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.x0, self.y0, self.x1, self.y1

    @property
    def xywh(self) -> tuple[int, int, int, int]:
        return self.x0, self.y0, self.x1 - self.x0, self.y1 - self.y0


def point_grid(side: int) -> NDArray[np.float64]:
    """``side`` x ``side`` cell centres: float64 (side * side, 2) XY in [0, 1], row by row."""
    centres = (np.arange(side) + 0.5) / side
    ys, xs = np.meshgrid(centres, centres, indexing="ij")
    return np.stack([xs.ravel(), ys.ravel()], axis=1)


def crops(height: int, width: int, layers: int, overlap_ratio: float) -> list[Crop]:
    """The whole photo, then for layer i a grid of 2^i x 2^i overlapping crops, column by column.

    Args:
        height, width: photo size in pixels.
        layers: how many layers of crops besides the whole photo.
        overlap_ratio: overlap of neighbouring crops of the first layer as a fraction of the short side; halved with
            every further layer.
    """
    found = [Crop(0, 0, width, height, 0)]
    for layer in range(1, layers + 1):
        n = 2 ** layer
        overlap = int(overlap_ratio * min(height, width) * (2 / n))
        w = math.ceil((overlap * (n - 1) + width) / n)
        h = math.ceil((overlap * (n - 1) + height) / n)
        for i in range(n):
            for j in range(n):
                x, y = (w - overlap) * i, (h - overlap) * j
                crop = Crop(x, y, min(x + w, width), min(y + h, height), layer)
                # On photos of a few pixels rounding can push a crop out of the photo.
                if crop.x1 > crop.x0 and crop.y1 > crop.y0:
                    found.append(crop)
    return found
