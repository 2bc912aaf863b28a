"""The two verbs of the package: ``load`` and ``export``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketsam import registry
from pocketsam.builtin import BUILTIN_MODEL, checkpoint_for
from pocketsam.bundle import MANIFEST, Bundle, read_bundle
from pocketsam.errors import UsageError
from pocketsam.files import is_there
from pocketsam.predictor import Predictor
from pocketsam.runtime import check_threads

if TYPE_CHECKING:
    from pocketsam.runtime import Runtime


def load(source: str | Path = BUILTIN_MODEL, *, runtime: str = "auto", checkpoint: str | Path | None = None,
         precision: str = "fp32", threads: int | None = None, image_size: int | None = None,
         compute: str | None = None) -> Predictor:
    """Open a bundle, or a model straight from its checkpoint with the PyTorch runtime.

    Args:
        source: a bundle folder, or a model name together with ``checkpoint``; by default the built-in model.
        runtime: ``onnxruntime``, ``openvino``, ``litert``, ``coreml``, ``pytorch``, or ``auto``: the fastest runtime of
            this bundle, measured here once (a few seconds) and remembered.
        checkpoint: official checkpoint file, for ``runtime="pytorch"``; lite0's ships with the package.
        precision: ``fp32``, ``fp16``, ``int8`` (or another recipe that the bundle holds), or ``auto`` to let the
            measurement choose that too; without a bundle ``fp32`` or ``auto``.
        threads: CPU threads; the engine's default when None.
        image_size: input side for a model with ``checkpoint``, instead of its own; a bundle keeps its own.
        compute: what a named runtime computes in or on: OpenVINO ``f32``, ``bf16`` or ``f16``, Core ML a compute unit;
            by default what its environment variable says, then ``f32`` and ``ALL``. Masks differ from those of f32.

    Raises:
        PocketSamError: one of its children, naming what to do.
    """
    threads = check_threads(threads)
    if runtime != "auto":
        registry.check("runtime", runtime)
    name = str(source)
    # A folder may have a model's name; PyTorch takes no bundle.
    is_bundle = is_there(Path(source) / MANIFEST) and not (runtime == "pytorch" and name in registry.MODELS)
    if not is_bundle and (name in registry.MODELS or _looks_like_a_name(source)):
        registry.check("model", name)
        if compute is not None:
            raise UsageError(f"compute={compute!r} goes with a bundle and its runtime; PyTorch computes in fp32.")
        if precision not in ("fp32", "auto"):
            raise UsageError(f"precision {precision!r} goes with a bundle; PyTorch computes in fp32: leave it out, or "
                             "export a bundle that has it.")
        return Predictor(_from_checkpoint(name, runtime, checkpoint, threads, image_size))
    if checkpoint is not None:
        raise UsageError(f"{source} is a bundle path; a checkpoint goes with a model name.")
    return Predictor(open_bundle(read_bundle(source), runtime, precision, threads, compute))


def _looks_like_a_name(source: str | Path) -> bool:
    """A bare word that is no path here: most likely a misspelt model."""
    return not is_there(Path(source)) and Path(source).name == str(source) and "." not in str(source)


def open_bundle(bundle: Bundle, runtime: str = "auto", precision: str = "fp32",
                threads: int | None = None, compute: str | None = None) -> Runtime:
    """Open the artifacts of a bundle in one runtime."""
    threads = check_threads(threads)
    # Some files are opened when they are first asked for, and the program may have changed its folder by then.
    bundle = replace(bundle, root=bundle.root.absolute())
    if compute is not None and runtime not in registry.RUNTIME_OPTIONS:
        raise UsageError(f"compute={compute!r} is for {' and '.join(registry.RUNTIME_OPTIONS)}, and the runtime is "
                         f"{runtime}; name one of them or leave it out.")
    if runtime != "auto" and precision == "auto":
        precision = _only_precision(bundle, runtime)
    if runtime == "auto":
        from pocketsam.tune import choose, tune

        chosen = choose(tune(bundle, threads), None if precision == "auto" else precision)
        runtime, precision = chosen.runtime, chosen.precision
    options = {} if compute is None else {registry.RUNTIME_OPTIONS[runtime]: compute}
    opened: Runtime = registry.load("runtime", runtime).open(bundle, precision=precision, threads=threads, **options)
    return opened


def export(model: str | None = None, *, checkpoint: str | Path | None = None, formats: Sequence[str] = ("onnx",),
           precisions: Sequence[str] = ("fp32",), out: str | Path, slots: int | None = None,
           **options: Any) -> Bundle:
    """Export a model to a bundle; see :func:`pocketsam.export.pipeline.export_bundle` for the options.

    Args:
        model: registry name; when left out, what the checkpoint holds, and without one the built-in model.

    Raises:
        ParityError: an artifact differs from the PyTorch reference by more than its gate. Nothing is written if it is a
            float one; else everything but the int8 pairs that miss theirs or that a format's tool refuses.
    """
    from pocketsam.errors import MissingDependency

    for name in formats:
        registry.check("format", name)
    if model is not None:
        registry.check("model", model)
    try:
        run = registry.entry("pocketsam.export.pipeline:export_bundle")
    except ModuleNotFoundError as e:
        raise MissingDependency(str(e.name), "export", "exporting") from e
    if slots is not None:
        options["slots"] = slots
    if model is None:
        model = BUILTIN_MODEL if checkpoint is None else recognised(checkpoint)
    bundle: Bundle = run(model, checkpoint=checkpoint_for(model, checkpoint), formats=list(formats),
                         precisions=list(precisions), out=Path(out), **options)
    return bundle


def recognised(checkpoint: str | Path) -> str:
    """The model that a checkpoint file holds.

    Raises:
        CheckpointError: unreadable, or no model that is known here.
    """
    name: str = registry.entry("pocketsam.models.loading:recognise")(Path(checkpoint))
    return name


def _from_checkpoint(model: str, runtime: str, checkpoint: str | Path | None, threads: int | None,
                     image_size: int | None) -> Runtime:
    if runtime not in ("auto", "pytorch"):
        raise UsageError(f"a checkpoint runs on the pytorch runtime only, not on {runtime}; export a bundle for it.")
    opened: Runtime = registry.load("runtime", "pytorch").from_checkpoint(
        model, checkpoint_for(model, checkpoint), threads=threads, image_size=image_size)
    return opened


def _only_precision(bundle: Bundle, runtime: str) -> str:
    """The most accurate precision that the bundle holds for a runtime."""
    format_ = registry.RUNTIME_FORMATS.get(registry.check("runtime", runtime))
    held = {a.precision for a in bundle.artifacts if a.format == format_}
    return next((p for p in ("fp32", "fp16", *registry.RECIPES) if p in held), "fp32")
