"""The free-licence photos that ship with the package (licences: ``assets/photos/SOURCES.md``)."""

from __future__ import annotations

from pathlib import Path

# For int8, wherever they come from.
CALIBRATION_IMAGES = 32
PHOTOS = ("coffee", "cat", "flower", "astronaut", "coins", "pagoda", "rocket")


def photo_paths() -> list[Path]:
    """Paths of the shipped JPEGs, always in the same order."""
    folder = Path(__file__).parent / "assets" / "photos"
    return [folder / f"{name}.jpg" for name in PHOTOS]


# For each photo a click inside the main object and a box around it, XY pixels.
CLICKS = {"coffee": (290, 100), "cat": (195, 150), "flower": (300, 220), "astronaut": (190, 340), "coins": (335, 43),
          "pagoda": (205, 215), "rocket": (320, 280)}
BOXES = {"coffee": (165, 15, 415, 305), "cat": (25, 0, 375, 299), "flower": (160, 80, 460, 370),
         "astronaut": (10, 20, 365, 511), "coins": (300, 12, 368, 76), "pagoda": (50, 25, 365, 400),
         "rocket": (300, 125, 345, 410)}
