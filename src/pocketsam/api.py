"""The two verbs of the package: ``load`` and ``export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketsam import registry
from pocketsam.bundle import Bundle, read_bundle
from pocketsam.errors import BundleError, UnknownName, UsageError
from pocketsam.predictor import Predictor

if TYPE_CHECKING:
    from pocketsam.runtime import Runtime


def load(source: str | Path, *, runtime: str = "auto", checkpoint: str | Path | None = None,
         precision: str = "fp32", threads: int | None = None) -> Predictor:
    """Open a bundle, or a model straight from its checkpoint with the PyTorch runtime.

    Args:
        source: a bundle folder, or a model name together with ``checkpoint``.
        runtime: ``onnxruntime``, ``pytorch``, or ``auto`` for a runtime of this bundle that is installed.
        checkpoint: official checkpoint file, for ``runtime="pytorch"``.
        precision: ``fp32``.
        threads: CPU threads; the engine's default when None.

    Raises:
        PocketSamError: one of its children, naming what to do.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; expected at least 1.")
    if runtime != "auto":
        registry.check("runtime", runtime)
    if checkpoint is not None or (runtime == "pytorch" and not Path(source).is_dir()):
        return Predictor(_from_checkpoint(str(source), runtime, checkpoint, threads))
    if not Path(source).exists() and str(source) in registry.MODELS:
        raise UsageError(f"{source} is a model name; pass its checkpoint, or the folder of an exported bundle.")
    if not Path(source).exists() and Path(source).name == str(source) and "." not in str(source):
        raise UnknownName("bundle or model", str(source), registry.MODELS)
    return Predictor(open_bundle(read_bundle(source), runtime, precision, threads))


def open_bundle(bundle: Bundle, runtime: str = "auto", precision: str = "fp32",
                threads: int | None = None) -> Runtime:
    """Open the artifacts of a bundle in one runtime."""
    if runtime == "auto":
        runtime = _installed_runtime(bundle)
    opened: Runtime = registry.load("runtime", runtime).open(bundle, precision=precision, threads=threads)
    return opened


def export(model: str, *, checkpoint: str | Path, formats: Sequence[str] = ("onnx",),
           precisions: Sequence[str] = ("fp32",), out: str | Path, slots: int | None = None,
           **options: Any) -> Bundle:
    """Export a model to a bundle; see :func:`pocketsam.export.pipeline.export_bundle` for the options.

    Raises:
        ParityError: an artifact differs from the PyTorch reference by more than its gate; nothing is written.
    """
    from pocketsam.errors import MissingDependency

    for name in formats:
        registry.check("format", name)
    registry.check("model", model)
    try:
        run = registry.entry("pocketsam.export.pipeline:export_bundle")
    except ModuleNotFoundError as e:
        raise MissingDependency(str(e.name), "export", "exporting") from e
    if slots is not None:
        options["slots"] = slots
    bundle: Bundle = run(model, checkpoint=Path(checkpoint), formats=list(formats), precisions=list(precisions),
                         out=Path(out), **options)
    return bundle


def _from_checkpoint(model: str, runtime: str, checkpoint: str | Path | None, threads: int | None) -> Runtime:
    if runtime not in ("auto", "pytorch"):
        raise UsageError(f"a checkpoint runs on the pytorch runtime only, not on {runtime}; export a bundle for it.")
    registry.check("model", model)
    if checkpoint is None:
        raise UsageError(f"the pytorch runtime needs the checkpoint of {model}; pass checkpoint=FILE.")
    opened: Runtime = registry.load("runtime", "pytorch").from_checkpoint(model, Path(checkpoint), threads=threads)
    return opened


def _installed_runtime(bundle: Bundle) -> str:
    from importlib.util import find_spec

    fitting = [r for r, f in registry.RUNTIME_FORMATS.items() if f in bundle.formats()]
    for name in fitting:
        if find_spec(registry.RUNTIME_PACKAGES[name].module) is not None:
            return name
    if not fitting:
        raise BundleError(f"{bundle.root} holds {', '.join(bundle.formats()) or 'no artifacts'}, which no runtime "
                          "of this version executes.")
    raise registry.missing_runtime(fitting[0])
