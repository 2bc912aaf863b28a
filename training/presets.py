"""Named recipes: what fits a GPU for half an hour, and two CPU cores for an hour, for some or for a night."""

from __future__ import annotations

from dataclasses import dataclass

from pocketsam.training.augment import Augment
from pocketsam.training.loop import Phase, Recipe

# Most images as the teacher saw them, so that its stored embeddings hold for them.
MOSTLY_WHOLE = Augment(whole=0.7, flip=0.3)


@dataclass(frozen=True)
class Preset:
    """A recipe with the cache side and number of processes that go with it."""

    recipe: Recipe
    cache: int
    processes: int = 1


def gpu(minutes: float) -> Preset:
    """One large GPU for ten minutes, from earlier weights: all of the model at 512 pixels, strongly augmented."""
    wide = Augment(min_zoom=0.6, stretch=1.3, colour=0.4, grey=0.1)
    phases = (
        Phase(0.75, 512, 64, 8, 2, augment=wide),
        Phase(1.0, 512, 64, 8, 3, augment=Augment(whole=0.6)),
    )
    recipe = Recipe(phases, minutes=minutes, lr=1e-3, trunk_lr=0.5, decoder_lr=0.4, ema=0.999, bf16=True)
    return Preset(recipe, cache=512)


def quick(minutes: float) -> Preset:
    """Two cores for an hour: the trunk stays frozen, because steps are worth more than its gradients."""
    phases = (
        Phase(0.4, 256, 3, 8, 1, frozen=6),
        Phase(0.8, 256, 3, 8, 2, frozen=6),
        Phase(1.0, 384, 2, 8, 2, frozen=6),
    )
    return Preset(Recipe(phases, minutes=minutes, ema=0.998, bf16=True), cache=384, processes=2)


def hours(minutes: float) -> Preset:
    """Two cores for some hours, from the weights of ``quick``: the late trunk learns too, clicks are corrected."""
    phases = (
        Phase(0.35, 256, 4, 8, 1, frozen=2),
        Phase(0.8, 256, 4, 8, 2, frozen=2),
        Phase(1.0, 384, 3, 8, 2, frozen=2),
    )
    return Preset(Recipe(phases, minutes=minutes, ema=0.998, bf16=True), cache=384, processes=2)


def cpu(minutes: float) -> Preset:
    """Two cores for a night: frozen at first, then most of the trunk too, at last at 512 pixels."""
    phases = (
        Phase(0.2, 256, 3, 8, 1, frozen=6),
        Phase(0.6, 256, 4, 8, 3, frozen=2),
        Phase(0.85, 384, 3, 8, 3, frozen=2),
        Phase(1.0, 512, 2, 8, 3, frozen=2),
    )
    return Preset(Recipe(phases, minutes=minutes, ema=0.999, bf16=True), cache=512, processes=2)


def taught(minutes: float) -> Preset:
    """Two cores for two hours, from ``graft``: a teacher's stored embeddings first, then masks as well."""
    whole = Augment(whole=1, flip=0)
    phases = (
        Phase(0.12, 256, 8, 1, 0, frozen=0, augment=whole),
        Phase(0.25, 384, 6, 1, 0, frozen=1, augment=whole),
        Phase(0.78, 384, 2, 8, 2, frozen=1, augment=MOSTLY_WHOLE),
        Phase(1.0, 512, 2, 8, 2, frozen=1, augment=MOSTLY_WHOLE),
    )
    recipe = Recipe(phases, minutes=minutes, lr=1e-3, trunk_lr=0.5, decoder_lr=0.3, ema=0.998, bf16=True)
    return Preset(recipe, cache=512, processes=2)


def further(minutes: float) -> Preset:
    """Two cores for two hours, from the weights of ``taught``: twice the images a step, one answer until the end."""
    phases = (
        Phase(0.45, 384, 4, 8, 1, frozen=1, augment=MOSTLY_WHOLE),
        Phase(0.85, 512, 3, 8, 1, frozen=1, augment=MOSTLY_WHOLE),
        Phase(1.0, 512, 2, 8, 2, frozen=1, augment=MOSTLY_WHOLE),
    )
    recipe = Recipe(phases, minutes=minutes, lr=8e-4, trunk_lr=0.5, decoder_lr=0.4, ema=0.998, bf16=True)
    return Preset(recipe, cache=512, processes=2)


def clicks(minutes: float) -> Preset:
    """Two cores for a quarter of an hour, from the weights of ``further``: corrections, behind a frozen trunk."""
    phases = (
        Phase(0.4, 384, 2, 8, 3, frozen=6, augment=MOSTLY_WHOLE),
        Phase(1.0, 512, 2, 8, 3, frozen=6, augment=MOSTLY_WHOLE),
    )
    recipe = Recipe(phases, minutes=minutes, lr=3e-4, decoder_lr=0.5, ema=0.995, bf16=True)
    return Preset(recipe, cache=512, processes=2)


def int8(minutes: float) -> Preset:
    """Two cores for an hour, from trained weights: as ``hours``, but on 8-bit activations (``quantized.py``)."""
    phases = (
        Phase(0.7, 256, 4, 8, 2, frozen=2),
        Phase(1.0, 384, 3, 8, 2, frozen=2),
    )
    return Preset(Recipe(phases, minutes=minutes, lr=3e-4, ema=0.995, quantized=30.0), cache=384, processes=2)


PRESETS = {"gpu": gpu, "quick": quick, "hours": hours, "cpu": cpu, "taught": taught, "further": further,
           "clicks": clicks, "int8": int8}
