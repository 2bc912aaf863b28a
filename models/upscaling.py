"""Upscaling by 2 x 2 transposed convolutions as matrix products: positions in blocks, channels last."""

from __future__ import annotations

from torch import Tensor, nn


def as_matrix(conv: nn.ConvTranspose2d) -> Tensor:
    """Weight (Cin, Cout, 2, 2) -> (Cin, 4 * Cout), row-major over ky, kx, Cout."""
    weight = conv.weight.detach()
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def blocked(feature: Tensor, h: int, w: int, levels: int) -> Tensor:
    """Skip feature (B, C, h * 2^levels, w * 2^levels) -> (B, h * w * 4^levels, C) in the order of the products.

    Every level moves one bit of row and column inside: [.. y, ky, x, kx, rest] -> [.. y, x, ky, kx, rest].
    """
    b, c, _, _ = feature.shape
    x = feature.permute(0, 2, 3, 1)
    inner = c
    for level in reversed(range(levels)):
        rows, cols = b * (h << level), w << level
        x = x.reshape(rows, 2, cols, 2 * inner).transpose(1, 2)
        inner *= 4
    return x.reshape(b, h * w * 4**levels, c)


def unblocked(masks: Tensor, h: int, w: int) -> Tensor:
    """(B, M, 16 * h * w) in the order of :func:`blocked` -> (B, M, 4h, 4w).

    Memory order is (Y, X, ky1, kx1, ky2, kx2); two 4-D transpositions make it rows and columns.
    """
    b, m, _ = masks.shape
    masks = masks.reshape(b * m * h, w, 2, 8).transpose(1, 2)
    masks = masks.reshape(b * m * h * 2, w * 2, 2, 2).transpose(1, 2)
    return masks.reshape(b, m, 4 * h, 4 * w)
