"""SAM-HQ's image side: a SAM encoder whose early features are fused with its embedding (official ``mask_decoder_hq``).

The fusion depends on the image alone, so it belongs to the encoder graph; the official code runs it at every prompt.
"""

from __future__ import annotations

from torch import Tensor, nn

from pocketsam.models.layers import LayerNorm2d
from pocketsam.models.sam_vit import SamVit
from pocketsam.models.tiny_vit import TinyVit


class HqEncoder(nn.Module):
    """A trunk with ``forward_early``, and the two upscaling paths that make the HQ features.

    Args:
        trunk: ViT-B or TinyViT.
        early: channels of its early map.
        dim: channels of the embedding.
    """

    def __init__(self, trunk: SamVit | TinyVit, early: int, dim: int = 256) -> None:
        super().__init__()
        self.trunk = trunk
        self.compress_vit_feat = upscale_by_four(early, dim, dim // 8)
        self.embedding_encoder = upscale_by_four(dim, dim // 4, dim // 8)

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image."""
        return self.trunk.stem

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> ``image_embeddings`` (B, C, h, w), ``hq_features`` (B, C / 8, 4h, 4w)."""
        embedding, early = self.trunk.forward_early(x)
        fine: Tensor = self.embedding_encoder(embedding) + self.compress_vit_feat(early)
        return {"image_embeddings": embedding, "hq_features": fine}


def upscale_by_four(inp: int, hidden: int, out: int) -> nn.Sequential:
    """Two transposed convolutions with norm and GELU between: (B, inp, h, w) -> (B, out, 4h, 4w)."""
    return nn.Sequential(nn.ConvTranspose2d(inp, hidden, 2, stride=2), LayerNorm2d(hidden), nn.GELU(),
                         nn.ConvTranspose2d(hidden, out, 2, stride=2))
