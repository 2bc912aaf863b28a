"""The free-licence photos that ship with the package (licences: ``assets/photos/SOURCES.md``)."""

from __future__ import annotations

from pathlib import Path

PHOTOS = ("coffee", "cat", "flower", "astronaut", "coins", "pagoda", "rocket")


def photo_paths() -> list[Path]:
    """Paths of the shipped JPEGs, always in the same order."""
    folder = Path(__file__).parent / "assets" / "photos"
    return [folder / f"{name}.jpg" for name in PHOTOS]
