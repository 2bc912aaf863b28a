"""Building blocks that several encoders and the mask decoder share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_BYTES = 64 * 2**20


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of an NCHW tensor, eps 1e-6 (official ``modeling/common.py``).

    Written as a permuted ``layer_norm`` because every runtime has one fused kernel for that; on rows of three
    dimensions, because OpenVINO carries a convolution's layout into 4-D maps and then reorders them.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(to_rows(x), (x.shape[1],), self.weight, self.bias, self.eps)
        return to_map(y, x.shape[2], x.shape[3])


def to_rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    b, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(b, h * w, c)


def to_map(x: Tensor, height: int, width: int) -> Tensor:
    """Inverse of :func:`to_rows`: (B, H * W, C) -> (B, C, H, W)."""
    return x.reshape(x.shape[0], height, width, x.shape[-1]).permute(0, 3, 1, 2)


class MlpBlock(nn.Module):
    """Two linear layers with an activation between (official names ``lin1``, ``lin2``)."""

    def __init__(self, dim: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin2(self.act(self.lin1(x)))
        return y


def neck(channels: int, out: int) -> nn.Sequential:
    """1x1 and 3x3 convolutions without bias, each followed by LayerNorm2d: the end of SAM's image encoders."""
    return nn.Sequential(
        nn.Conv2d(channels, out, 1, bias=False),
        LayerNorm2d(out),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        LayerNorm2d(out),
    )


def partition_windows(x: Tensor, window: int) -> Tensor:
    """Zero-pad an NHWC map to a multiple of ``window`` and cut it into windows.

    Args:
        x: (B, H, W, C).

    Returns:
        (B * nH * nW, window * window, C). Intermediate tensors stay at 4 dimensions, because LiteRT lowers
        6-D transposes wrongly.
    """
    b, h, w, c = x.shape
    ph, pw = -h % window, -w % window
    if ph or pw:
        x = F.pad(x, (0, 0, 0, pw, 0, ph))
    rows, cols = (h + ph) // window, (w + pw) // window
    x = x.reshape(b * rows, window, cols, window * c).transpose(1, 2)
    return x.reshape(b * rows * cols, window * window, c)


def merge_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """Inverse of :func:`partition_windows`: (B * nH * nW, window * window, C) -> (B, height, width, C)."""
    c = x.shape[-1]
    rows, cols = -(-height // window), -(-width // window)
    x = x.reshape(-1, cols, window, window * c).transpose(1, 2)
    x = x.reshape(-1, rows * window, cols * window, c)
    return x[:, :height, :width] if rows * window > height or cols * window > width else x


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, heads, N, d) tensors, scaled by d ** -0.5.

    Eager PyTorch takes the fused kernel, as the official code does; graphs get the explicit form, which every
    converter knows.
    """
    if not torch.compiler.is_exporting():
        return F.scaled_dot_product_attention(q, k, v)
    q, k = q * float(q.shape[-1]) ** -0.5, k.transpose(-1, -2)
    return joined([(part @ k).softmax(-1) @ v for part in in_parts(q, query_parts(q, k), 2)], 2)


def query_parts(q: Tensor, k: Tensor) -> int:
    """In how many parts a graph answers the queries, so that the logits of one stay below ``LOGIT_BYTES``.

    Runtimes write logits to memory: all 4096 x 4096 of SAM ViT-B's 12 heads at once took 3.6 GB in ONNX Runtime, and
    in parts 0.4 GB and no more time (docs/adr/0002). Eager PyTorch keeps the official form.

    Args:
        q, k: (..., N, d) and (..., d, M).
    """
    if not torch.compiler.is_exporting():
        return 1
    size = 4 * q.shape[:-1].numel() * k.shape[-1]
    return 1 << max(0, math.ceil(math.log2(size / LOGIT_BYTES)))


def in_parts(x: Tensor, parts: int, dim: int) -> tuple[Tensor, ...]:
    """Cut along an axis; a single part without an operator."""
    return x.chunk(parts, dim) if parts > 1 else (x,)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Inverse of :func:`in_parts`."""
    return torch.cat(tuple(parts), dim) if len(parts) > 1 else parts[0]


def cubic_matrix(source: int, target: int) -> Tensor:
    """(target, source) weights of torch's bicubic resizing along one axis (half-pixel centres, edges repeated)."""
    eye = torch.eye(source, dtype=torch.float64, device="cpu")[None, None]
    return F.interpolate(eye, size=(target, source), mode="bicubic", align_corners=False)[0, 0].float()


class CubicResize(nn.Module):
    """Bicubic resizing of square maps between fixed sides, as two matrix products.

    No format but ONNX and Core ML has a bicubic operator; products of 64 x 32 entries cost nothing and are exact.
    """

    matrix: Tensor

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.register_buffer("matrix", cubic_matrix(source, target), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, source, source) -> (B, C, target, target)."""
        return self.matrix @ x @ self.matrix.transpose(0, 1)


def cubic_table(table: Tensor, side: int) -> Tensor:
    """Positional table (1, C, s, s) resized bicubically to (1, C, side, side), as the official encoders do."""
    if table.shape[-1] == side:
        return table
    return F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)


class VitBlock(nn.Module):
    """Pre-norm transformer block on a (B, H, W, C) map.

    Everything between the reshapes runs on rows (B, H * W, C), see :class:`LayerNorm2d` for the reason.

    Args:
        attn: self-attention over (B, N, C).
        window: side of the attention windows, which are zero-padded after the norm; 0 for global attention.
    """

    def __init__(self, dim: int, attn: nn.Module, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MlpBlock(dim, 4 * dim, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        rows = x.reshape(b, h * w, c)
        y = self.norm1(rows)
        if self.window:
            windows = self.attn(partition_windows(y.reshape(b, h, w, c), self.window))
            y = merge_windows(windows, self.window, h, w).reshape(b, h * w, c)
        else:
            y = self.attn(y)
        rows = rows + y
        rows = rows + self.mlp(self.norm2(rows))
        z: Tensor = rows.reshape(b, h, w, c)
        return z
