"""TinyViT image encoder of MobileSAM and TinySAM (official ``tiny_vit_sam.py``; Wu et al. 2022).

Names and arithmetic follow the official code; tensors stay at 4 dimensions or fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketsam.models.layers import merge_windows, neck, partition_windows, to_map, to_rows


class ConvBn(nn.Sequential):
    """Convolution without bias and BatchNorm, named ``c`` and ``bn``."""

    def __init__(self, inp: int, out: int, kernel: int = 1, stride: int = 1, pad: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(inp, out, kernel, stride, pad, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(out))


class PatchEmbed(nn.Module):
    """Two strided convolutions: (B, 3, S, S) -> (B, C, S / 4, S / 4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvBn(3, dim // 2, 3, 2, 1), nn.GELU(), ConvBn(dim // 2, dim, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.seq(x)
        return y


class MbConv(nn.Module):
    """Inverted bottleneck with expansion 4; the last activation follows the residual sum."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvBn(dim, 4 * dim)
        self.conv2 = ConvBn(4 * dim, 4 * dim, 3, 1, 1, groups=4 * dim)
        self.conv3 = ConvBn(4 * dim, dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))
        z: Tensor = self.act(y + x)
        return z


class PatchMerging(nn.Module):
    """Change of width between stages; SAM's variant keeps the resolution when the output width is 320."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv1 = ConvBn(dim, out)
        self.conv2 = ConvBn(out, out, 3, 1 if out == 320 else 2, 1, groups=out)
        self.conv3 = ConvBn(out, out)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))
        return y


class ConvStage(nn.Module):
    """First stage: MbConv blocks, then PatchMerging."""

    def __init__(self, dim: int, depth: int, out: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MbConv(dim) for _ in range(depth))
        self.downsample = PatchMerging(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.downsample(x)
        return y


def offset_index(window: int) -> Tensor:
    """(window^2, window^2) index of |dy|, |dx| in order of first appearance, as the official table is laid out."""
    points = [(y, x) for y in range(window) for x in range(window)]
    seen: dict[tuple[int, int], int] = {}
    rows = [[seen.setdefault((abs(a - c), abs(b - d)), len(seen)) for c, d in points] for a, b in points]
    return torch.tensor(rows)


class Attention(nn.Module):
    """Window attention with a learned bias per absolute offset; the norm is inside, after the padding."""

    bias_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        self.register_buffer("bias_index", offset_index(window), persistent=False)
        # Set by export to the gathered table, so that graphs hold it as one constant.
        self.frozen_bias: Tensor | None = None
        # Set by export to one layer for each of q, k and v.
        self.split: nn.ModuleList | None = None

    def bias(self) -> Tensor:
        """(heads, window^2, window^2)."""
        return self.attention_biases[:, self.bias_index] if self.frozen_bias is None else self.frozen_bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, window^2, C) -> same."""
        b, n, c = x.shape
        q, k, v = self.project(self.norm(x))
        logits = (q @ k.transpose(-1, -2)) * self.scale + self.bias()
        y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        out: Tensor = self.proj(y)
        return out

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> q, k, v, each (B, heads, N, d)."""
        b, n, _ = x.shape
        if self.split is not None:
            q, k, v = (part(x).reshape(b, n, self.heads, -1).transpose(1, 2) for part in self.split)
            return q, k, v
        # The official layout interleaves q, k, v within each head.
        q, k, v = self.qkv(x).reshape(b, n, self.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        return q, k, v


class Mlp(nn.Module):
    """Norm, then two linear layers with GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(self.norm(x))))
        return y


class Block(nn.Module):
    """Window attention, depthwise local convolution, MLP, on an NCHW map."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(dim, heads, window)
        self.local_conv = ConvBn(dim, dim, 3, 1, 1, groups=dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = to_rows(x)
        windows = self.attn(partition_windows(y.reshape(b, h, w, c), self.window))
        y = y + merge_windows(windows, self.window, h, w).reshape(b, h * w, c)
        y = to_rows(self.local_conv(to_map(y, h, w)))
        return to_map(y + self.mlp(y), h, w)


class AttentionStage(nn.Module):
    """Attention blocks, then PatchMerging unless it is the last stage."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, out: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, window) for _ in range(depth))
        self.downsample = PatchMerging(dim, out) if out else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x


class TinyVit(nn.Module):
    """TinyViT-5M with SAM's neck: 1024 x 1024 -> 64 x 64.

    ``norm_head`` and ``head`` classify ImageNet and are never run; they exist so that official files load strictly.
    """

    def __init__(self, out: int = 256) -> None:
        super().__init__()
        dims, depths, heads, windows = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)
        self.patch_embed = PatchEmbed(dims[0])
        stages: list[nn.Module] = [ConvStage(dims[0], depths[0], dims[1])]
        for i in (1, 2, 3):
            stages.append(AttentionStage(dims[i], depths[i], heads[i], windows[i], dims[i + 1] if i < 3 else None))
        self.layers = nn.ModuleList(stages)
        self.norm_head = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], 1000)
        self.neck = neck(dims[-1], out)

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image: a ``ConvBn``, or the fused convolution."""
        return self.patch_embed.seq[0]

    def forward_early(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, and the map (B, 160, S / 16, S / 16) after the second stage."""
        x = self.patch_embed(x)
        early = x
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i == 1:
                early = x
        return self.neck(x), early

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> ``image_embeddings`` (B, 256, S / 16, S / 16)."""
        return {"image_embeddings": self.forward_early(x)[0]}
