"""Segmenting folders: resumable, over processes, one finished file per photo.

    OUT/job.json             settings, model and runtime; another job's folder is refused
    OUT/labels/<photo>.json  SA-1B style; written last and names the sha256 of its photo, so that it means: done
    OUT/overlays/<photo>.png
    OUT/coco.json            all photos (with shards: coco-00000-of-00003.json, ...)
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pocketsam.embedding import Embedding, load_embedding
from pocketsam.errors import EmbeddingError, ImageError, LabelError, OutputError, UsageError, WorkerError
from pocketsam.everything import Settings, segment_everything
from pocketsam.files import output_errors, sha256_file
from pocketsam.images import Rgb, image_id, load_photo
from pocketsam.labels import (
    COCO_FILE,
    is_whole,
    join_labels,
    overlay,
    read_json,
    sa1b,
    save_overlay,
    stem_of,
    write_json,
)
from pocketsam.predictor import Predictor
from pocketsam.registry import RUNTIME_OPTIONS

LABELS, OVERLAYS, JOB = "labels", "overlays", "job.json"


@dataclass(frozen=True)
class Job:
    """What to do with every photo; picklable, so that it travels to workers.

    Attributes:
        out: output folder.
        settings: how to segment.
        source: bundle folder or model name, as for :func:`pocketsam.load`.
        runtime, precision, threads: as for :func:`pocketsam.load`.
        overlays: whether to draw overlay pictures.
        embeddings: folder that keeps embeddings between runs, or None.
    """

    out: Path
    settings: Settings
    source: str
    runtime: str = "auto"
    precision: str = "fp32"
    threads: int | None = None
    overlays: bool = True
    embeddings: Path | None = None

    def open(self) -> Predictor:
        from pocketsam.api import load

        return load(self.source, runtime=self.runtime, precision=self.precision, threads=self.threads)

    def label(self, photo: Path) -> Path:
        """The label file of a photo; the whole file name is kept, so ``a.jpg`` and ``a.png`` do not collide."""
        return self.out / LABELS / f"{stem_of(photo.name)}.json"

    def overlay(self, photo: Path) -> Path:
        """The overlay picture of a photo."""
        return self.out / OVERLAYS / f"{stem_of(photo.name)}.png"

    def holds(self, photo: Path) -> bool:
        """Whether a photo is done: it is labelled, and its overlay is there if one is wanted."""
        return (not self.overlays or self.overlay(photo).is_file()) and self.labelled(photo) is not None

    def labelled(self, photo: Path) -> dict[str, Any] | None:
        """The label of a photo, if it is there, whole, and was made from the same bytes."""
        label = self.label(photo)
        if not label.is_file():
            return None
        try:
            data: dict[str, Any] = read_json(label)
            return data if data["image"]["file_sha256"] == sha256_file(photo) and is_whole(data) else None
        except (LabelError, OSError, KeyError, TypeError):
            # A damaged label is made again; a photo that cannot be read is named when its turn comes.
            return None


@dataclass(frozen=True)
class Done:
    """The outcome of one photo: number of masks and seconds, or the problem in one sentence."""

    photo: str
    masks: int = 0
    seconds: float = 0.0
    problem: str = ""


Report = Callable[[Done, int, int], None]


def prepare(job: Job, sam: Predictor, photos: Sequence[Path]) -> list[Path]:
    """Make the output folder, or check that it holds the same job, and return the photos still to do.

    Args:
        sam: the predictor that the job opens.

    Raises:
        LabelError: the folder's ``job.json`` is damaged.
        OutputError: the folder cannot be written.
        UsageError: it holds the results of other settings, or of another model, input side, precision or runtime, or
            labels that are no job's.
    """
    path, facts = job.out / JOB, _facts(job, sam)
    if path.is_file():
        _check_same(job.out, read_json(path), facts)
    else:
        _check_unused(job.out)
        write_json(facts, path)
    with output_errors(job.out):
        (job.out / LABELS).mkdir(exist_ok=True)
    return [p for p in photos if not job.holds(p)]


def _check_unused(out: Path) -> None:
    """Raise UsageError if a folder without a job holds files that would be replaced, a dataset's own perhaps."""
    with output_errors(out):
        held = [p for p in out.iterdir() if COCO_FILE.fullmatch(p.name)] if out.is_dir() else []
        held += (out / LABELS).glob("*.json")
    if held:
        raise UsageError(f"{out} holds {held[0].relative_to(out)} and no {JOB}, so no job of PocketSAM made it; choose "
                         "another folder.")


def _facts(job: Job, sam: Predictor) -> dict[str, Any]:
    """All that masks depend on, photos apart; the runtime is the one that ``auto`` chose."""
    info = sam.info()
    return {"settings": {k: v for k, v in job.settings.to_json().items() if k != "batch"},
            "weights_sha256": sam.weights_sha256, "image_size": sam.spec.image_size, "precision": info["precision"],
            "runtime": info["runtime"], "compute": _compute(info), "artifacts_sha256": info.get("artifacts_sha256")}


def _compute(info: dict[str, Any]) -> Any:
    return info.get(RUNTIME_OPTIONS.get(info["runtime"], ""))


def _check_same(out: Path, held: Any, facts: dict[str, Any]) -> None:
    if held == facts:
        return
    held = held if isinstance(held, dict) else {}
    other = ", ".join(k if k in ("settings", "weights_sha256", "artifacts_sha256") else f"{k} {held.get(k)} and now {v}"
                      for k, v in facts.items() if held.get(k) != v)
    raise UsageError(f"{out} holds masks made with other settings or another model or runtime ({other}); ask for the "
                     "same again, choose another folder or delete it.")


def segment_photo(sam: Predictor, photo: Path, job: Job) -> Done:
    """Segment one photo and write its files, the label last; an unreadable photo is an outcome, not an error.

    Raises:
        OutputError: the output folder is full or not writable.
    """
    started = time.perf_counter()
    try:
        rgb, file_sha256 = load_photo(photo)
    except ImageError as e:
        _forget(job, photo)
        return Done(photo.name, problem=str(e))
    if job.overlays and (known := job.labelled(photo)) is not None:
        save_overlay(overlay(rgb, known["annotations"]), job.overlay(photo))
        return Done(photo.name, len(known["annotations"]), time.perf_counter() - started)
    records = segment_everything(sam, rgb, job.settings, lambda part: embed(sam, part, job.embeddings))
    data = sa1b(records, photo.name, rgb.shape[0], rgb.shape[1], _number(photo.name))
    data["image"]["file_sha256"] = file_sha256
    if job.overlays:
        save_overlay(overlay(rgb, data["annotations"]), job.overlay(photo))
    else:
        _forget(job, photo)
    write_json(data, job.label(photo))
    return Done(photo.name, len(records), time.perf_counter() - started)


def _forget(job: Job, photo: Path) -> None:
    """Remove what an earlier photo of this name left, the label first: it would call the overlay done."""
    for path in (job.label(photo), job.overlay(photo)):
        with output_errors(path):
            path.unlink(missing_ok=True)


def embed(sam: Predictor, rgb: Rgb, folder: Path | None) -> Embedding:
    """Embed a photo, or read its embedding if the same encoder already made it: its file's name tells by what."""
    if folder is None:
        return sam.embed(rgb)
    info = sam.info()
    made_by = [sam.weights_sha256, sam.spec.image_size, info["runtime"], info["precision"], _compute(info),
               info.get("artifacts_sha256")]
    maker = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()
    path = folder / f"{image_id(rgb)[:32]}-{maker[:12]}.npz"
    if path.is_file():
        # A damaged file in a cache is made again; saving replaces it.
        with suppress(EmbeddingError):
            return load_embedding(path, sam.spec, sam.weights_sha256)
    made = sam.embed(rgb)
    made.save(path)
    return made


def run(job: Job, photos: Sequence[Path], workers: int = 1, report: Report = lambda done, n, total: None,
        sam: Predictor | None = None) -> list[Done]:
    """Segment all photos that are not done yet.

    Args:
        workers: processes; each opens the model with ``job.threads`` threads.
        report: called after each photo with its outcome, how many are finished, and how many there are to do.
        sam: an open predictor for one worker.

    Raises:
        OutputError: the output folder is full or not writable; what is finished stays, and a new run goes on.
        WorkerError: a worker process died; a new run goes on.
    """
    outcomes: list[Done] = []
    # Closing the stream on an error is what cancels the photos that wait in the pool.
    with closing(_in_processes(job, photos, workers) if workers > 1 else _here(job, photos, sam)) as stream:
        for done in stream:
            outcomes.append(done)
            report(done, len(outcomes), len(photos))
    return outcomes


def finish(job: Job, shard: int | None = None) -> list[Path]:
    """COCO files of all finished photos, those of earlier runs included: :func:`pocketsam.labels.join_labels`."""
    return join_labels(job.out / LABELS, job.out, shard)


def _here(job: Job, photos: Sequence[Path], sam: Predictor | None) -> Generator[Done, None, None]:
    sam = sam or job.open()
    for photo in photos:
        yield segment_photo(sam, photo, job)


_worker: tuple[Predictor, Job] | None = None


def _start(job: Job) -> None:
    global _worker
    _worker = job.open(), job


def _work(photo: Path) -> Done:
    assert _worker is not None
    return segment_photo(_worker[0], photo, _worker[1])


def _in_processes(job: Job, photos: Sequence[Path], workers: int) -> Generator[Done, None, None]:
    """Spawned, not forked: engines keep threads that a fork would lose."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(job,))
    try:
        for future in as_completed([pool.submit(_work, p) for p in photos]):
            yield future.result()
    except BrokenProcessPool as e:
        raise WorkerError("a worker process ended early (killed, or out of memory); run the same command again to go "
                          "on, with fewer workers if memory was short.") from e
    finally:
        pool.shutdown(cancel_futures=True)


def _number(name: str) -> int:
    """A stable image id of 32 bits from the file name, the same in every run and on every machine."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest()[:8], 16)


def check_output(out: Path) -> None:
    """Raises OutputError if the output path is a file."""
    with output_errors(out):
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file; pass a folder to -o.")
