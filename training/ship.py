"""Weights of a run: the averaged state, as fp32 modules for measuring and as fp16 safetensors for the package."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pocketsam.errors import CheckpointError
from pocketsam.files import staged_file
from pocketsam.models.lite0 import lite0
from pocketsam.models.loading import COUNTERS, read_state_dict
from pocketsam.models.sam import SegmentAnything
from pocketsam.training.checkpoint import averaged_state


def load_weights(path: Path) -> SegmentAnything:
    """lite0 from a run folder or from a ``.safetensors`` file, in fp32 and evaluation mode.

    Raises:
        UsageError: the folder holds no run.
        CheckpointError: the file cannot be read, or the weights are not lite0's.
    """
    state = averaged_state(path) if path.is_dir() else read_state_dict(path)
    model = lite0()
    floats = {k: v.float() for k, v in state.items() if not k.endswith(COUNTERS)}
    missing, unexpected = model.load_state_dict(floats, strict=False)
    wrong = [k for k in (*missing, *unexpected) if not k.endswith(COUNTERS)]
    if wrong:
        raise CheckpointError(f"{path} does not hold lite0: {len(wrong)} keys are missing or unknown, first "
                              f"{wrong[0]!r}.")
    return model.eval()


def ship(run: Path, out: Path) -> int:
    """Write a run's averaged weights as fp16 safetensors; returns the file's bytes.

    Raises:
        ValueError: a weight does not survive fp16.
    """
    return write_half(averaged_state(run), out)


def write_half(state: dict[str, Tensor], out: Path) -> int:
    """Write weights as fp16 safetensors; returns the file's bytes.

    Raises:
        ValueError: a weight does not survive fp16.
    """
    half = {k: v.half().contiguous() for k, v in state.items() if not k.endswith(COUNTERS)}
    for key, value in half.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} leaves the range of fp16")
    with staged_file(out) as staged:
        save_file(half, staged)
    return out.stat().st_size
