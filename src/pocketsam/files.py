"""Writing without half-written results: everything is staged beside its target and renamed when complete."""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from pocketsam.errors import OutputError

# What a place says that takes no more, whoever writes to it.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# Characters of a file's name that its temporary name repeats: names have at most 255 bytes.
SHOWN = 32


@contextmanager
def output_errors(path: Path, only: Sequence[int] = ()) -> Iterator[None]:
    """Turn an OSError while writing ``path`` into one sentence.

    Args:
        only: error numbers that are meant; all when empty.
    """
    try:
        yield
    except OSError as e:
        if only and e.errno not in only:
            raise
        reason = e.strerror or str(e)
        raise OutputError(f"cannot write {path} ({reason}); nothing was kept: choose another place or free some "
                          "space.") from e


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path`` that replaces it on success and vanishes on failure.

    Raises:
        OutputError: the place cannot be written, or is a device or a pipe, which a file would replace.
    """
    with output_errors(path):
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not by tempfile, whose files nobody else may read; made here, they have the rights of any other file.
        staged = path.parent / f".{path.stem[:SHOWN]}.{secrets.token_hex(8)}{path.suffix}"
        os.close(os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield staged
            staged.replace(path)
        finally:
            with suppress(FileNotFoundError):
                staged.unlink()


def check_writable(path: Path) -> None:
    """For results that take long: see beforehand that a file can be written; nothing is.

    Raises:
        OutputError: as far as can be told, the place cannot be written.
    """
    with output_errors(path):
        _check_replaceable(path)
        nearest = next((p for p in path.absolute().parents if p.exists()), None)
        if nearest is None:
            raise OutputError(f"cannot write {path}, whose drive does not exist; choose another place.")
        if not nearest.is_dir():
            raise OutputError(f"cannot write {path}, as {nearest} is no folder; choose another place.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {path}, as nothing can be written into {nearest}; choose another place.")


def _check_replaceable(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {path}, which is {'a folder' if path.is_dir() else 'no regular file'}; choose "
                          "another place.")


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place on success and vanishes on failure.

    A link is followed; whatever goes wrong, either the old folder or the new one is there.

    Raises:
        OutputError: the place cannot be written, or is a mount point, which cannot be replaced.
    """
    with output_errors(path):
        path = path.resolve()
        # Path.is_mount does not exist on Windows before Python 3.12.
        if os.path.ismount(path):
            raise OutputError(f"cannot write {path}, which is a mount point; choose a folder inside it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.parent / f".{path.name[:SHOWN]}.{secrets.token_hex(8)}.partial"
        staging.mkdir()
    try:
        with output_errors(path, REFUSALS):
            yield staging
        with output_errors(path):
            _replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, path: Path) -> None:
    """Rename a folder over another, which comes back if that fails or is interrupted."""
    old = staging.with_suffix(".old")
    try:
        if path.exists():
            path.rename(old)
        staging.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_path(path: Path) -> str:
    """Hex sha256 of a file, or of a folder: over the sorted relative names and hashes of its files.

    Raises:
        OSError: something cannot be read.
        ValueError: the folder holds a symbolic link, which could lead anywhere.
    """
    if not path.is_dir():
        return sha256_file(path)
    digest = hashlib.sha256()
    for name, file in sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*")):
        if file.is_symlink():
            raise ValueError(f"{file} is a symbolic link")
        if file.is_file() and not is_litter(file.name):
            digest.update(f"{name}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def is_litter(name: str) -> bool:
    """Whether a file is one that macOS leaves beside others, which belongs to nothing here."""
    return name.startswith("._") or name == ".DS_Store"


def is_there(path: Path) -> bool:
    """Whether a path exists and may be looked at; a name that is no path is not there."""
    try:
        return path.exists()
    except OSError:
        return False


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not is_litter(p.name))


_caches: ContextVar[Path | None] = ContextVar("caches", default=None)


@contextmanager
def caches_in(folder: Path) -> Iterator[None]:
    """Keep what is compiled meanwhile in a folder that goes away: trials would stay in the user's cache for ever."""
    token = _caches.set(folder)
    try:
        yield
    finally:
        _caches.reset(token)


def cache_root() -> Path:
    """``$POCKETSAM_CACHE``, else ``$XDG_CACHE_HOME/pocketsam``, else ``~/.cache/pocketsam``; for a user without a home,
    as in some containers, a folder of its own among the temporary ones.
    """
    if (folder := _caches.get()) is not None:
        return folder
    if own := os.environ.get("POCKETSAM_CACHE"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "pocketsam"
    try:
        return Path.home() / ".cache" / "pocketsam"
    except RuntimeError:
        return _private_folder()


@cache
def _private_folder() -> Path:
    """A new folder, because one with a name that others can guess may be theirs; gone at the end."""
    folder = tempfile.TemporaryDirectory(prefix="pocketsam-")
    atexit.register(folder.cleanup)
    return Path(folder.name)
