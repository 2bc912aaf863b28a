"""One builder a model: ``name(image_size=None)`` gives it untrained, for its native input side or another."""

from __future__ import annotations

from torch import nn

from pocketsam.models.catalog import SPECS
from pocketsam.models.efficient_vit import CONFIGS, EPS, EfficientVit
from pocketsam.models.fpn import PyramidEncoder
from pocketsam.models.hiera import Hiera
from pocketsam.models.mask_decoder import SAM_STYLE, MaskDecoder, Style
from pocketsam.models.plain_vit import PlainVit
from pocketsam.models.prompt_encoder import PromptEncoder
from pocketsam.models.rep_vit import EdgeSamEncoder, RepVit, RepVitTrunk
from pocketsam.models.sam import SegmentAnything
from pocketsam.models.sam_hq import HqEncoder
from pocketsam.models.sam_vit import SamVit
from pocketsam.models.tiny_vit import TinyVit
from pocketsam.specs import ModelSpec

SAM2_STYLE = Style(object_score=True, iou_sigmoid=True)
HQ_STYLE = Style(hq=True)
EFFICIENT_VIT_STYLE = Style(norm_eps=EPS)
EFFICIENT_SAM_STYLE = Style(mlp_act=nn.GELU, residual_pe=True, group_norm=True)
NATIVE = 1024


def spec_for(name: str, image_size: int | None) -> ModelSpec:
    """The catalogue's spec, resized where another side is asked for."""
    return SPECS[name] if image_size is None else SPECS[name].resized(image_size)


def _sam(spec: ModelSpec, encoder: nn.Module, style: Style = SAM_STYLE) -> SegmentAnything:
    prompts = PromptEncoder(spec.embed_dim, spec.embed_size, spec.frame_size)
    decoder = MaskDecoder(spec.embed_dim, high_res_channels=spec.high_res_channels, style=style)
    return SegmentAnything(spec, encoder, prompts, decoder).eval()


def _vit_b(image_size: int) -> SamVit:
    return SamVit(768, 12, 12, (2, 5, 8, 11), image_size, table_size=NATIVE)


def sam_vit_b(image_size: int | None = None) -> SegmentAnything:
    """SAM with ViT-B (``sam_vit_b_01ec64.pth``)."""
    spec = spec_for("sam_vit_b", image_size)
    return _sam(spec, _vit_b(spec.image_size))


def sam_vit_l(image_size: int | None = None) -> SegmentAnything:
    """SAM with ViT-L (``sam_vit_l_0b3195.pth``)."""
    spec = spec_for("sam_vit_l", image_size)
    return _sam(spec, SamVit(1024, 24, 16, (5, 11, 17, 23), spec.image_size, table_size=NATIVE))


def sam_vit_h(image_size: int | None = None) -> SegmentAnything:
    """SAM with ViT-H (``sam_vit_h_4b8939.pth``)."""
    spec = spec_for("sam_vit_h", image_size)
    return _sam(spec, SamVit(1280, 32, 16, (7, 15, 23, 31), spec.image_size, table_size=NATIVE))


def mobile_sam(image_size: int | None = None) -> SegmentAnything:
    """MobileSAM (``mobile_sam.pt``) and TinySAM (``tinysam.pth``)."""
    return _sam(spec_for("mobile_sam", image_size), TinyVit())


def repvit_sam(image_size: int | None = None) -> SegmentAnything:
    """RepViT-SAM (``repvit_sam.pt``)."""
    return _sam(spec_for("repvit_sam", image_size), RepVit())


def edge_sam(image_size: int | None = None) -> SegmentAnything:
    """EdgeSAM (``edge_sam.pth``, ``edge_sam_3x.pth``)."""
    spec = spec_for("edge_sam", image_size)
    return _sam(spec, EdgeSamEncoder(spec.image_size))


def sam_hq_vit_b(image_size: int | None = None) -> SegmentAnything:
    """SAM-HQ with ViT-B (``sam_hq_vit_b.pth``)."""
    spec = spec_for("sam_hq_vit_b", image_size)
    return _sam(spec, HqEncoder(_vit_b(spec.image_size), 768), HQ_STYLE)


def sam_hq_vit_tiny(image_size: int | None = None) -> SegmentAnything:
    """Light SAM-HQ with TinyViT (``sam_hq_vit_tiny.pth``)."""
    return _sam(spec_for("sam_hq_vit_tiny", image_size), HqEncoder(TinyVit(), 160), HQ_STYLE)


def _efficient_sam(spec: ModelSpec, dim: int, heads: int) -> SegmentAnything:
    prompts = PromptEncoder(spec.embed_dim, spec.embed_size, spec.frame_size, mask_channels=0, labels=(1, 2, 3),
                            padding_position=True)
    decoder = MaskDecoder(spec.embed_dim, style=EFFICIENT_SAM_STYLE)
    return SegmentAnything(spec, PlainVit(dim, heads, spec.image_size), prompts, decoder).eval()


def efficient_sam_ti(image_size: int | None = None) -> SegmentAnything:
    """EfficientSAM-Ti (``efficient_sam_vitt.pt``)."""
    return _efficient_sam(spec_for("efficient_sam_ti", image_size), 192, 3)


def efficient_sam_s(image_size: int | None = None) -> SegmentAnything:
    """EfficientSAM-S (``efficient_sam_vits.pt``)."""
    return _efficient_sam(spec_for("efficient_sam_s", image_size), 384, 6)


def _efficientvit_sam(name: str, image_size: int | None) -> SegmentAnything:
    spec = spec_for(name, image_size)
    return _sam(spec, EfficientVit(CONFIGS[name], spec.image_size), EFFICIENT_VIT_STYLE)


def efficientvit_sam_l0(image_size: int | None = None) -> SegmentAnything:
    """EfficientViT-SAM-L0 (``efficientvit_sam_l0.pt``)."""
    return _efficientvit_sam("efficientvit_sam_l0", image_size)


def efficientvit_sam_l1(image_size: int | None = None) -> SegmentAnything:
    """EfficientViT-SAM-L1 (``efficientvit_sam_l1.pt``)."""
    return _efficientvit_sam("efficientvit_sam_l1", image_size)


def efficientvit_sam_l2(image_size: int | None = None) -> SegmentAnything:
    """EfficientViT-SAM-L2 (``efficientvit_sam_l2.pt``)."""
    return _efficientvit_sam("efficientvit_sam_l2", image_size)


def efficientvit_sam_xl0(image_size: int | None = None) -> SegmentAnything:
    """EfficientViT-SAM-XL0 (``efficientvit_sam_xl0.pt``)."""
    return _efficientvit_sam("efficientvit_sam_xl0", image_size)


def efficientvit_sam_xl1(image_size: int | None = None) -> SegmentAnything:
    """EfficientViT-SAM-XL1 (``efficientvit_sam_xl1.pt``)."""
    return _efficientvit_sam("efficientvit_sam_xl1", image_size)


def _pyramid(spec: ModelSpec, trunk: Hiera | RepVitTrunk) -> SegmentAnything:
    skips = (spec.high_res_channels[0], spec.high_res_channels[1])
    return _sam(spec, PyramidEncoder(trunk, spec.embed_dim, skips), SAM2_STYLE)


def sam21_tiny(image_size: int | None = None) -> SegmentAnything:
    """SAM 2.1 tiny, image path (``sam2.1_hiera_tiny.pt``)."""
    spec = spec_for("sam2.1_tiny", image_size)
    return _pyramid(spec, Hiera(96, 1, (1, 2, 7, 2), (5, 7, 9), 7, (8, 4, 14, 7), spec.image_size))


def sam21_small(image_size: int | None = None) -> SegmentAnything:
    """SAM 2.1 small, image path (``sam2.1_hiera_small.pt``)."""
    spec = spec_for("sam2.1_small", image_size)
    return _pyramid(spec, Hiera(96, 1, (1, 2, 11, 2), (7, 10, 13), 7, (8, 4, 14, 7), spec.image_size))


def sam21_base_plus(image_size: int | None = None) -> SegmentAnything:
    """SAM 2.1 base+, image path (``sam2.1_hiera_base_plus.pt``)."""
    spec = spec_for("sam2.1_base_plus", image_size)
    return _pyramid(spec, Hiera(112, 2, (2, 3, 16, 3), (12, 16, 20), 14, (8, 4, 14, 7), spec.image_size))


def sam21_large(image_size: int | None = None) -> SegmentAnything:
    """SAM 2.1 large, image path (``sam2.1_hiera_large.pt``)."""
    spec = spec_for("sam2.1_large", image_size)
    return _pyramid(spec, Hiera(144, 2, (2, 6, 36, 4), (23, 33, 43), 7, (8, 4, 16, 8), spec.image_size))


def edgetam(image_size: int | None = None) -> SegmentAnything:
    """EdgeTAM, image path (``edgetam.pt``)."""
    return _pyramid(spec_for("edgetam", image_size), RepVitTrunk())


def _efficienttam(name: str, image_size: int | None, dim: int, heads: int) -> SegmentAnything:
    spec = spec_for(name, image_size)
    encoder = PlainVit(dim, heads, spec.image_size, global_blocks=(2, 5, 8, 11), memory_embed=True)
    return _sam(spec, encoder, SAM2_STYLE)


def efficienttam_ti(image_size: int | None = None) -> SegmentAnything:
    """EfficientTAM-Ti, image path (``efficienttam_ti.pt``)."""
    return _efficienttam("efficienttam_ti", image_size, 192, 3)


def efficienttam_s(image_size: int | None = None) -> SegmentAnything:
    """EfficientTAM-S, image path (``efficienttam_s.pt``)."""
    return _efficienttam("efficienttam_s", image_size, 384, 6)
