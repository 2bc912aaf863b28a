"""What is measured: one runtime, precision and thread count of a bundle, or a PyTorch reference, or anything opened by
a function ``module:name`` that returns a runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pocketsam import registry
from pocketsam.api import load
from pocketsam.bundle import Bundle
from pocketsam.runtime import Runtime

EVALUATOR_NOTE = "the Core ML evaluator proves masks and says nothing of speed"


@dataclass(frozen=True)
class Target:
    """One row of a benchmark.

    Attributes:
        runtime, precision, threads: what is opened; a name of its own for a rival.
        format: of the artifacts, empty for a reference.
        source: bundle folder or model name.
        checkpoint: for PyTorch, empty for the built-in model.
        image_size: for PyTorch, the bundle's input side.
        factory: ``module:name`` of a function that takes the target and returns a runtime; empty for our own.
        reference: ratios may be taken to it.
        compute: what OpenVINO computes in where that is not f32: ``bf16`` or ``f16``.
    """

    runtime: str
    precision: str
    threads: int
    format: str = ""
    source: str = ""
    checkpoint: str = ""
    image_size: int | None = None
    factory: str = ""
    reference: bool = False
    compute: str = ""

    @property
    def label(self) -> str:
        """E.g. ``openvino fp16 in bf16, 2 threads``."""
        kind = described(self.precision, self.compute)
        return f"{self.runtime} {kind}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def described(precision: str, compute: str) -> str:
    """Precision of the files, and what they are computed in where a user must ask for it."""
    return f"{precision} in {compute}" if compute else precision


def targets_of(bundle: Bundle, threads: list[int], checkpoint: str, compiled: bool = False,
               computes: Sequence[str] = ()) -> list[Target]:
    """PyTorch eager (and compiled, if asked for) and every artifact pair of a bundle, for each thread count.

    Args:
        computes: what OpenVINO's smallest float files and its int8 files are computed in as well.
    """
    found = []
    pairs = sorted({(a.format, a.precision) for a in bundle.artifacts}, key=_order)
    steered = _in_openvino(os.environ.get(registry.RUNTIME_VARIABLES["openvino"], ""))
    for count in threads:
        eager = Target("pytorch", "fp32", count, source=bundle.spec.name, checkpoint=checkpoint,
                       image_size=bundle.spec.image_size, reference=True)
        found.append(eager)
        if compiled:
            found.append(Target("torch.compile", "fp32", count, source=eager.source, checkpoint=checkpoint,
                                image_size=eager.image_size, factory="pocketsam.benchmarks.targets:compiled"))
        found += [Target(r, p, count, f, str(bundle.root), compute=steered if r == "openvino" else "")
                  for r, f in registry.RUNTIME_FORMATS.items() for g, p in pairs if g == f]
        held = [p for f, p in pairs if f == "openvino"]
        floats, rest = [p for p in held if p.startswith("fp")], [p for p in held if not p.startswith("fp")]
        found += [Target("openvino", p, count, "openvino", str(bundle.root), compute=_in_openvino(c))
                  for c in computes for p in (*floats[-1:], *rest)]
    return list(dict.fromkeys(found))


def target_of(bundle: Bundle, row: dict[str, Any], threads: int | None = None) -> Target:
    """What a row of a result measured, in other threads if asked."""
    return Target(row["runtime"], row["precision"], threads or row["threads"], row["format"], str(bundle.root),
                  compute=row.get("compute", ""))


def open_target(target: Target) -> Runtime:
    """Open what a target names.

    Raises:
        PocketSamError: it is not installed, missing or damaged.
    """
    if target.factory:
        opened: Runtime = registry.entry(target.factory)(target)
        return opened
    if target.format:
        # Said even where it is f32: a variable of the user's could ask for something else.
        compute = target.compute or "f32" if target.runtime == "openvino" else None
        return load(target.source, runtime=target.runtime, precision=target.precision, threads=target.threads,
                    compute=compute).runtime
    return _pytorch(target)


def compiled(target: Target) -> Runtime:
    """PyTorch with ``torch.compile`` on both halves; the first call compiles."""
    import torch

    engine: Any = _pytorch(target)
    engine.model.image_encoder = torch.compile(engine.model.image_encoder)
    engine.model.decode = torch.compile(engine.model.decode)
    opened: Runtime = engine
    return opened


def _pytorch(target: Target) -> Runtime:
    return load(target.source, runtime="pytorch", checkpoint=target.checkpoint or None, threads=target.threads,
                image_size=target.image_size).runtime


def _in_openvino(compute: str) -> str:
    """Empty for what OpenVINO computes in here unless asked otherwise."""
    return "" if compute == "f32" else compute


def _order(pair: tuple[str, str]) -> tuple[str, int]:
    return pair[0], ("fp32", "fp16", "int8").index(pair[1]) if pair[1] in ("fp32", "fp16", "int8") else 3
