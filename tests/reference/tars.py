"""Uncompressed tar files for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write the members in their order; returns the path."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_tar(path: Path) -> dict[str, bytes]:
    """The members by name, in their order."""
    with tarfile.open(path) as tar:
        return {m.name: stream.read() for m in tar if (stream := tar.extractfile(m)) is not None}
