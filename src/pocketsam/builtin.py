"""The model that ships with the package."""

from __future__ import annotations

from pathlib import Path

from pocketsam.errors import UsageError

BUILTIN_MODEL = "lite0"


def builtin_weights(model: str) -> Path | None:
    """The shipped weights of a model, or None for models that need a checkpoint."""
    path = Path(__file__).parent / "assets" / "weights" / f"{model}.safetensors"
    return path if path.is_file() else None


def checkpoint_for(model: str, checkpoint: str | Path | None) -> Path:
    """The given checkpoint, or the shipped weights.

    Raises:
        UsageError: none was given and none is shipped.
    """
    if checkpoint is not None:
        return Path(checkpoint)
    shipped = builtin_weights(model)
    if shipped is None:
        raise UsageError(f"{model} needs its checkpoint; `pocketsam models` lists the file and its address.")
    return shipped
