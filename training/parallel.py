"""Several training processes that average their gradients: on CPUs, one thread each wastes less than shared threads."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import ProcessException
from torch.multiprocessing.spawn import spawn as spawn_processes

from pocketsam.errors import PocketSamError
from pocketsam.files import staged_file


def spawn(processes: int, work: Callable[..., None], *args: Any) -> None:
    """Run ``work(*args)`` in this process, or in several joined by the gloo backend, one thread each.

    Tensors in ``args`` are shared between the processes, not copied.

    Raises:
        PocketSamError: what the work raised.
    """
    if processes == 1:
        work(*args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            spawn_processes(_join, (processes, folder, work, args), nprocs=processes)  # type: ignore[no-untyped-call]
        except ProcessException:
            # Said in one sentence where it was one; torch would wrap it in the text of a traceback.
            for problem in folder.glob("problem.*"):
                raise pickle.loads(problem.read_bytes()) from None
            raise


def _join(index: int, processes: int, folder: Path, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=index, world_size=processes)
    try:
        work(*args)
    except PocketSamError as e:
        with staged_file(folder / f"problem.{index}") as staged:
            staged.write_bytes(pickle.dumps(e))
        raise
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def average(model: nn.Module, seconds: float) -> float:
    """Average gradients, BatchNorm statistics and the clock over all processes, in place.

    Args:
        model: after ``backward``.
        seconds: this process's time.

    Returns:
        The mean time, equal everywhere, so that all processes follow one schedule.
    """
    if not dist.is_initialized():
        return seconds
    tensors = [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [b for b in model.buffers() if b.is_floating_point()]
    flat = torch.cat([torch.tensor([seconds], dtype=torch.float32), *(t.detach().flatten() for t in tensors)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 1
    for tensor in tensors:
        tensor.copy_(flat[start:start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
    return float(flat[0])
