"""ModelSpec of every supported model: plain data, so that listing models needs no torch."""

from __future__ import annotations

from pocketsam.errors import UnknownName
from pocketsam.specs import ModelSpec

SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(name="sam_vit_b", family="sam", image_size=1024),
        ModelSpec(name="sam_vit_l", family="sam", image_size=1024),
        ModelSpec(name="sam_vit_h", family="sam", image_size=1024),
        ModelSpec(name="mobile_sam", family="sam", image_size=1024),
    )
}


def spec(name: str) -> ModelSpec:
    """The spec of a model by registry name.

    Raises:
        UnknownName: no such model; the message suggests the nearest name.
    """
    if name not in SPECS:
        raise UnknownName("model", name, SPECS)
    return SPECS[name]
