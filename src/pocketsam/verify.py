"""Measuring every artifact of a bundle again, against the PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pocketsam.api import open_bundle
from pocketsam.bundle import Bundle
from pocketsam.clicks import has_click_graphs
from pocketsam.errors import BundleError, PocketSamError
from pocketsam.images import Rgb
from pocketsam.parity import GATES, compare, compare_clicks
from pocketsam.predictor import Predictor
from pocketsam.registry import RECIPES, RUNTIME_FORMATS
from pocketsam.specs import CLICK_GRAPHS


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
        BundleError: there is nothing to measure.
        CheckpointError: the reference has other weights than the bundle.
    """
    if not bundle.artifacts:
        raise BundleError(f"{bundle.root} holds no artifact; export one with --to.")
    bundle.check_weights(reference.weights_sha256)
    rows = []
    for format_, precision in sorted({(a.format, a.precision) for a in bundle.artifacts}):
        report(f"measuring {format_} {precision} on {len(images)} images")
        rows.append(_row(bundle, reference, images, seed, format_, precision))
    return rows


def _row(bundle: Bundle, reference: Predictor, images: Sequence[Rgb], seed: int, format_: str, precision: str) -> Row:
    runtime = next((r for r, f in RUNTIME_FORMATS.items() if f == format_), "")
    gate = GATES.get(precision, GATES["fp32"])
    try:
        gate = float(bundle.find(format_, precision, "encoder").measured.get("gate", gate))
        candidate = Predictor(open_bundle(bundle, runtime, precision))
        measured = compare(reference, candidate, images, seed).summary()
        means = [measured["all"]["mean"]]
        if has_click_graphs(candidate.runtime):
            measured["clicks"] = compare_clicks(reference, candidate, images).summary()
            # Those of int8 are the files of fp32: what the encoder's 8 bits do is judged above.
            means += [measured["clicks"]["all"]["mean"]] if precision not in RECIPES else []
        elif any(a.graph in CLICK_GRAPHS for a in bundle.artifacts if (a.format, a.precision) == (format_, precision)):
            raise BundleError("its click graphs are not those of this version of pocketsam; export it again")
    except PocketSamError as e:
        return Row(format_, precision, runtime, gate, False, str(e), {})
    return Row(format_, precision, runtime, gate, all(m >= gate for m in means), "", measured)
