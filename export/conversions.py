"""Making artifacts from a model, in this process or in several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pocketsam import registry
from pocketsam.doctor import machine
from pocketsam.errors import WorkerError
from pocketsam.export import decoder_rewrites, rewrites
from pocketsam.export.graphs import ClickGraph, DecoderGraph, EncoderGraph, Graph
from pocketsam.models.loading import load_model
from pocketsam.models.sam import SegmentAnything

Report = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A model that can be loaded again: registry name, checkpoint, input side (None: its own) and prompt slots."""

    model: str
    checkpoint: Path
    image_size: int | None
    slots: int

    def load(self) -> SegmentAnything:
        """The model in the form that exporters take."""
        model = load_model(self.model, self.checkpoint, self.image_size)
        rewrites.prepare(model)
        return model


@dataclass(frozen=True)
class Conversion:
    """One artifact to be made at ``path``."""

    format: str
    graph: str
    precision: str
    path: Path

    @property
    def relative(self) -> str:
        return f"{self.format}/{self.path.name}"


def convert_all(tasks: Sequence[Conversion], model: SegmentAnything, source: Source, jobs: int, report: Report) -> None:
    """Make artifacts.

    Args:
        tasks: what to make.
        model: from ``source.load()``, used when one process does it all.
        source: for processes of their own, each of which holds a model.
        jobs: processes.
        report: called with one line per artifact.

    Raises:
        WorkerError: a process died.
    """
    jobs = min(jobs, len(tasks))
    if jobs < 2:
        for task in tasks:
            report(f"exporting {task.relative}")
            _convert(model, source.slots, task)
        return
    # Fresh processes: converters start threads, which a fork does not survive.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start, (jobs,)) as pool:
        # The formats that convert slowest come last in the table; begun first, they leave no process idle at the end.
        pending = {pool.submit(_convert_here, source, task): task for task in reversed(tasks)}
        report(f"exporting {len(tasks)} graphs in {jobs} processes")
        try:
            for done in as_completed(pending):
                done.result()
                report(f"exported {pending[done].relative}")
        except BrokenProcessPool as e:
            raise WorkerError("a process that converted graphs died, most likely for want of memory; "
                              "nothing was written, try again with --jobs 1.") from e
        finally:
            pool.shutdown(cancel_futures=True)


def module(exporter: Any, model: SegmentAnything, graph: str, slots: int) -> Graph:
    """What an exporter converts."""
    if graph == "encoder":
        return EncoderGraph(model).eval()
    if graph == "decoder":
        return DecoderGraph(decoder_rewrites.with_absorbed_decoder(model) if exporter.absorb else model, slots).eval()
    return ClickGraph(model, graph).eval().requires_grad_(False)


def _convert(model: SegmentAnything, slots: int, task: Conversion) -> None:
    exporter = registry.load("format", task.format)
    graph = module(exporter, model, task.graph, slots)
    # Under its own name it appears when it is whole: other formats are made from it, perhaps in another process.
    hidden = task.path.with_name(f".{task.path.name}")
    exporter.export(graph, model.spec.graphs(slots)[task.graph], task.precision, hidden)
    hidden.rename(task.path)


# The model of a process that converts.
_held: list[SegmentAnything] = []


def _start(jobs: int) -> None:
    torch.set_num_threads(max(1, machine()["cores"] // jobs))


def _convert_here(source: Source, task: Conversion) -> None:
    """Loads the model in the first task, so that an error comes back as itself."""
    if not _held:
        _held.append(source.load())
    _convert(_held[0], source.slots, task)
