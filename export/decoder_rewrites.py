"""Exact rewrites of the prompt decoder before conversion, for the formats that gain by them; see ``rewrites``."""

from __future__ import annotations

import copy
import math

from torch import Tensor, nn

from pocketsam.models.layers import LayerNorm2d
from pocketsam.models.mask_decoder import Attention, MaskDecoder, TwoWayBlock
from pocketsam.models.sam import SegmentAnything
from pocketsam.models.upscaling import as_matrix, blocked, unblocked


def with_absorbed_decoder(model: SegmentAnything) -> SegmentAnything:
    """The same model with a decoder of its own (16 MB) whose projections are absorbed; for formats that gain by it."""
    decoder = copy.deepcopy(model.mask_decoder)
    absorb_projections(decoder)
    return SegmentAnything(model.spec, model.image_encoder, model.prompt_encoder, decoder).eval().requires_grad_(False)


def absorb_projections(decoder: MaskDecoder) -> None:
    """Reason: with a dozen tokens, projecting 4096 image positions and transposing heads costs more than the attention.

    With h heads of width d, token-to-image logits are q_h (x W_k,h)^T = (q_h W_k,h^T) x^T: the projection moves to
    the token side, and likewise for values, for the image queries and for the output projection. Fewer
    multiplications while (tokens x heads) < 2 x inner width, and no transposition of image-sized tensors.
    """
    transformer = decoder.transformer
    for block in transformer.layers:
        assert isinstance(block, TwoWayBlock)
        block.cross_attn_token_to_image = TokenToImage(block.cross_attn_token_to_image)  # type: ignore[assignment]
        block.cross_attn_image_to_token = ImageToToken(block.cross_attn_image_to_token)  # type: ignore[assignment]
    final = TokenToImage(transformer.final_attn_token_to_image)
    transformer.final_attn_token_to_image = final  # type: ignore[assignment]


def matmul_upscale(decoder: MaskDecoder) -> None:
    """Reason: see :class:`MatmulUpscale`. SAM-HQ's fine features are convolved, so they need spatial order."""
    if not decoder.style.hq:
        decoder.fast_upscale = MatmulUpscale(decoder)


def _by_head(linear: nn.Linear, heads: int) -> Tensor:
    """Weight (h * d, C) -> (h, d, C)."""
    return linear.weight.detach().reshape(heads, -1, linear.in_features)


class TokenToImage(nn.Module):
    """Cross-attention from few tokens to many image positions, projections absorbed on the token side."""

    w_k: Tensor
    w_v: Tensor

    def __init__(self, source: Attention) -> None:
        super().__init__()
        self.heads = source.heads
        width = source.q_proj.out_features // source.heads
        self.q_proj, self.out_proj = source.q_proj, source.out_proj
        # The key bias adds the same value to every logit of a row, which softmax ignores.
        self.register_buffer("w_k", _by_head(source.k_proj, self.heads) / math.sqrt(width))
        self.register_buffer("w_v", _by_head(source.v_proj, self.heads).transpose(1, 2).contiguous())
        self.v_bias = nn.Parameter(source.v_proj.bias.detach().reshape(1, self.heads, 1, width))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, T, C), image keys (B, HW, C), image values (B, HW, C) -> (B, T, C)."""
        b, t, _ = q.shape
        c = k.shape[-1]
        q = self.q_proj(q).reshape(b, t, self.heads, -1).transpose(1, 2)
        q = (q @ self.w_k).reshape(b, self.heads * t, c)
        x = (q @ k.transpose(1, 2)).softmax(-1) @ v
        x = x.reshape(b, self.heads, t, c) @ self.w_v + self.v_bias
        y: Tensor = self.out_proj(x.transpose(1, 2).reshape(b, t, -1))
        return y


class ImageToToken(nn.Module):
    """Cross-attention from many image positions to few tokens, projections absorbed on the token side."""

    w_q: Tensor
    w_o: Tensor

    def __init__(self, source: Attention) -> None:
        super().__init__()
        self.heads = source.heads
        width = source.q_proj.out_features // source.heads
        scale = 1 / math.sqrt(width)
        self.k_proj, self.v_proj = source.k_proj, source.v_proj
        self.register_buffer("w_q", _by_head(source.q_proj, self.heads) * scale)
        self.q_bias = nn.Parameter(source.q_proj.bias.detach().reshape(1, self.heads, width, 1) * scale)
        out = source.out_proj.weight.detach()
        self.register_buffer("w_o", out.reshape(out.shape[0], self.heads, width).permute(1, 2, 0).contiguous())
        self.out_bias = source.out_proj.bias

    def split(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        return x.reshape(b, t, self.heads, c // self.heads).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Image queries (B, HW, C), tokens (B, T, C) twice, bias (B, 1, 1, T) -> (B, HW, C)."""
        b, n, c = q.shape
        t = k.shape[1]
        keys, values = self.split(self.k_proj(k)), self.split(self.v_proj(v))
        row = (keys @ self.q_bias).transpose(-1, -2)
        if bias is not None:
            row = row + bias
        weight = (keys @ self.w_q).reshape(b, self.heads * t, c)
        logits = q @ weight.transpose(1, 2) + row.reshape(b, 1, self.heads * t)
        attention = logits.reshape(b, n, self.heads, t).softmax(-1).reshape(b, n, self.heads * t)
        return attention @ (values @ self.w_o).reshape(b, self.heads * t, c) + self.out_bias


class MatmulUpscale(nn.Module):
    """Both 2x2 transposed convolutions as matrix products, channels last; only the finished masks are reordered.

    Reason: kernel equals stride, so each input pixel makes its own 2x2 block; norm, activation and the product with
    the hypernetworks act per pixel and need no spatial order. No image-sized transposition is left.
    """

    w1: Tensor
    w2: Tensor
    b1: Tensor
    b2: Tensor

    def __init__(self, decoder: MaskDecoder) -> None:
        super().__init__()
        up1, norm, act1, up2, act2 = decoder.output_upscaling
        assert isinstance(up1, nn.ConvTranspose2d)
        assert isinstance(up2, nn.ConvTranspose2d)
        assert up1.bias is not None
        assert up2.bias is not None
        self.register_buffer("w1", as_matrix(up1))
        self.register_buffer("w2", as_matrix(up2))
        # Tiled, so that product and bias stay one Gemm.
        self.register_buffer("b1", up1.bias.detach().repeat(4))
        self.register_buffer("b2", up2.bias.detach().repeat(4))
        assert isinstance(norm, (LayerNorm2d, nn.GroupNorm))
        self.norm = norm
        self.act1, self.act2 = act1, act2

    def normed(self, x: Tensor) -> Tensor:
        """(B, N, C): layer norm over channels, or EfficientSAM's over everything."""
        norm = self.norm
        if isinstance(norm, nn.GroupNorm):
            return nn.functional.layer_norm(x, x.shape[1:], None, None, norm.eps) * norm.weight + norm.bias
        return nn.functional.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)

    def forward(self, keys: Tensor, hyper: Tensor, h: int, w: int, high_res: list[Tensor]) -> Tensor:
        """Image tokens (B, h * w, C), hyper (B, 4, C / 8) and skip features or none -> masks (B, 4, 4h, 4w)."""
        b, n, _ = keys.shape
        c1, c2 = self.norm.weight.shape[0], hyper.shape[-1]
        x = (keys @ self.w1 + self.b1).reshape(b, n * 4, c1)
        if high_res:
            x = x + blocked(high_res[1], h, w, 1)
        x = self.act1(self.normed(x))
        x = (x @ self.w2 + self.b2).reshape(b, n * 16, c2)
        if high_res:
            x = x + blocked(high_res[0], h, w, 2)
        x = self.act2(x)
        masks: Tensor = hyper @ x.transpose(1, 2)
        return unblocked(masks, h, w)
