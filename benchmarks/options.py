"""What a benchmark is asked to measure, and whether it can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pocketsam.benchmarks.latency import Plan, is_timed
from pocketsam.benchmarks.targets import Target
from pocketsam.bundle import Bundle
from pocketsam.doctor import machine
from pocketsam.errors import BenchmarkError, UnknownName, UsageError
from pocketsam.registry import OPENVINO_PRECISIONS


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        threads: CPU threads, one set of rows for each.
        plan: rounds and calls.
        checkpoint: of the PyTorch reference; the built-in model needs none.
        against: a runtime that ratios of the same thread count are taken to as well, or empty.
        data: labelled pack or COCO folder for accuracy; without, the agreement measured at export stands.
        images, prompts, regions: size of the accuracy part.
        compiled: measure torch.compile too.
        operators: profile the operators of each runtime.
        device: name of this device in reports.
        rivals: further targets, measured in the same rounds.
        computes: what OpenVINO computes in besides f32: ``bf16``, ``f16``.
        photos: for the agreement of those, where ``data`` gives none.
    """

    threads: tuple[int, ...] = ()
    plan: Plan = field(default_factory=Plan)
    checkpoint: str = ""
    against: str = ""
    data: Path | None = None
    images: int = 60
    prompts: int = 8
    regions: int = 16
    compiled: bool = False
    operators: bool = True
    device: str = ""
    rivals: tuple[Target, ...] = ()
    computes: tuple[str, ...] = ()
    photos: int = 3


def check_threads(threads: tuple[int, ...]) -> tuple[int, ...]:
    """All cores when none is given.

    Raises:
        BenchmarkError: fewer than 1, or more than this process may use.
    """
    cores = int(machine()["cores"])
    for count in threads:
        if not 1 <= count <= cores:
            raise BenchmarkError(f"threads is {count}; expected 1 to {cores}, the cores of this machine.")
    return tuple(dict.fromkeys(threads)) or (cores,)


def check_counts(options: Options) -> None:
    """Every number of things to measure.

    Raises:
        UsageError: one is below its least.
    """
    # Half of the prompts are boxes, half are points.
    for name, value, least in (("rounds", options.plan.rounds, 1), ("images", options.images, 1),
                               ("prompts", options.prompts, 2), ("regions", options.regions, 1),
                               ("photos", options.photos, 1)):
        if value < least:
            raise UsageError(f"{name} is {value}; expected at least {least}.")


def check_computes(computes: tuple[str, ...], bundle: Bundle) -> tuple[str, ...]:
    """What OpenVINO may be asked to compute in.

    Raises:
        UnknownName: something else.
        BenchmarkError: the bundle has no file of OpenVINO.
    """
    for compute in computes:
        if compute not in OPENVINO_PRECISIONS:
            raise UnknownName("inference precision", compute, OPENVINO_PRECISIONS)
    if computes and "openvino" not in bundle.formats():
        raise BenchmarkError(f"only OpenVINO can be asked to compute in {' and '.join(computes)}, and {bundle.root} "
                             "holds no file for it; export it with --to openvino.")
    return computes


def check_against(runtime: str, targets: Sequence[Target], bundle: Bundle) -> None:
    """A runtime that ratios are taken to.

    Raises:
        BenchmarkError: the bundle has no file for it, or it is not timed here.
    """
    found = [t for t in targets if t.runtime == runtime]
    timed = ", ".join(sorted({t.runtime for t in targets if is_timed(t)}))
    if not found:
        raise BenchmarkError(f"no {runtime} in {bundle.root} to compare against; it has {timed}.")
    if not any(is_timed(t) for t in found):
        raise BenchmarkError(f"{runtime} is not timed on this machine, so nothing can be compared against it; "
                             f"expected one of {timed}.")
