"""Hiera trunk of SAM 2.1 (official ``hieradet.py``; Ryali et al. 2023): window attention, pooling between stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketsam.models.layers import MlpBlock, attention, cubic_table, merge_windows, partition_windows

STRIDE = 4


def pool(x: Tensor) -> Tensor:
    """2x2 maximum over an NHWC map."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2, 2).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Self-attention over squares of tokens; with ``pooled``, queries are the 2x2 maxima and the square halves."""

    def __init__(self, dim: int, out: int, heads: int, pooled: bool) -> None:
        super().__init__()
        self.heads = heads
        self.pooled = pooled
        self.qkv = nn.Linear(dim, 3 * out)
        self.proj = nn.Linear(out, out)

    def heads_first(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return x.reshape(b, n, self.heads, c // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, side: int) -> Tensor:
        """(B, side * side, C) -> (B, side * side or a quarter of that, out)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.pooled:
            b, _, c = q.shape
            q = pool(q.reshape(b, side, side, c)).reshape(b, -1, c)
        y = attention(self.heads_first(q), self.heads_first(k), self.heads_first(v)).transpose(1, 2)
        z: Tensor = self.proj(y.reshape(y.shape[0], y.shape[1], -1))
        return z


class Block(nn.Module):
    """Transformer block on an NHWC map; the first of a stage widens and halves the map.

    Args:
        window: side of the attention windows, 0 for global attention.
    """

    def __init__(self, dim: int, out: int, heads: int, window: int, pooled: bool) -> None:
        super().__init__()
        self.window = window
        self.pooled = pooled
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, out, heads, pooled)
        self.norm2 = nn.LayerNorm(out, eps=1e-6)
        self.mlp = MlpBlock(out, 4 * out, nn.GELU())
        self.proj = nn.Linear(dim, out) if dim != out else None

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        y = self.norm1(x)
        if self.proj is not None:
            x = self.proj(y)
            x = pool(x.reshape(b, h, w, -1)).flatten(1, 2) if self.pooled else x
        if self.window:
            y = self.attn(partition_windows(y.reshape(b, h, w, c), self.window), self.window)
        else:
            y = self.attn(y, h)
        if self.pooled:
            h, w = h // 2, w // 2
        if self.window:
            y = merge_windows(y, self.window // 2 if self.pooled else self.window, h, w).reshape(x.shape)
        x = x + y
        x = x + self.mlp(self.norm2(x))
        return x.reshape(b, h, w, -1)


class Hiera(nn.Module):
    """Four stages at strides 4, 8, 16 and 32.

    Args:
        dim, heads: width and attention heads of the first stage; both double at every stage.
        stages: blocks a stage.
        global_blocks: indices of the blocks with global attention.
        table_side: side of the learned background table of positions.
        windows: window side a stage; a stage's first block still has the side of the stage before.
        image_size: side S.
    """

    def __init__(self, dim: int, heads: int, stages: Sequence[int], global_blocks: Sequence[int], table_side: int,
                 windows: Sequence[int], image_size: int = 1024) -> None:
        super().__init__()
        self.side = image_size // STRIDE
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 7, stride=STRIDE, padding=3)})
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, table_side, table_side))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, dim, windows[0], windows[0]))
        self.blocks = nn.ModuleList()
        self.ends: list[int] = []
        self.widths = tuple(dim << i for i in range(len(stages)))
        for stage, depth in enumerate(stages):
            for i in range(depth):
                first = stage > 0 and i == 0
                window = 0 if len(self.blocks) in global_blocks else windows[stage - 1 if first else stage]
                width = self.widths[stage]
                self.blocks.append(Block(width // 2 if first else width, width, heads << stage, window, first))
            self.ends.append(len(self.blocks) - 1)
        # Set by export to the interpolated table, so that graphs hold it as one constant.
        self.frozen_positions: Tensor | None = None

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image."""
        return self.patch_embed["proj"]

    def positions(self) -> Tensor:
        """(1, S / 4, S / 4, C): the background table enlarged, plus the window table repeated."""
        if self.frozen_positions is not None:
            return self.frozen_positions
        times = self.side // self.pos_embed_window.shape[-1]
        table = cubic_table(self.pos_embed, self.side) + self.pos_embed_window.repeat(1, 1, times, times)
        return table.permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, S, S) -> NCHW maps at strides 4, 8, 16 and 32."""
        x = self.stem(x).permute(0, 2, 3, 1) + self.positions()
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                maps.append(x.permute(0, 3, 1, 2))
        return maps
