"""The contract of a runtime: four members, the same for every engine."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketsam.geometry import Frame
from pocketsam.images import Rgb
from pocketsam.resampling import Floats
from pocketsam.specs import ModelSpec

Features = dict[str, Floats]
Tensors = dict[str, NDArray[np.float32]]


class Runtime(Protocol):
    """Executes the encoder and the prompt decoder of one model."""

    spec: ModelSpec
    slots: int

    def encode(self, image: Rgb, frame: Frame) -> Features:
        """uint8 (1, S, S, 3) RGB -> features by contract name; ``frame`` says where the content ends."""
        ...

    def decode(self, features: Features, prompts: Tensors) -> Tensors:
        """Features and ``decoder_inputs`` for B prompts -> low_res_masks (B, 4, 4h, 4w), iou_predictions (B, 4)."""
        ...

    def info(self) -> dict[str, Any]:
        """Name, engine version, threads, precision, weights sha256: what a report must say beside a number."""
        ...
