"""Prompt encoder: points, box corners and masks to tokens (SAM paper, section 3 and appendix A)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pocketsam.models.layers import LayerNorm2d

EMPTY_SLOT = -2
PADDING_POINT = -1


class PositionEmbedding(nn.Module):
    """Random spatial frequencies (Tancik et al. 2020), fixed after training."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, features))

    def forward(self, coords: Tensor) -> Tensor:
        """(..., 2) XY in [0, 1] -> (..., 2 * features)."""
        angle = 2 * math.pi * ((2 * coords - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Official ``prompt_encoder.py`` with labels 0 to 3, -1 (padding point) and -2 (empty slot) in one arithmetic form.

    Args:
        dim: channels of the embeddings.
        embed_size: side h of the image embedding.
        image_size: side S of the frame that coordinates live in.
        mask_channels: hidden channels of the mask downscaling; 0 for a model without mask prompts.
        act: activation class of the mask downscaling.
        labels: labels with an embedding of their own; the others add nothing to the position.
        padding_position: whether padding points keep their positional encoding.
    """

    def __init__(self, dim: int, embed_size: int, image_size: int, mask_channels: int = 16,
                 act: type[nn.Module] = nn.GELU, labels: tuple[int, ...] = (0, 1, 2, 3),
                 padding_position: bool = False) -> None:
        super().__init__()
        self.embed_size = embed_size
        self.image_size = image_size
        self.first_label = PADDING_POINT if padding_position else 0
        self.pe_layer = PositionEmbedding(dim // 2)
        self.point_embeddings = nn.ModuleDict({str(k): nn.Embedding(1, dim) for k in labels})
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.takes_masks = mask_channels > 0
        if not self.takes_masks:
            return
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, 2, stride=2),
            LayerNorm2d(mask_channels // 4),
            act(),
            nn.Conv2d(mask_channels // 4, mask_channels, 2, stride=2),
            LayerNorm2d(mask_channels),
            act(),
            nn.Conv2d(mask_channels, dim, 1),
        )
        self.no_mask_embed = nn.Embedding(1, dim)

    def dense_pe(self) -> Tensor:
        """(1, h * w, C) positional encoding of the embedding grid's cell centres."""
        n = self.embed_size
        centre = (torch.arange(n, dtype=torch.float32, device=self.not_a_point_embed.weight.device) + 0.5) / n
        grid = torch.stack([centre.expand(n, n), centre[:, None].expand(n, n)], dim=-1)
        y: Tensor = self.pe_layer(grid)
        return y.reshape(1, n * n, -1)

    def points(self, coords: Tensor, labels: Tensor) -> Tensor:
        """(B, N, 2) XY pixels in the S x S frame and (B, N) labels -> (B, N, C); empty slots give zeros."""
        pe = self.pe_layer((coords + 0.5) / self.image_size)
        label = labels[..., None]
        tokens: Tensor = pe * (label >= self.first_label).to(pe.dtype)
        kinds = ((int(k), v) for k, v in self.point_embeddings.items())
        for value, embedding in ((PADDING_POINT, self.not_a_point_embed), *kinds):
            assert isinstance(embedding, nn.Embedding)
            tokens = tokens + (label == value).to(pe.dtype) * embedding.weight
        return tokens

    def masks(self, mask_input: Tensor, has_mask: Tensor) -> Tensor:
        """(B, 1, 4h, 4w) logits and (B,) flags -> dense (B, C, h, w): mask embedding or 'no mask', never both."""
        flag = (has_mask > 0.5).to(mask_input.dtype)[:, None, None, None]
        empty = self.no_mask_embed.weight[..., None, None]
        y: Tensor = self.mask_downscaling(mask_input) * flag + empty * (1 - flag)
        return y

    def no_mask(self) -> Tensor | None:
        """(1, C, 1, 1) dense embedding for prompts without a mask; None where the model takes no masks."""
        return self.no_mask_embed.weight[..., None, None] if self.takes_masks else None
