"""ModelSpec of every supported model: plain data, so that listing models needs no torch."""

from __future__ import annotations

from typing import Any

from pocketsam.errors import UnknownName
from pocketsam.specs import ModelSpec

# SAM 2's image predictor: squashed on floats, corners first, always a padding point, single mask by stability.
_SAM2: dict[str, Any] = {
    "image_size": 1024, "resize": "squash", "resampling": "antialias", "upscale": "direct", "object_score": True,
    "box_first": True, "padding": "always", "stability": (0.05, 0.98), "logit_limit": 32.0,
}
_SKIPS: dict[str, Any] = {"high_res_channels": (32, 64)}
_EFFICIENT_SAM: dict[str, Any] = {
    "family": "efficient_sam", "image_size": 1024, "resize": "squash", "resampling": "bilinear", "upscale": "cubic",
    "box_first": True, "padding": "fill", "max_points": 6, "mask_prompt": False,
}
_EFFICIENT_VIT: dict[str, Any] = {"family": "efficientvit_sam", "embed_size": 64, "prompt_size": 1024}

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
        ModelSpec(name="repvit_sam", family="sam", image_size=1024),
        ModelSpec(name="edge_sam", family="edge_sam", image_size=1024),
        ModelSpec(name="sam_hq_vit_b", family="sam_hq", image_size=1024, hq_channels=32, best_only=True),
        ModelSpec(name="sam_hq_vit_tiny", family="sam_hq", image_size=1024, hq_channels=32, best_only=True),
        ModelSpec(name="efficient_sam_ti", **_EFFICIENT_SAM),
        ModelSpec(name="efficient_sam_s", **_EFFICIENT_SAM),
        *(ModelSpec(name=f"efficientvit_sam_{n}", image_size=s, **_EFFICIENT_VIT)
          for n, s in (("l0", 512), ("l1", 512), ("l2", 512), ("xl0", 1024), ("xl1", 1024))),
        *(ModelSpec(name=f"sam2.1_{n}", family="sam2", **_SAM2, **_SKIPS)
          for n in ("tiny", "small", "base_plus", "large")),
        ModelSpec(name="edgetam", family="edgetam", **_SAM2, **_SKIPS),
        ModelSpec(name="efficienttam_ti", family="efficienttam", **_SAM2),
        ModelSpec(name="efficienttam_s", family="efficienttam", **_SAM2),
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
