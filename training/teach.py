"""A teacher's image embeddings of whole packs, made once, so that a student can learn them at the cost of its encoder.

A file of them is a float16 array (N, C, h, w) in the order of the packs, the teacher's map averaged to the student's
size, with a JSON beside it that says whose they are and how many are done.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.errors import EmbeddingError, UsageError
from pocketsam.files import staged_file
from pocketsam.labelled import Pack, identity, read_stored
from pocketsam.labels import read_json
from pocketsam.predictor import Predictor

SAVE_EVERY = 50


@dataclass(frozen=True)
class Taught:
    """What a file of embeddings holds.

    Attributes:
        model, weights_sha256: the teacher.
        packs: file names, in order.
        packs_sha256: of those files.
        photos: rows N.
        done: rows that are written.
    """

    model: str
    weights_sha256: str
    packs: tuple[str, ...]
    packs_sha256: tuple[str, ...]
    photos: int
    done: int = 0


def teach(teacher: Predictor, packs: Sequence[Path], out: Path, side: int) -> Taught:
    """Embed every photo of some packs; an interrupted call continues.

    Args:
        teacher: any model in any runtime; its frame must be padded as the student's is, right and bottom.
        packs: tars.
        out: ``.npy`` file.
        side: h = w of the student's embedding, a divisor of the teacher's.

    Raises:
        UsageError: sides that do not divide, or a teacher whose photos lie otherwise.
        EmbeddingError: ``out`` holds another teacher's or other packs' embeddings.
        LabelError: a pack cannot be read.
    """
    size = teacher.spec.embed_size
    if teacher.spec.resize != "pad":
        raise UsageError(f"{teacher.spec.name} squashes photos to a square and the student pads them, so that their "
                         "embeddings do not lie on each other; choose a teacher that pads (`pocketsam models`).")
    if size % side:
        raise UsageError(f"the teacher's embedding has side {size}, which {side} does not divide.")
    photos = 0
    for path in packs:
        with Pack.open(path) as pack:
            photos += len(pack.rows)
    plan = Taught(teacher.spec.name, teacher.weights_sha256, tuple(p.name for p in packs),
                  tuple(map(identity, packs)), photos)
    done = _done(out, plan)
    shape = (photos, teacher.spec.embed_dim, side, side)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not done:
        # A description without its file must not speak of the one that begins.
        _describe(out, plan, 0)
    rows = np.lib.format.open_memmap(out, "r+" if done else "w+", np.float16, shape)
    stored = (x for path in packs for x in read_stored(path))
    for i, photo in enumerate(stored):
        if i < done:
            continue
        features = torch.from_numpy(teacher.embed(photo.decode().image).features["image_embeddings"])
        rows[i] = F.avg_pool2d(features, size // side)[0].numpy()
        if (i + 1) % SAVE_EVERY == 0 or i + 1 == photos:
            rows.flush()
            done = i + 1
            _describe(out, plan, done)
            print(f"{done} of {photos}", flush=True)
    return read_taught(out)


def _describe(out: Path, plan: Taught, done: int) -> None:
    with staged_file(_beside(out)) as staged:
        staged.write_text(json.dumps(asdict(plan) | {"done": done}), encoding="utf-8")


def read_taught(path: Path) -> Taught:
    """The description beside a file of embeddings.

    Raises:
        LabelError: there is none, or it is no JSON.
        EmbeddingError: it does not say what the embeddings were made from.
    """
    values = read_json(_beside(path))
    try:
        lists = {k: tuple(values[k]) for k in ("packs", "packs_sha256")}
        return Taught(**{**values, **lists})
    except (KeyError, TypeError) as e:
        raise EmbeddingError(f"{_beside(path)} does not say which packs {path.name} was made from (an earlier version "
                             "wrote it, or it is damaged); delete both and run teach again.") from e


def open_taught(path: Path, packs: Sequence[Path]) -> Tensor:
    """Map a finished file of embeddings of these packs: float16 (N, C, h, w).

    Raises:
        EmbeddingError: it is unfinished, or was made from other packs or from other bytes of these.
        LabelError: a pack or the description of the embeddings cannot be read.
    """
    taught = read_taught(path)
    names = ", ".join(p.name for p in packs)
    if taught.packs_sha256 != tuple(map(identity, packs)):
        raise EmbeddingError(f"{path} holds embeddings of {', '.join(taught.packs)} as it was then, not of {names} as "
                             "it is now; run teach on it with another --out.")
    if taught.done != taught.photos:
        raise EmbeddingError(f"{path} holds {taught.done} of {taught.photos} photos of {names}; run teach again, which "
                             "continues.")
    return torch.from_numpy(np.lib.format.open_memmap(path, "r+"))


def _beside(out: Path) -> Path:
    return out.with_suffix(".json")


def _done(out: Path, plan: Taught) -> int:
    if not (out.is_file() and _beside(out).is_file()):
        return 0
    found = read_taught(out)
    if found != Taught(**{**asdict(plan), "done": found.done}):
        raise EmbeddingError(f"{out} holds embeddings of {found.model} for {', '.join(found.packs)}, made with other "
                             "weights or from other packs, or from these before they changed; choose another file.")
    return found.done
