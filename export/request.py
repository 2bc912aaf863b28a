"""What an export is asked for, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocketsam import registry
from pocketsam.errors import UnknownName, UnsupportedModel, UsageError
from pocketsam.export.graphs import bytes_of
from pocketsam.specs import ModelSpec


def check_request(spec: ModelSpec, formats: Sequence[str], precisions: Sequence[str], slots: int,
                  gate: float | None, jobs: int) -> list[Any]:
    """The exporters of the formats asked for.

    Raises:
        UsageError: a number out of its range, or nothing asked for.
        UnknownName: no such format or precision.
        UnsupportedModel: no format has a recipe.
        MissingDependency: a converter is not installed.
    """
    if jobs < 1:
        raise UsageError(f"jobs is {jobs}; expected at least 1.")
    if not formats or not precisions:
        raise UsageError("nothing to export: name at least one format and one precision.")
    if not spec.least_slots <= slots <= 512:
        raise UsageError(f"slots is {slots}; expected {spec.least_slots} to 512 for {spec.name} (a box takes two, "
                         "padding points count).")
    if gate is not None and not 0 <= gate <= 1:
        raise UsageError(f"gate is {gate}; expected a mask IoU from 0 to 1.")
    exporters = [registry.load("format", f) for f in dict.fromkeys(formats)]
    for precision in precisions:
        if precision not in registry.RECIPES and not any(precision in e.precisions for e in exporters):
            known = {p for e in exporters for p in e.precisions}
            raise UnknownName("precision", precision, {*known, *registry.RECIPES})
    for recipe in (p for p in precisions if p in registry.RECIPES):
        # A format without the recipe is reported when its turn comes; here it matters that some format has it.
        registry.entry("pocketsam.quantize.build:available")([(e.name, e.runtime) for e in exporters], recipe,
                                                             lambda text: None)
    return exporters


def check_sizes(model: Any, exporters: Sequence[Any]) -> None:
    """Raises UnsupportedModel if a format's file cannot hold the encoder."""
    size = bytes_of(model.image_encoder)
    for exporter in exporters:
        if exporter.name not in (fitting := registry.formats_of(size)):
            raise UnsupportedModel(f"the encoder of {model.spec.name} has {size / 1e9:.2f} GB of weights, more than a "
                                   f"file for {exporter.name} holds; choose of {', '.join(fitting)} with --to.")


def floats_of(precisions: Sequence[str]) -> list[str]:
    """What to convert from torch: the float precisions, and fp32 where an int8 recipe starts from it."""
    floats = [p for p in precisions if p not in registry.RECIPES]
    return floats if "fp32" in floats or len(floats) == len(precisions) else ["fp32", *floats]
