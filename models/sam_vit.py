"""SAM's image encoder: a plain ViT with windowed and global attention and decomposed relative positions.

Names and arithmetic follow the official ``image_encoder.py``; tensors stay at 4 dimensions or fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketsam.models.layers import MlpBlock, merge_windows, neck, partition_windows


def relative_table(side: int, table: Tensor) -> Tensor:
    """(2 * side - 1, d) learned offsets -> (side, side, d) by query and key coordinate (equal query and key sides)."""
    i = torch.arange(side, device=table.device)
    return table[i[:, None] - i[None, :] + side - 1]


class Attention(nn.Module):
    """Self-attention over a square of ``side`` x ``side`` tokens with decomposed relative position bias."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.side = side
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, side * side, C) -> same."""
        b, n, c = x.shape
        d, s, groups = c // self.heads, self.side, b * self.heads
        q, k, v = (t.reshape(b, n, self.heads, d).transpose(1, 2).reshape(groups, n, d)
                   for t in self.qkv(x).chunk(3, dim=-1))
        logits = (q * self.scale) @ k.transpose(-1, -2)
        grid = q.reshape(groups, s, s, d)
        # rel_h[g, y, x, ky] = q[g, y, x] . table_h[y, ky]: the unscaled query meets the offsets (Li et al. 2022).
        rel_h = grid @ relative_table(s, self.rel_pos_h).transpose(-1, -2)
        rel_w = (grid.transpose(1, 2) @ relative_table(s, self.rel_pos_w).transpose(-1, -2)).transpose(1, 2)
        logits = logits.reshape(groups, n, s, s) + rel_h.reshape(groups, n, s, 1) + rel_w.reshape(groups, n, 1, s)
        y = logits.reshape(groups, n, n).softmax(-1) @ v
        y = y.reshape(b, self.heads, n, d).transpose(1, 2).reshape(b, n, c)
        out: Tensor = self.proj(y)
        return out


class Block(nn.Module):
    """Transformer block; ``window`` 0 means global attention over the whole map of side ``side``."""

    def __init__(self, dim: int, heads: int, window: int, side: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, window or side)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MlpBlock(dim, 4 * dim, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> same; windows are zero-padded after the norm, and padding takes part in attention."""
        b, h, w, c = x.shape
        y = self.norm1(x)
        if self.window:
            y = merge_windows(self.attn(partition_windows(y, self.window)), self.window, h, w)
        else:
            y = self.attn(y.reshape(b, h * w, c)).reshape(b, h, w, c)
        x = x + y
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]  # nn.Module calls are untyped


class PatchEmbed(nn.Module):
    """Non-overlapping patches: (B, 3, S, S) -> (B, S / p, S / p, C)."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y.permute(0, 2, 3, 1)


class SamVit(nn.Module):
    """ViT-B, L or H image encoder.

    Args:
        dim, depth, heads: width, number of blocks, attention heads.
        global_blocks: indices of the blocks with global attention.
        image_size: side S; the map has side S / 16.
        out: channels of the embedding.
    """

    def __init__(self, dim: int, depth: int, heads: int, global_blocks: tuple[int, ...],
                 image_size: int = 1024, window: int = 14, out: int = 256) -> None:
        super().__init__()
        side = image_size // 16
        self.patch_embed = PatchEmbed(dim, 16)
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, 0 if i in global_blocks else window, side) for i in range(depth)
        )
        self.neck = neck(dim, out)

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image."""
        return self.patch_embed.proj

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> ``image_embeddings`` (B, 256, S / 16, S / 16)."""
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return {"image_embeddings": self.neck(x.permute(0, 3, 1, 2))}
