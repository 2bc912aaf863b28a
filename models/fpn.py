"""SAM 2's image encoder around a trunk: feature pyramid, skip features, "no memory" vector (official
``image_encoder.py`` and the image path of ``sam2_base.py``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketsam.models.hiera import Hiera
from pocketsam.models.rep_vit import RepVitTrunk


class PyramidEncoder(nn.Module):
    """Trunk, lateral convolutions, top-down sum at stride 16 only, and the decoder's skip convolutions.

    Args:
        trunk: gives maps at strides 4, 8, 16 and 32 and knows their ``widths``.
        dim: channels of the embedding.
        skips: channels (C0, C1) of the skip features.
    """

    def __init__(self, trunk: Hiera | RepVitTrunk, dim: int, skips: tuple[int, int]) -> None:
        super().__init__()
        self.trunk = trunk
        # Official order: coarsest first.
        self.laterals = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in reversed(trunk.widths))
        self.conv_s0 = nn.Conv2d(dim, skips[0], 1)
        self.conv_s1 = nn.Conv2d(dim, skips[1], 1)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, dim))

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image."""
        return self.trunk.stem

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised image to features.

        Args:
            x: (B, 3, S, S).

        Returns:
            ``image_embeddings`` (B, C, S / 16, S / 16), ``high_res_features_0`` (B, C0, S / 4, S / 4) and
            ``high_res_features_1`` (B, C1, S / 8, S / 8).
        """
        x4, x8, x16, x32 = self.trunk(x)
        lateral32, lateral16, lateral8, lateral4 = self.laterals
        y = lateral16(x16) + F.interpolate(lateral32(x32), scale_factor=2.0, mode="nearest")
        return {"image_embeddings": y + self.no_mem_embed.reshape(1, -1, 1, 1),
                "high_res_features_0": self.conv_s0(lateral4(x4)), "high_res_features_1": self.conv_s1(lateral8(x8))}
