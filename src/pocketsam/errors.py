"""Named errors. Each message is one sentence: what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class PocketSamError(Exception):
    """Base class of every error that PocketSAM raises on purpose; the CLI turns it into exit code 2."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is made again from its message alone, which not every child takes.
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[PocketSamError], args: tuple[Any, ...], state: dict[str, Any]) -> PocketSamError:
    """An error that comes from another process."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class MissingDependency(PocketSamError):
    """A runtime or converter that this call needs is not installed here."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: run `pip install 'pocketsam[{extra}]'`.")
        self.package = package
        self.extra = extra


class UnknownName(PocketSamError):
    """A model, format, precision or runtime name that is not in its table."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(names)}."
        super().__init__(f"unknown {kind} {name!r}; {hint}")
        self.name = name
        self.suggestion = near[0] if near else None


class UnsupportedModel(PocketSamError):
    """The model exists but this format or runtime cannot take it."""


class CheckpointError(PocketSamError):
    """A checkpoint file that cannot be read, or that belongs to another model."""


class BundleError(PocketSamError):
    """A bundle that is damaged, incomplete, unsafe or from a newer version."""


class ParityError(PocketSamError):
    """An exported artifact that does not reproduce the PyTorch reference within its gate."""


class PromptError(PocketSamError):
    """Points, labels, boxes or masks that cannot be used on this image."""


class ImageError(PocketSamError):
    """An image that cannot be opened, decoded or used."""


class EmbeddingError(PocketSamError):
    """A stored embedding that belongs to another model or image, or is damaged."""


class OutputError(PocketSamError):
    """An output path that cannot be written."""


class WorkerError(PocketSamError):
    """A worker process of a job died; what it finished stays."""


class LabelError(PocketSamError):
    """Detections, annotations or a labelled pack that cannot be understood."""


class BenchmarkError(PocketSamError):
    """Benchmark results that cannot be read, merged or compared."""


class UsageError(PocketSamError):
    """A combination of arguments that has no meaning."""


def first_line(e: Exception) -> str:
    """What an exception says, short enough for a sentence."""
    text = str(e).strip().splitlines()
    return (text[0] if text else type(e).__name__)[:160].rstrip(".")
