"""Known checkpoints: file, place, hash, licence, size; and key fingerprints of the families. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    """One official file.

    Attributes:
        model: registry name of the architecture that loads it.
        file: file name as published.
        url: public address.
        sha256: of the file, or None where no trustworthy record is known.
        licence: of the weights.
        bytes: file size, or None where not known.
    """

    model: str
    file: str
    url: str
    sha256: str | None
    licence: str
    bytes: int | None


_META = "https://dl.fbaipublicfiles.com/segment_anything/"
_META2 = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"
_EDGE = "https://huggingface.co/spaces/chongzhou/EdgeSAM/resolve/main/weights/"
_EVIT = "https://huggingface.co/mit-han-lab/efficientvit-sam/resolve/main/"
_ETAM = "https://huggingface.co/yunyangx/efficient-track-anything/resolve/main/"
_ESAM = "https://github.com/yformer/EfficientSAM/raw/main/weights/"
APACHE = "Apache-2.0"
NON_COMMERCIAL = "S-Lab License 1.0, NON-COMMERCIAL use only"

CHECKPOINTS = (
    Checkpoint("lite0", "lite0.safetensors", "ships with pocketsam", None,
               "research use, see docs/lite0.md", None),
    Checkpoint("sam_vit_b", "sam_vit_b_01ec64.pth", _META + "sam_vit_b_01ec64.pth",
               "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", "Apache-2.0", 375_042_383),
    Checkpoint("sam_vit_l", "sam_vit_l_0b3195.pth", _META + "sam_vit_l_0b3195.pth",
               "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622", "Apache-2.0", 1_249_524_607),
    Checkpoint("sam_vit_h", "sam_vit_h_4b8939.pth", _META + "sam_vit_h_4b8939.pth",
               "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e", "Apache-2.0", 2_564_550_879),
    Checkpoint("mobile_sam", "mobile_sam.pt", "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
               "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f", "Apache-2.0", 40_728_226),
    Checkpoint("mobile_sam", "tinysam.pth", "https://huggingface.co/xinghaochen/tinysam/resolve/main/tinysam.pth",
               "4b8edcf93af46e2a658ae455574de62873778a5cc3fd8e8adf094dcdfa957cf2", "Apache-2.0", None),
    Checkpoint("edge_sam", "edge_sam.pth", _EDGE + "edge_sam.pth", None, NON_COMMERCIAL, None),
    Checkpoint("edge_sam", "edge_sam_3x.pth", _EDGE + "edge_sam_3x.pth", None, NON_COMMERCIAL, None),
    Checkpoint("repvit_sam", "repvit_sam.pt", "https://github.com/THU-MIG/RepViT/releases/download/v1.0/repvit_sam.pt",
               None, APACHE, None),
    Checkpoint("sam_hq_vit_b", "sam_hq_vit_b.pth", "https://huggingface.co/lkeab/hq-sam/resolve/main/sam_hq_vit_b.pth",
               None, APACHE, None),
    Checkpoint("sam_hq_vit_tiny", "sam_hq_vit_tiny.pth",
               "https://huggingface.co/lkeab/hq-sam/resolve/main/sam_hq_vit_tiny.pth", None, APACHE, None),
    Checkpoint("efficient_sam_ti", "efficient_sam_vitt.pt", _ESAM + "efficient_sam_vitt.pt", None, APACHE, None),
    Checkpoint("efficient_sam_s", "efficient_sam_vits.pt", _ESAM + "efficient_sam_vits.pt.zip", None, APACHE, None),
    *(Checkpoint(f"efficientvit_sam_{n}", f"efficientvit_sam_{n}.pt", f"{_EVIT}efficientvit_sam_{n}.pt", None, APACHE,
                 None) for n in ("l0", "l1", "l2", "xl0", "xl1")),
    *(Checkpoint(f"sam2.1_{n}", f"sam2.1_hiera_{n}.pt", f"{_META2}sam2.1_hiera_{n}.pt", None, APACHE, None)
      for n in ("tiny", "small", "base_plus", "large")),
    Checkpoint("edgetam", "edgetam.pt", "https://github.com/facebookresearch/EdgeTAM/raw/main/checkpoints/edgetam.pt",
               None, APACHE, None),
    *(Checkpoint(f"efficienttam_{n}", f"efficienttam_{n}.pt", f"{_ETAM}efficienttam_{n}.pt", None, APACHE, None)
      for n in ("ti", "s")),
)

_VIT = "image_encoder.pos_embed"
HQ_KEY = "mask_decoder.compress_vit_feat.0.weight"
_EVIT_XL = "image_encoder.neck.input_ops.0.op_list.0.conv.weight"
_EVIT_NECK = "image_encoder.neck.middle.op_list"
_FUSED = "main.spatial_conv.conv.weight"
_HIERA = "image_encoder.trunk.pos_embed"

# Keys with shapes that tell the families apart; more specific entries first (an HQ model also looks like plain SAM).
FINGERPRINTS: dict[str, dict[str, tuple[int, ...]]] = {
    "lite0": {"image_encoder.trunk.stem.c.weight": (32, 3, 3, 3)},
    "sam_hq_vit_b": {HQ_KEY: (768, 256, 2, 2)},
    "sam_hq_vit_tiny": {HQ_KEY: (160, 256, 2, 2)},
    "sam_vit_b": {_VIT: (1, 64, 64, 768)},
    "sam_vit_l": {_VIT: (1, 64, 64, 1024)},
    "sam_vit_h": {_VIT: (1, 64, 64, 1280)},
    "mobile_sam": {"image_encoder.head.bias": (1000,), "image_encoder.neck.0.weight": (256, 320, 1, 1)},
    "edge_sam": {"image_encoder.neck.0.weight": (256, 256, 1, 1)},
    "repvit_sam": {"image_encoder.neck.0.weight": (256, 640, 1, 1)},
    # Depths differ, so a key of the last block tells the sizes apart: the deepest first.
    "efficientvit_sam_xl1": {_EVIT_XL: (256, 1024, 1, 1), f"{_EVIT_NECK}.11.{_FUSED}": (1024, 256, 3, 3)},
    "efficientvit_sam_xl0": {_EVIT_XL: (256, 1024, 1, 1), f"{_EVIT_NECK}.5.{_FUSED}": (1024, 256, 3, 3)},
    "efficientvit_sam_l2": {f"{_EVIT_NECK}.11.{_FUSED}": (256, 256, 3, 3)},
    "efficientvit_sam_l1": {f"{_EVIT_NECK}.7.{_FUSED}": (256, 256, 3, 3)},
    "efficientvit_sam_l0": {f"{_EVIT_NECK}.3.{_FUSED}": (256, 256, 3, 3)},
    "efficient_sam_ti": {_VIT: (1, 197, 192)},
    "efficient_sam_s": {_VIT: (1, 197, 384)},
    "efficienttam_ti": {_HIERA: (1, 197, 192)},
    "efficienttam_s": {_HIERA: (1, 197, 384)},
    "edgetam": {"spatial_perceiver.latents": (256, 64)},
    "sam2.1_base_plus": {_HIERA: (1, 112, 14, 14)},
    "sam2.1_large": {_HIERA: (1, 144, 7, 7)},
    "sam2.1_small": {"image_encoder.trunk.blocks.14.proj.bias": (768,)},
    "sam2.1_tiny": {"image_encoder.trunk.blocks.10.proj.bias": (768,)},
}


def licence_of(model: str) -> str:
    """The weights licence of a model's official checkpoints."""
    return next((c.licence for c in CHECKPOINTS if c.model == model), "unknown")
