"""Measuring every artifact of a bundle again, against the PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pocketsam.api import open_bundle
from pocketsam.bundle import Bundle
from pocketsam.clicks import has_click_graphs
from pocketsam.errors import CheckpointError, PocketSamError
from pocketsam.images import Rgb
from pocketsam.parity import GATES, compare, compare_clicks
from pocketsam.predictor import Predictor
from pocketsam.registry import RUNTIME_FORMATS


@dataclass(frozen=True)
class Row:
    """One format and precision: agreement with PyTorch, or the reason why there is none.

    Attributes:
        passed: the mean mask agreement reaches the gate.
        problem: empty, or why the artifact could not be measured.
        measured: :meth:`pocketsam.parity.Agreement.summary`, or empty; under ``clicks`` that of the click graphs, if
            there are any.
    """

    format: str
    precision: str
    runtime: str
    gate: float
    passed: bool
    problem: str
    measured: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(bundle: Bundle, reference: Predictor, images: Sequence[Rgb], seed: int = 0,
           report: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Run each pair of artifacts on images and seeded prompts.

    Args:
        images: uint8 (H, W, 3) RGB.

    Raises:
        CheckpointError: the reference has other weights than the bundle.
    """
    if reference.weights_sha256 != bundle.weights_sha256:
        raise CheckpointError(f"{bundle.root} was exported from other weights than the checkpoint given; "
                              "pass the checkpoint that it was made from.")
    rows = []
    for format_, precision in sorted({(a.format, a.precision) for a in bundle.artifacts}):
        report(f"measuring {format_} {precision} on {len(images)} images")
        rows.append(_row(bundle, reference, images, seed, format_, precision))
    return rows


def _row(bundle: Bundle, reference: Predictor, images: Sequence[Rgb], seed: int, format_: str, precision: str) -> Row:
    runtime = next((r for r, f in RUNTIME_FORMATS.items() if f == format_), "")
    made = bundle.find(format_, precision, "encoder").measured
    gate = float(made.get("gate", GATES.get(precision, GATES["fp32"])))
    try:
        candidate = Predictor(open_bundle(bundle, runtime, precision))
        measured = compare(reference, candidate, images, seed).summary()
        means = [measured["all"]["mean"]]
        if has_click_graphs(candidate.runtime):
            measured["clicks"] = compare_clicks(reference, candidate, images).summary()
            means.append(measured["clicks"]["all"]["mean"])
    except PocketSamError as e:
        return Row(format_, precision, runtime, gate, False, str(e), {})
    return Row(format_, precision, runtime, gate, all(m >= gate for m in means), "", measured)
