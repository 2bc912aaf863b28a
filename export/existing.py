"""What an earlier export left in the place of a new bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pocketsam.bundle import MANIFEST, Artifact, Bundle, read_bundle
from pocketsam.errors import BundleError, OutputError
from pocketsam.files import sha256_path, size_of
from pocketsam.specs import ModelSpec


def existing(out: Path) -> Bundle | None:
    """The bundle that is already there; refuses to replace a folder that is anything else, or an unwritable place."""
    parent = next(p for p in (out.parent, *out.parent.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write {out}: {parent} is not a writable folder; choose another place.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        return read_bundle(out)
    except BundleError as e:
        # Whatever it is, it may be all that someone has.
        raise OutputError(f"{out} exists and is not a bundle that can be extended ({e}); choose another folder or "
                          "remove it.") from e


def standing(out: Path) -> bytes | None:
    """What tells whether a place was changed meanwhile: its manifest, b"" for anything else, None for nothing."""
    try:
        return (out / MANIFEST).read_bytes()
    except OSError:
        return b"" if out.exists() and not (out.is_dir() and not any(out.iterdir())) else None


def check_same(old: Bundle | None, spec: ModelSpec, sha256: str, slots: int) -> None:
    """Refuse to replace a bundle of something else, which may be hours of work."""
    if old is None:
        return
    for what, held, wanted in (("the model", old.spec.name, spec.name),
                               ("input side", old.spec.image_size, spec.image_size), ("prompt slots", old.slots, slots),
                               ("weights", old.weights_sha256[:12], sha256[:12])):
        if held != wanted:
            raise OutputError(f"{old.root} holds a bundle with {what} {held}, not {wanted}; choose another folder or "
                              "remove it.")


def bring(old: Bundle, row: Artifact, root: Path) -> Artifact | None:
    """Bring an artifact of the old bundle over; None if its file is no longer intact.

    A file that this export made anew from the same weights stays, and the row describes it: int8 rows share files of
    fp32, and converters need not write the same bytes twice.
    """
    path = root / row.path
    if path.exists():
        return replace(row, sha256=sha256_path(path), bytes=size_of(path))
    try:
        source = old.file(row)
    except BundleError:
        return None
    path.parent.mkdir(exist_ok=True, parents=True)
    if source.is_dir():
        shutil.copytree(source, path)
    else:
        shutil.copyfile(source, path)
    return row


def carry_over(kept: list[Artifact], rows: list[Artifact], old: Bundle | None, staging: Path,
                remade: Sequence[str]) -> list[Artifact]:
    """Artifacts of other formats and precisions that the existing bundle holds for the same weights.

    Raises:
        OutputError: one of them is damaged; without it the bundle would hold half a pair.
    """
    if old is None:
        return []
    made = {(r.path, r.precision) for r in rows}
    formats = {r.format for r in rows}
    wanted = [a for a in kept if (a.path, a.precision) not in made
              and not (a.precision in remade and a.format in formats)]
    brought = []
    for a in wanted:
        if (row := bring(old, a, staging)) is None:
            raise OutputError(f"{a.path} of {old.root} is missing or damaged and would be lost; export {a.format} "
                              f"{a.precision} anew in the same command, or choose another folder.")
        brought.append(row)
    return brought
