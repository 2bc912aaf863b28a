"""Two-way transformer and mask decoder (SAM paper, appendix A; official ``transformer.py``, ``mask_decoder.py``)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketsam.models.layers import LayerNorm2d, MlpBlock

# Finite, so that it survives fp16; exp(-3e4) is exactly zero in every float format.
MASKED = -3e4


@dataclass(frozen=True)
class Style:
    """Where the decoders of the families differ; the defaults are SAM's.

    Attributes:
        norm_eps: of the transformer's layer norms (EfficientViT-SAM: 1e-6).
        mlp_act: activation inside the token MLPs (EfficientSAM: GELU).
        residual_pe: token encodings stay in the residual and the values of self-attention (EfficientSAM).
        group_norm: one norm over the whole upscaled map instead of one a pixel (EfficientSAM).
        object_score: a token and a head that say whether there is an object (SAM 2).
        iou_sigmoid: predicted IoU goes through a sigmoid (SAM 2).
        hq: an HQ token whose mask, made with early image features, is added to every mask (SAM-HQ).
    """

    norm_eps: float = 1e-5
    mlp_act: type[nn.Module] = nn.ReLU
    residual_pe: bool = False
    group_norm: bool = False
    object_score: bool = False
    iou_sigmoid: bool = False
    hq: bool = False


SAM_STYLE = Style()


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

    def __init__(self, dim: int, heads: int, mlp_dim: int, first: bool, style: Style = SAM_STYLE) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads)
        self.norm1 = nn.LayerNorm(dim, eps=style.norm_eps)
        self.cross_attn_token_to_image = Attention(dim, heads, 2)
        self.norm2 = nn.LayerNorm(dim, eps=style.norm_eps)
        self.mlp = MlpBlock(dim, mlp_dim, style.mlp_act())
        self.norm3 = nn.LayerNorm(dim, eps=style.norm_eps)
        self.norm4 = nn.LayerNorm(dim, eps=style.norm_eps)
        self.cross_attn_image_to_token = Attention(dim, heads, 2)
        self.first = first
        self.residual_pe = style.residual_pe

    def forward(self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor,
                bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.residual_pe:
            tokens = tokens if self.first else tokens + token_pe
            tokens = tokens + self.self_attn(tokens, tokens, tokens, bias)
        elif self.first:
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

    def __init__(self, dim: int, depth: int = 2, heads: int = 8, mlp_dim: int = 2048, style: Style = SAM_STYLE) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, heads, mlp_dim, i == 0, style) for i in range(depth))
        self.final_attn_token_to_image = Attention(dim, heads, 2)
        self.norm_final_attn = nn.LayerNorm(dim, eps=style.norm_eps)

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Image (B, HW, C), its encoding (1, HW, C), tokens (B, T, C), bias (B, 1, 1, T) -> tokens, image."""
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe, bias)
        update = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + update), image


class Mlp(nn.Module):
    """Linear layers with an activation between (official ``MLP``)."""

    def __init__(self, dim: int, hidden: int, out: int, depth: int = 3, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.act = act()
        widths = [dim, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        y: Tensor = self.layers[-1](x)
        return y


class MaskDecoder(nn.Module):
    """Returns all four masks: token 0 is the single-mask answer, 1 to 3 the ambiguous ones.

    Args:
        dim: channels of image embedding and tokens.
        mlp_dim: hidden width of the token MLPs.
        high_res_channels: (C0, C1) of skip features added while upscaling (SAM 2 style); empty for none.
        act: activation class of the upscaling path.
        style: where the family's decoder differs from SAM's.
    """

    def __init__(self, dim: int = 256, mlp_dim: int = 2048, high_res_channels: tuple[int, ...] = (),
                 act: type[nn.Module] = nn.GELU, style: Style = SAM_STYLE) -> None:
        super().__init__()
        self.masks = 4
        self.style = style
        self.transformer = TwoWayTransformer(dim, mlp_dim=mlp_dim, style=style)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(self.masks, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            nn.GroupNorm(1, dim // 4) if style.group_norm else LayerNorm2d(dim // 4),
            act(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2),
            act(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            Mlp(dim, dim, dim // 8, act=style.mlp_act) for _ in range(self.masks))
        self.iou_prediction_head = Mlp(dim, 256, self.masks, act=style.mlp_act)
        if style.object_score:
            self.obj_score_token = nn.Embedding(1, dim)
            self.pred_obj_score_head = Mlp(dim, dim, 1)
        if style.hq:
            self.hf_token = nn.Embedding(1, dim)
            self.hf_mlp = Mlp(dim, dim, dim // 8)
            self.embedding_maskfeature = nn.Sequential(
                nn.Conv2d(dim // 8, dim // 4, 3, padding=1), LayerNorm2d(dim // 4), nn.GELU(),
                nn.Conv2d(dim // 4, dim // 8, 3, padding=1))
        if high_res_channels:
            expected = (dim // 8, dim // 4)
            if high_res_channels != expected:
                raise ValueError(f"high_res_channels is {high_res_channels}, expected {expected}")
        self.high_res = bool(high_res_channels)
        # Set by export to an equal form that needs no image-sized transposition.
        self.fast_upscale: nn.Module | None = None

    def own_tokens(self) -> Tensor:
        """(T, C) learned tokens in the official order: object score, predicted IoU, masks, HQ."""
        parts = [self.iou_token.weight, self.mask_tokens.weight]
        if self.style.object_score:
            parts.insert(0, self.obj_score_token.weight)
        if self.style.hq:
            parts.append(self.hf_token.weight)
        return torch.cat(parts)

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

    def hq_masks(self, keys: Tensor, hyper: Tensor, hq_token: Tensor, h: int, w: int, hq_features: Tensor) -> Tensor:
        """All masks plus the HQ mask, from upscaled features that both need (SAM-HQ).

        Args:
            keys: (B, h * w, C).
            hyper: (B, 4, C / 8).
            hq_token: (B, C), the HQ token after the transformer.
            hq_features: (1 or B, C / 8, 4h, 4w).
        """
        masks, hq = self.raw_masks(keys, hyper, hq_token, h, w, hq_features)
        return masks + hq

    def raw_masks(self, keys: Tensor, hyper: Tensor, hq_token: Tensor, h: int, w: int,
                  hq_features: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`hq_masks`, but SAM's masks (B, 4, 4h, 4w) and the HQ mask (B, 1, 4h, 4w) apart."""
        b, _, c = keys.shape
        upscaled = self.upscale(keys.transpose(1, 2).reshape(b, c, h, w), [])
        fine = self.embedding_maskfeature(upscaled) + hq_features
        masks = (hyper @ upscaled.flatten(2)).reshape(b, self.masks, 4 * h, 4 * w)
        hq = self.hf_mlp(hq_token)[:, None] @ fine.flatten(2)
        return masks, hq.reshape(b, 1, 4 * h, 4 * w)

    def forward(self, image: Tensor, image_pe: Tensor, prompt_tokens: Tensor, prompt_bias: Tensor | None,
                high_res: list[Tensor], hq_features: Tensor | None = None) -> tuple[Tensor, ...]:
        """Decode a batch of prompts on one image.

        Args:
            image: (B, C, h, w) image embedding plus dense prompt.
            image_pe: (1, h * w, C).
            prompt_tokens: (B, N, C).
            prompt_bias: (B, N), 0 for a used slot and ``MASKED`` for an empty one; None when all are used.
            high_res: skip features (1 or B, C0, 4h, 4w) and (1 or B, C1, 2h, 2w), or an empty list.
            hq_features: (1 or B, C / 8, 4h, 4w) early image features of SAM-HQ.

        Returns:
            low_res_masks (B, 4, 4h, 4w) logits, iou_predictions (B, 4) and, where the style has it,
            object_score_logits (B, 1).
        """
        h, w = image.shape[-2:]
        tokens, keys = self.attend(image, image_pe, prompt_tokens, prompt_bias)
        first = int(self.style.object_score)
        hyper = torch.stack([mlp(tokens[:, first + 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
        iou = self.iou_prediction_head(tokens[:, first])
        iou = iou.sigmoid() if self.style.iou_sigmoid else iou
        if self.style.hq:
            assert hq_features is not None
            return self.hq_masks(keys, hyper, tokens[:, 1 + self.masks], h, w, hq_features), iou
        masks = self.upscaled_masks(keys, hyper, h, w, high_res)
        return (masks, iou, self.pred_obj_score_head(tokens[:, 0])) if self.style.object_score else (masks, iou)

    def attend(self, image: Tensor, image_pe: Tensor, prompt_tokens: Tensor,
               prompt_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Own and prompt tokens through the transformer -> tokens (B, T + N, C) and image (B, h * w, C)."""
        own = self.own_tokens()[None].expand(prompt_tokens.shape[0], -1, -1)
        tokens = torch.cat([own, prompt_tokens], dim=1)
        bias = None
        if prompt_bias is not None:
            bias = F.pad(prompt_bias, (own.shape[1], 0))[:, None, None, :]
        result: tuple[Tensor, Tensor] = self.transformer(image.flatten(2).transpose(1, 2), image_pe, tokens, bias)
        return result
