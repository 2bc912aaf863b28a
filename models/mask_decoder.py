"""Two-way transformer and mask decoder (SAM paper, appendix A; official ``transformer.py``, ``mask_decoder.py``)."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketsam.models.layers import LayerNorm2d, MlpBlock

# Finite, so that it survives fp16; exp(-3e4) is exactly zero in every float format.
MASKED = -3e4


class Attention(nn.Module):
    """Multi-head attention with an inner width of ``dim // downsample``."""

    def __init__(self, dim: int, heads: int, downsample: int = 1) -> None:
        super().__init__()
        inner = dim // downsample
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def split(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return x.reshape(b, n, self.heads, c // self.heads).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, Nq, C), (B, Nk, C), (B, Nk, C) and an optional (B, 1, 1, Nk) bias -> (B, Nq, C)."""
        q, k, v = self.split(self.q_proj(q)), self.split(self.k_proj(k)), self.split(self.v_proj(v))
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if bias is not None:
            logits = logits + bias
        x = logits.softmax(-1) @ v
        b, heads, n, d = x.shape
        y: Tensor = self.out_proj(x.transpose(1, 2).reshape(b, n, heads * d))
        return y


class TwoWayBlock(nn.Module):
    """Token self-attention, tokens to image, MLP, image to tokens."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, first: bool) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, heads, 2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MlpBlock(dim, mlp_dim, nn.ReLU())
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, heads, 2)
        self.first = first

    def forward(self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor,
                bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens, bias)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens, bias)
        tokens = self.norm1(tokens)
        keys = image + image_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, keys, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(keys, tokens + token_pe, tokens, bias))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """``depth`` two-way blocks and a last attention from tokens to the image."""

    def __init__(self, dim: int, depth: int = 2, heads: int = 8, mlp_dim: int = 2048) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, heads, mlp_dim, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(dim, heads, 2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Image (B, HW, C), its encoding (1, HW, C), tokens (B, T, C), bias (B, 1, 1, T) -> tokens, image."""
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe, bias)
        update = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + update), image


class Mlp(nn.Module):
    """Linear layers with ReLU between (official ``MLP``)."""

    def __init__(self, dim: int, hidden: int, out: int, depth: int = 3) -> None:
        super().__init__()
        widths = [dim, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        y: Tensor = self.layers[-1](x)
        return y


class MaskDecoder(nn.Module):
    """Returns all four masks: token 0 is the single-mask answer, 1 to 3 the ambiguous ones.

    Args:
        dim: channels of image embedding and tokens.
        mlp_dim: hidden width of the token MLPs.
        high_res_channels: (C0, C1) of skip features added while upscaling (SAM 2 style); empty for none.
        act: activation class of the upscaling path.
    """

    def __init__(self, dim: int = 256, mlp_dim: int = 2048, high_res_channels: tuple[int, ...] = (),
                 act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.masks = 4
        self.transformer = TwoWayTransformer(dim, mlp_dim=mlp_dim)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(self.masks, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            LayerNorm2d(dim // 4),
            act(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2),
            act(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Mlp(dim, dim, dim // 8) for _ in range(self.masks))
        self.iou_prediction_head = Mlp(dim, 256, self.masks)
        if high_res_channels:
            expected = (dim // 8, dim // 4)
            if high_res_channels != expected:
                raise ValueError(f"high_res_channels is {high_res_channels}, expected {expected}")
        self.high_res = bool(high_res_channels)
        # Set by export to an equal form that needs no image-sized transposition.
        self.fast_upscale: nn.Module | None = None

    def upscale(self, image: Tensor, high_res: list[Tensor]) -> Tensor:
        """(B, C, h, w) -> (B, C / 8, 4h, 4w), adding the skip features before each activation."""
        up1, norm, act1, up2, act2 = self.output_upscaling
        if not self.high_res:
            y: Tensor = act2(up2(act1(norm(up1(image)))))
            return y
        y = act1(norm(up1(image) + high_res[1]))
        return act2(up2(y) + high_res[0])  # type: ignore[no-any-return]  # nn.Module calls are untyped

    def upscaled_masks(self, keys: Tensor, hyper: Tensor, h: int, w: int, high_res: list[Tensor]) -> Tensor:
        """Image tokens (B, h * w, C) and hypernetwork outputs (B, 4, C / 8) -> mask logits (B, 4, 4h, 4w)."""
        b, _, c = keys.shape
        if self.fast_upscale is not None:
            masks: Tensor = self.fast_upscale(keys, hyper, h, w, high_res)
            return masks
        upscaled = self.upscale(keys.transpose(1, 2).reshape(b, c, h, w), high_res)
        return (hyper @ upscaled.flatten(2)).reshape(b, self.masks, 4 * h, 4 * w)

    def forward(self, image: Tensor, image_pe: Tensor, prompt_tokens: Tensor, prompt_bias: Tensor | None,
                high_res: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode a batch of prompts on one image.

        Args:
            image: (B, C, h, w) image embedding plus dense prompt.
            image_pe: (1, h * w, C).
            prompt_tokens: (B, N, C).
            prompt_bias: (B, N), 0 for a used slot and ``MASKED`` for an empty one; None when all are used.
            high_res: skip features (1 or B, C0, 4h, 4w) and (1 or B, C1, 2h, 2w), or an empty list.

        Returns:
            low_res_masks (B, 4, 4h, 4w) logits and iou_predictions (B, 4).
        """
        h, w = image.shape[-2:]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])[None].expand(prompt_tokens.shape[0], -1, -1)
        tokens = torch.cat([own, prompt_tokens], dim=1)
        bias = None
        if prompt_bias is not None:
            bias = F.pad(prompt_bias, (own.shape[1], 0))[:, None, None, :]
        tokens, keys = self.transformer(image.flatten(2).transpose(1, 2), image_pe, tokens, bias)
        hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        masks = self.upscaled_masks(keys, hyper, h, w, high_res)
        return masks, self.iou_prediction_head(tokens[:, 0])
