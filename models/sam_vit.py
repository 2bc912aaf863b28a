"""SAM's image encoder: a plain ViT with windowed and global attention and decomposed relative positions.

Names and arithmetic follow the official ``image_encoder.py``; tensors stay at 4 dimensions or fewer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketsam.models.layers import VitBlock, cubic_table, in_parts, joined, neck, query_parts


def relative_table(side: int, table: Tensor) -> Tensor:
    """(2 * s - 1, d) learned offsets -> (side, side, d) by query and key coordinate (equal query and key sides).

    A table for another side is resized linearly, as the official ``get_rel_pos`` does.
    """
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.transpose(0, 1)[None], size=2 * side - 1, mode="linear")[0].transpose(0, 1)
    i = torch.arange(side, device=table.device)
    return table[i[:, None] - i[None, :] + side - 1]


class Attention(nn.Module):
    """Self-attention over a square of ``side`` x ``side`` tokens with decomposed relative position bias."""

    def __init__(self, dim: int, heads: int, side: int, table_side: int) -> None:
        super().__init__()
        self.heads = heads
        self.side = side
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_side - 1, dim // heads))
        # Set by export where the trained tables are for another side.
        self.frozen: tuple[Tensor, Tensor] | None = None

    def offsets(self) -> tuple[Tensor, Tensor]:
        """Row and column tables, each (side, side, d) by query and key coordinate."""
        if self.frozen is not None:
            return self.frozen
        return relative_table(self.side, self.rel_pos_h), relative_table(self.side, self.rel_pos_w)

    def freeze(self) -> None:
        """Keep the tables as constants if they had to be resized."""
        if len(self.rel_pos_h) != 2 * self.side - 1:
            rows, columns = self.offsets()
            self.frozen = rows.detach().clone(), columns.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """(B, side * side, C) -> same."""
        b, n, c = x.shape
        d, s, groups = c // self.heads, self.side, b * self.heads
        q, k, v = (t.reshape(b, n, self.heads, d).transpose(1, 2).reshape(groups, n, d)
                   for t in self.qkv(x).chunk(3, dim=-1))
        k = k.transpose(-1, -2)
        rows, columns = self.offsets()
        answers, y = [], 0
        for grid in in_parts(q.reshape(groups, s, s, d), query_parts(q, k), 1):
            answers.append(self._answer(grid, k, v, rows[y:y + grid.shape[1]], columns))
            y += grid.shape[1]
        z = joined(answers, 1).reshape(b, self.heads, n, d).transpose(1, 2).reshape(b, n, c)
        out: Tensor = self.proj(z)
        return out

    def _answer(self, grid: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Some rows of the queries (groups, h, side, d) and of the row table -> (groups, h * side, d)."""
        groups, h, s, d = grid.shape
        logits = (grid.reshape(groups, h * s, d) * self.scale) @ k
        # rel_h[g, y, x, ky] = q[g, y, x] . table_h[y, ky]: the unscaled query meets the offsets (Li et al. 2022).
        # Rows and columns come first, for a table of a batch of products is written out for each group by LiteRT.
        rel_h = grid.transpose(0, 1).reshape(h, groups * s, d) @ rows.transpose(-1, -2)
        rel_w = grid.reshape(groups * h, s, d).transpose(0, 1) @ columns.transpose(-1, -2)
        logits = logits.reshape(groups, h * s, s, s) \
            + rel_h.reshape(h, groups, s, s).transpose(0, 1).reshape(groups, h * s, s, 1) \
            + rel_w.transpose(0, 1).reshape(groups, h * s, 1, s)
        y: Tensor = logits.reshape(groups, h * s, s * s).softmax(-1) @ v
        return y


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
        table_size: side in pixels that the positional tables were trained for; ``image_size`` when None.
        out: channels of the embedding.
    """

    def __init__(self, dim: int, depth: int, heads: int, global_blocks: tuple[int, ...], image_size: int = 1024,
                 window: int = 14, out: int = 256, table_size: int | None = None) -> None:
        super().__init__()
        self.side, table_side = image_size // 16, (table_size or image_size) // 16
        self.patch_embed = PatchEmbed(dim, 16)
        self.pos_embed = nn.Parameter(torch.zeros(1, table_side, table_side, dim))
        self.blocks = nn.ModuleList(
            self._block(dim, heads, 0 if i in global_blocks else window, table_side) for i in range(depth)
        )
        self.early_block = min(global_blocks)
        self.neck = neck(dim, out)
        # Set by export to the interpolated table, so that graphs hold it as one constant.
        self.frozen_positions: Tensor | None = None

    def _block(self, dim: int, heads: int, window: int, table_side: int) -> VitBlock:
        return VitBlock(dim, Attention(dim, heads, window or self.side, window or table_side), window)

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image."""
        return self.patch_embed.proj

    def positions(self) -> Tensor:
        """(1, S / 16, S / 16, C), interpolated where S is not the trained side."""
        if self.frozen_positions is not None:
            return self.frozen_positions
        return cubic_table(self.pos_embed.permute(0, 3, 1, 2), self.side).permute(0, 2, 3, 1)

    def forward_early(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, and the map (B, C, S / 16, S / 16) after the first block with global attention."""
        x = self.patch_embed(x) + self.positions()
        early = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.early_block:
                early = x
        return self.neck(x.permute(0, 3, 1, 2)), early.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> ``image_embeddings`` (B, 256, S / 16, S / 16)."""
        return {"image_embeddings": self.forward_early(x)[0]}
