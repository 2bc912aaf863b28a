"""ModelSpec of every supported model: plain data, so that listing models needs no torch."""

from __future__ import annotations

from pocketsam.errors import UnknownName
from pocketsam.specs import ModelSpec

SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        # Whole-number means: the uint8 colour that the host pads with then normalises to exactly zero.
        ModelSpec(name="lite0", family="lite", image_size=512, embed_size=32, mean=(124.0, 116.0, 104.0),
                  std=(58.0, 57.0, 57.0), high_res_channels=(32, 64)),
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
