"""The checkpoint of a run, which the call that began the run continues, and no other."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketsam.errors import UsageError, first_line
from pocketsam.files import staged_file

CHECKPOINT = "checkpoint.pt"


def plan_of(recipe: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the result of a run: the fields of its recipe, and what does so besides, as plain values."""
    # How the machine computes is no choice of the caller.
    return {**{k: v for k, v in recipe.items() if k != "bf16"}, **call}


def write_checkpoint(out: Path, state: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Write it whole or not at all.

    Args:
        out: the run's folder.
        state: tensors and numbers.
        plan: of :func:`plan_of`.
    """
    with staged_file(out / CHECKPOINT) as staged:
        torch.save({**state, "plan": dict(plan)}, staged)


def averaged_state(out: Path) -> dict[str, Tensor]:
    """The weight average of a run, on the CPU.

    Raises:
        UsageError: the folder holds no run, or a damaged one.
    """
    if not (out / CHECKPOINT).is_file():
        raise UsageError(f"{out} holds no run: it has no {CHECKPOINT}.")
    state = _load(out / CHECKPOINT, torch.device("cpu"))
    if not isinstance(average := state.get("ema"), dict):
        raise UsageError(f"{out / CHECKPOINT} holds no averaged weights; choose the folder of a run of `fit`.")
    return average


def _load(path: Path, place: torch.device) -> dict[str, Any]:
    try:
        return dict(torch.load(path, map_location=place, weights_only=True))
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, pickle.UnpicklingError) as e:
        raise UsageError(f"{path} cannot be read ({first_line(e)}); if it is damaged, remove it to begin again, or "
                         "choose another folder.") from e


def read_checkpoint(out: Path, plan: Mapping[str, Any], place: torch.device) -> dict[str, Any]:
    """The state of a run that was begun with the same plan.

    Raises:
        UsageError: damaged, begun with another, or by an earlier version, which did not record it.
    """
    state = _load(out / CHECKPOINT, place)
    begun = state.pop("plan", None)
    advice = f"choose another folder (--initial {out} starts from its weights)."
    if begun is None:
        raise UsageError(f"{out} holds a run of an earlier version, which did not record how it was begun; {advice}")
    if other := sorted(k for k in begun.keys() | plan.keys() if begun.get(k) != plan.get(k)):
        raise UsageError(f"{out} holds a run that was begun with another {', '.join(other)}; repeat the call that "
                         f"began it, or {advice}")
    return state
