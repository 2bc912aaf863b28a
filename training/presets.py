"""Named recipes: what fits a GPU for half an hour and what fits two CPU cores for an evening."""

from __future__ import annotations

from dataclasses import dataclass

from pocketsam.training.loop import Phase, Recipe


@dataclass(frozen=True)
class Preset:
    """A recipe with the cache side and number of processes that go with it."""

    recipe: Recipe
    cache: int
    processes: int = 1


def gpu(minutes: float) -> Preset:
    """One large GPU: the whole model at 512 pixels, 48 images x 16 regions a step, 4 answers per prompt."""
    phases = (
        Phase(0.25, 384, 64, 16, 2),
        Phase(1.0, 512, 48, 16, 4),
    )
    return Preset(Recipe(phases, minutes=minutes, lr=8e-4, ema=0.999, bf16=True), cache=512)


def cpu(minutes: float) -> Preset:
    """Two cores: small inputs, single answers and a frozen trunk first, then corrections and larger inputs."""
    phases = (
        Phase(0.4, 256, 3, 8, 1, frozen=6),
        Phase(0.75, 256, 2, 8, 2, frozen=2),
        Phase(1.0, 384, 2, 6, 2, frozen=2),
    )
    return Preset(Recipe(phases, minutes=minutes, lr=6e-4, ema=0.998, bf16=True), cache=384, processes=2)


PRESETS = {"gpu": gpu, "cpu": cpu}
