"""Plain ViT image encoder of EfficientSAM and of EfficientTAM's image path (official ``efficient_sam_encoder.py``,
``vitdet.py``): a positional table from 14 x 14 patches, no relative positions, window attention where asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketsam.models.layers import VitBlock, attention, cubic_table, neck
from pocketsam.models.sam_vit import PatchEmbed

TABLE_SIDE = 14


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (t.reshape(b, n, self.heads, c // self.heads).transpose(1, 2)
                   for t in self.qkv(x).chunk(3, dim=-1))
        y: Tensor = self.proj(attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return y


class PlainVit(nn.Module):
    """ViT with SAM's neck.

    Args:
        dim, heads: width and attention heads; 12 blocks.
        image_size: side S; the map has side S / 16.
        global_blocks: blocks with global attention; all when None.
        memory_embed: adds SAM 2's learned "no memory" vector, which its image predictor adds to the embedding.
    """

    def __init__(self, dim: int, heads: int, image_size: int = 1024, global_blocks: tuple[int, ...] | None = None,
                 memory_embed: bool = False, depth: int = 12, window: int = 14, out: int = 256) -> None:
        super().__init__()
        self.side = image_size // 16
        self.patch_embed = PatchEmbed(dim, 16)
        self.pos_embed = nn.Parameter(torch.zeros(1, TABLE_SIDE**2 + 1, dim))
        self.blocks = nn.ModuleList(
            VitBlock(dim, Attention(dim, heads), 0 if global_blocks is None or i in global_blocks else window)
            for i in range(depth))
        self.neck = neck(dim, out)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, out)) if memory_embed else None
        # Set by export to the interpolated table, so that graphs hold it as one constant.
        self.frozen_positions: Tensor | None = None

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image."""
        return self.patch_embed.proj

    def positions(self) -> Tensor:
        """(1, S / 16, S / 16, C) interpolated table; the class token's entry is dropped."""
        if self.frozen_positions is not None:
            return self.frozen_positions
        table = self.pos_embed[:, 1:].reshape(1, TABLE_SIDE, TABLE_SIDE, -1).permute(0, 3, 1, 2)
        return cubic_table(table, self.side).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> ``image_embeddings`` (B, 256, S / 16, S / 16)."""
        x = self.patch_embed(x) + self.positions()
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.neck(x.permute(0, 3, 1, 2))
        if self.no_mem_embed is not None:
            y = y + self.no_mem_embed.reshape(1, -1, 1, 1)
        return {"image_embeddings": y}
