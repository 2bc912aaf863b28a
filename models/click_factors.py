"""The decoder's weights folded for :mod:`pocketsam.models.click_decoder`, and the layouts that it works in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketsam.models.mask_decoder import MaskDecoder, TwoWayBlock
from pocketsam.models.upscaling import as_matrix

# Weights below e^-36 are 2e-16: lost in float32's rounding, but their products would be denormal numbers, which
# processors of Intel take a hundred cycles for.
LEAST_EXPONENT = -36.0


class Folded:
    """The decoder's layers by name and its weights in the folded forms, in double precision.

    Matrices act on rows from the right, (in, out); ``w_out`` are output projections (D, C) centred over C.
    """

    def __init__(self, decoder: MaskDecoder) -> None:
        first, second = decoder.transformer.layers
        assert isinstance(first, TwoWayBlock)
        assert isinstance(second, TwoWayBlock)
        self.first, self.second, self.final = first, second, decoder.transformer.final_attn_token_to_image
        self.heads = first.self_attn.heads
        self.g1, self.b1 = double(first.norm4.weight), double(first.norm4.bias)
        self.g2, self.b2 = double(second.norm4.weight), double(second.norm4.bias)
        to1, to2 = first.cross_attn_image_to_token, second.cross_attn_image_to_token
        self.scale = (to1.q_proj.out_features // self.heads) ** -0.5
        self.w_out1 = centred(matrix(to1.out_proj))
        self.w_out2 = centred(matrix(to2.out_proj))
        self.w_out1_next = centred(self.w_out1 * self.g1)
        self.carried = centred(self.b1 + double(to2.out_proj.bias))
        up = decoder.output_upscaling[0]
        assert isinstance(up, nn.ConvTranspose2d)
        assert up.bias is not None
        self.w_up = as_matrix(up).double() * self.g2[:, None]
        self.b_up = self.b2 @ as_matrix(up).double() + double(up.bias).repeat(4)


def second_upscaling(decoder: MaskDecoder) -> nn.ConvTranspose2d:
    """The second transposed convolution, which has a bias."""
    up = decoder.output_upscaling[3]
    assert isinstance(up, nn.ConvTranspose2d)
    return up


def double(x: Tensor | None) -> Tensor:
    """Detached, in double precision."""
    assert x is not None
    return x.detach().double()


def matrix(linear: nn.Linear) -> Tensor:
    """(in, out) in double precision."""
    return double(linear.weight).T


def centred(x: Tensor) -> Tensor:
    """Without the mean over the last axis."""
    return x - x.mean(-1, keepdim=True)


def keep(module: nn.Module, **tensors: Tensor) -> None:
    """Register constants as float32."""
    for name, value in tensors.items():
        module.register_buffer(name, value.float().contiguous(), persistent=False)


def by_head(matrix: Tensor, heads: int) -> Tensor:
    """(H d, C) -> (H, d, C)."""
    return matrix.reshape(heads, -1, matrix.shape[-1])


def to_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H d) -> (H, B T, d): the image is shared, so that prompts lie beside each other in one product."""
    b, t, c = x.shape
    return x.reshape(b * t, heads, c // heads).transpose(0, 1)


def joined(x: Tensor, b: int) -> Tensor:
    """Inverse of :func:`to_heads`."""
    return x.transpose(0, 1).reshape(b, x.shape[1] // b, -1)


def to_rows(x: Tensor, b: int) -> Tensor:
    """(H, B T, N) -> (B, H T, N)."""
    h, _, n = x.shape
    return x.reshape(h, b, -1, n).transpose(0, 1).reshape(b, -1, n)


def from_rows(x: Tensor, heads: int) -> Tensor:
    """Inverse of :func:`to_rows`."""
    b, _, n = x.shape
    return x.reshape(b, heads, -1, n).transpose(0, 1).reshape(heads, -1, n)


def softmax_over_positions(x: Tensor) -> Tensor:
    """Softmax over the last axis, without denormal numbers."""
    return torch.maximum(x, x.amax(-1, keepdim=True) + LEAST_EXPONENT).softmax(-1)


def softmax_over_tokens(x: Tensor) -> Tensor:
    """Softmax over axis 1 of (B, T, N), spelled out: for an inner axis engines transpose, at three times the cost."""
    e = (x - x.amax(1, keepdim=True)).clamp(min=LEAST_EXPONENT).exp()
    return e / e.sum(1, keepdim=True)


def gram(m: Tensor) -> Tensor:
    """(B, rows, C) -> (B, rows, rows) products over C, divided by C."""
    return (m / m.shape[-1]) @ m.transpose(1, 2)
