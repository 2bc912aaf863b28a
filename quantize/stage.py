"""What the pairs of an int8 export share: what the pipeline hands over, and encoders prepared once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pocketsam.bundle import Artifact, Bundle
from pocketsam.images import Rgb
from pocketsam.quantize.calibration import CalibrationSet
from pocketsam.quantize.correction import Prepared, prepare
from pocketsam.quantize.grid import Grid
from pocketsam.runtime import Runtime


@dataclass(frozen=True)
class Stage:
    """What the pipeline hands over.

    Attributes:
        module: (graph, format) -> the torch module that the fp32 artifact was made from.
        reference: PyTorch in fp32.
        images: uint8 (H, W, 3) RGB that judge the result.
        gate: least mean agreement; None for the default of the recipe.
        seconds: bound of each search; 0 for none.
        kept: artifacts of the bundle that is already there, reused if their key is the same.
        bring: brings such an artifact over and describes the file that is there; None if its file is damaged.
    """

    module: Callable[[str, str], Any]
    reference: Runtime
    images: Sequence[Rgb]
    calibration: CalibrationSet
    gate: float | None
    seconds: float
    kept: Sequence[Artifact]
    bring: Callable[[Artifact], Artifact | None]
    report: Callable[[str], None]


class Preparation:
    """Encoders with rounded weights and corrected biases, made once for all formats that share a grid."""

    def __init__(self, stage: Stage, bundle: Bundle) -> None:
        self.stage, self.spec = stage, bundle.spec
        self._known: dict[tuple[Grid, bool], Prepared] = {}

    def encoder(self, format_: str, grid: Grid, activations: bool) -> Prepared:
        """The encoder on a grid, with 8-bit activations or float ones."""
        key = grid, activations
        if key not in self._known:
            self.stage.report(f"rounding weights ({grid} grid) and correcting biases on "
                              f"{len(self.stage.calibration.images)} images")
            images = list(self.stage.calibration.encoder_inputs(self.spec))
            self._known[key] = prepare(self.stage.module("encoder", format_), images, grid, activations)
        return self._known[key]
