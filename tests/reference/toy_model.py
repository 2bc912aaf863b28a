"""A small SAM with windowed and global attention, for tests that need a real export in seconds."""

from __future__ import annotations

from pocketsam.models.catalog import SPECS
from pocketsam.models.mask_decoder import MaskDecoder
from pocketsam.models.prompt_encoder import PromptEncoder
from pocketsam.models.sam import SegmentAnything
from pocketsam.models.sam_vit import SamVit


def build() -> SegmentAnything:
    """Side 128, 8 x 8 embedding, two blocks: one with windows of 3 (so that windows are padded), one global."""
    spec = SPECS["toy_sam"]
    encoder = SamVit(32, 2, 2, (1,), image_size=128, window=3, out=32)
    model = SegmentAnything(spec, encoder, PromptEncoder(32, 8, 128), MaskDecoder(32, mlp_dim=64))
    return model.eval()
