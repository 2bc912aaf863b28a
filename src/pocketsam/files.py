"""Writing without half-written results: everything is staged beside its target and renamed when complete."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pocketsam.errors import OutputError


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn any OSError while writing ``path`` into one sentence."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or str(e)
        raise OutputError(f"cannot write {path} ({reason}); nothing was kept: choose another place or free some "
                          "space.") from e


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path`` that replaces it on success and vanishes on failure."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(path)
        finally:
            with suppress(FileNotFoundError):
                Path(name).unlink()


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place on success and vanishes on failure."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        old = staging.with_suffix(".old")
        try:
            yield staging
            staging.chmod(0o777 & ~_umask())
            if path.exists():
                path.rename(old)
            try:
                staging.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
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
        if file.is_file():
            digest.update(f"{name}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def cache_root() -> Path:
    """``$POCKETSAM_CACHE``, else ``$XDG_CACHE_HOME/pocketsam``, else ``~/.cache/pocketsam``."""
    if own := os.environ.get("POCKETSAM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocketsam"
