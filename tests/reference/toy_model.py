"""Small models of each family, side 128 and 8 x 8 embedding, for tests that need a real export in seconds."""

from __future__ import annotations

from pocketsam.models.builders import EFFICIENT_SAM_STYLE, HQ_STYLE, SAM2_STYLE
from pocketsam.models.catalog import SPECS
from pocketsam.models.fpn import PyramidEncoder
from pocketsam.models.hiera import Hiera
from pocketsam.models.mask_decoder import MaskDecoder
from pocketsam.models.plain_vit import PlainVit
from pocketsam.models.prompt_encoder import PromptEncoder
from pocketsam.models.rep_vit import EdgeSamEncoder
from pocketsam.models.sam import SegmentAnything
from pocketsam.models.sam_hq import HqEncoder
from pocketsam.models.sam_vit import SamVit


def build() -> SegmentAnything:
    """Side 128, 8 x 8 embedding, two blocks: one with windows of 3 (so that windows are padded), one global."""
    spec = SPECS["toy_sam"]
    encoder = SamVit(32, 2, 2, (1,), image_size=128, window=3, out=32)
    model = SegmentAnything(spec, encoder, PromptEncoder(32, 8, 128), MaskDecoder(32, mlp_dim=64))
    return model.eval()


def sam2() -> SegmentAnything:
    """Hiera with padded windows and pooling inside them, pyramid, object score."""
    spec = SPECS["toy_sam2"]
    trunk = Hiera(8, 1, (1, 1, 2, 1), (3,), 7, (8, 4, 6, 6), 128)
    decoder = MaskDecoder(32, mlp_dim=64, high_res_channels=(4, 8), style=SAM2_STYLE)
    return SegmentAnything(spec, PyramidEncoder(trunk, 32, (4, 8)), PromptEncoder(32, 8, 128), decoder).eval()


def efficient_sam() -> SegmentAnything:
    """Plain ViT, six prompt points, one norm over the upscaled map."""
    spec = SPECS["toy_efficient_sam"]
    prompts = PromptEncoder(32, 8, 128, mask_channels=0, labels=(1, 2, 3), padding_position=True)
    decoder = MaskDecoder(32, mlp_dim=64, style=EFFICIENT_SAM_STYLE)
    return SegmentAnything(spec, PlainVit(32, 2, 128, depth=2, out=32), prompts, decoder).eval()


def hq() -> SegmentAnything:
    """ViT with an HQ token and early features."""
    spec = SPECS["toy_hq"]
    encoder = HqEncoder(SamVit(32, 2, 2, (1,), image_size=128, window=3, out=32), 32, 32)
    return SegmentAnything(spec, encoder, PromptEncoder(32, 8, 128), MaskDecoder(32, mlp_dim=64, style=HQ_STYLE)).eval()


def edge() -> SegmentAnything:
    """EdgeSAM's own RepViT-M1 with a narrow neck."""
    spec = SPECS["toy_edge"]
    encoder = EdgeSamEncoder(128, out=32)
    return SegmentAnything(spec, encoder, PromptEncoder(32, 8, 128), MaskDecoder(32, mlp_dim=64)).eval()
