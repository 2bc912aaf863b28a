"""The same folder job through Ray Data: on one machine or on a cluster that shares the folders."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pocketsam.bundle import MANIFEST
from pocketsam.errors import MissingDependency, OutputError, PocketSamError, WorkerError
from pocketsam.files import is_there
from pocketsam.folders import Done, Job, Report, segment_photo

OBJECT_STORE_BYTES = 100_000_000


class Segmenter:
    """What an actor holds: an open model. Ray starts a new one, and repeats its photo, when one dies."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.sam = job.open()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Segment one photo, unless its label was written before the actor that wrote it died."""
        photo = Path(str(row["item"]))
        if self.job.holds(photo):
            return asdict(Done(photo.name))
        try:
            return asdict(segment_photo(self.sam, photo, self.job))
        except OutputError as e:
            # An error inside an actor would be retried for ever; it is raised where the rows are read.
            return {**asdict(Done(photo.name, problem=str(e))), "fatal": True}


def run_ray(job: Job, photos: Sequence[Path], workers: int, report: Report, address: str | None = None) -> list[Done]:
    """Segment photos with Ray Data actors.

    A photo's label appears by one atomic rename, so neither a repeated photo nor a restarted job writes it twice, and
    a photo without a label is not done.

    Args:
        workers: actors, each with ``job.threads`` CPUs.
        report: as for :func:`pocketsam.folders.run`.
        address: a running cluster, whose machines must see the same paths; None starts Ray here and stops it again.

    Raises:
        MissingDependency: Ray is not installed.
        OutputError: the output folder is full or not writable.
        WorkerError: Ray gave up.
    """
    # Ray prints remarks, where a machine may be reading the command's JSON.
    with redirect_stdout(sys.stderr):
        return _run(job, photos, workers, report, address)


def _run(job: Job, photos: Sequence[Path], workers: int, report: Report, address: str | None) -> list[Done]:
    try:
        ray = importlib.import_module("ray")
        data = importlib.import_module("ray.data")
    except ModuleNotFoundError as e:
        raise MissingDependency("ray[data]", "ray", "--engine ray") from e
    # Ray would report its usage to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cpus = job.threads or 1
    try:
        if address is None:
            # Not a cluster that runs here already, or that a variable names.
            ray.init(address="local", num_cpus=workers * cpus, include_dashboard=False, log_to_driver=False,
                     configure_logging=False, object_store_memory=OBJECT_STORE_BYTES)
        else:
            ray.init(address=address, log_to_driver=False)
        data.DataContext.get_current().enable_progress_bars = False
        rows = data.from_items([str(p.resolve()) for p in photos], override_num_blocks=len(photos))
        # Ray Data itself restarts actors that die and repeats their rows, without a limit.
        rows = rows.map(Segmenter, fn_constructor_args=(_absolute(job),), num_cpus=cpus,
                        compute=data.ActorPoolStrategy(size=workers))
        return _collect(rows, len(photos), report)
    except PocketSamError:
        raise
    except Exception as e:  # Ray wraps whatever happened in a worker in classes of its own
        reason = (str(e).strip().splitlines() or [type(e).__name__])[-1][:200]
        raise WorkerError(f"Ray stopped the job ({reason}); run the same command again to go on.") from e
    finally:
        ray.shutdown()


def _collect(rows: Any, total: int, report: Report) -> list[Done]:
    outcomes: list[Done] = []
    for row in rows.iter_rows():
        if row.pop("fatal", None):
            raise OutputError(str(row["problem"]))
        outcomes.append(Done(**row))
        report(outcomes[-1], len(outcomes), total)
    return outcomes


def _absolute(job: Job) -> Job:
    """Workers start in a folder of their own."""
    # A folder that happens to have a model's name is no bundle.
    source = str(Path(job.source).resolve()) if is_there(Path(job.source) / MANIFEST) else job.source
    embeddings = None if job.embeddings is None else job.embeddings.resolve()
    return replace(job, out=job.out.resolve(), source=source, embeddings=embeddings)
