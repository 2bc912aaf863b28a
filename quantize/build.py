"""The int8 stage of an export: every format under every recipe, with what misses its gate named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pocketsam.bundle import Bundle
from pocketsam.errors import BundleError, ParityError, UnsupportedModel
from pocketsam.quantize.pair import Pair
from pocketsam.quantize.recipes import check
from pocketsam.quantize.stage import Preparation, Stage
from pocketsam.remembered import Remembered


def quantize(bundle: Bundle, formats: Sequence[tuple[str, str]], recipes: Sequence[str],
             stage: Stage) -> tuple[Bundle, list[str]]:
    """Add int8 artifacts to a bundle that holds the fp32 ones of the same formats.

    Args:
        formats: (format, runtime) pairs.

    Returns:
        The bundle, and a sentence for each pair that misses its gate, with the best that was found, or that its
        tool or engine refuses. Of such a pair the bundle has what an earlier export left, if that passed this gate.

    Raises:
        UnsupportedModel: none of the formats has a recipe.
    """
    misses = []
    reference = Remembered(stage.reference)
    prepared = Preparation(stage, bundle)
    for warning in stage.calibration.warnings:
        stage.report(f"warning: {warning}")
    for recipe in recipes:
        for format_, runtime in available(formats, recipe, stage.report):
            pair = Pair(bundle, format_, runtime, recipe, stage, reference, prepared)
            try:
                rows = pair.make()
            except (ParityError, UnsupportedModel, BundleError) as e:
                pair.discard()
                stage.report(str(e))
                misses.append(str(e))
                rows = pair.earlier() if pair.passed_before() else []
            bundle = replace(bundle, artifacts=(*bundle.artifacts, *rows))
    return bundle, misses


def available(formats: Sequence[tuple[str, str]], recipe: str, report: Callable[[str], None]) -> list[tuple[str, str]]:
    """The formats that have a recipe; the others are reported by name.

    Raises:
        UnsupportedModel: none has it.
    """
    found, refused = [], []
    for format_, runtime in formats:
        try:
            check(format_, recipe)
            found.append((format_, runtime))
        except UnsupportedModel as e:
            refused.append(str(e))
    if not found:
        raise UnsupportedModel(" ".join(refused))
    for reason in refused:
        report(f"skipping: {reason}")
    return found
