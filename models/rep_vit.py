"""RepViT image encoders: RepViT-SAM (``repvit.py``), EdgeSAM (``rep_vit.py``) and the trunk of EdgeTAM (timm's M1).

Names follow the official ``features`` list; EdgeTAM's timm names are renamed to it, because the network is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pocketsam.models.layers import CubicResize, neck
from pocketsam.models.tiny_vit import ConvBn

# Blocks a stage; the last block of each stage but the last never has squeeze-excite.
M1_WIDTHS, M1_DEPTHS = (48, 96, 192, 384), (3, 3, 15, 2)
SAM_WIDTHS, SAM_DEPTHS = (80, 160, 320, 640), (7, 7, 35, 2)


class SqueezeExcite(nn.Module):
    """Channel gates from the mean of the map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(8, (dim // 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class RepMixer(nn.Module):
    """Depthwise 3x3, depthwise 1x1 and identity, summed: one 3x3 convolution after export.

    Args:
        outer_norm: RepViT-SAM's form, where the 1x1 has a bias and BatchNorm follows the sum.
    """

    def __init__(self, dim: int, outer_norm: bool) -> None:
        super().__init__()
        self.conv = ConvBn(dim, dim, 3, 1, 1, groups=dim)
        self.conv1 = nn.Conv2d(dim, dim, 1, groups=dim) if outer_norm else ConvBn(dim, dim, groups=dim)
        self.bn = nn.BatchNorm2d(dim) if outer_norm else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + self.conv1(x) + x
        return y if self.bn is None else self.bn(y)


class ChannelMixer(nn.Module):
    """Residual pointwise expansion by two."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.m = nn.Sequential(ConvBn(dim, 2 * dim), nn.GELU(), ConvBn(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.m(x)
        return y


class Block(nn.Module):
    """Token mixer, squeeze-excite or nothing, channel mixer."""

    def __init__(self, dim: int, excite: bool, outer_norm: bool) -> None:
        super().__init__()
        self.token_mixer = nn.Sequential(RepMixer(dim, outer_norm), SqueezeExcite(dim) if excite else nn.Identity())
        self.channel_mixer = ChannelMixer(dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.channel_mixer(self.token_mixer(x))
        return y


class Downsample(nn.Module):
    """Depthwise 3x3 with stride, pointwise to the new width, channel mixer."""

    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__()
        self.token_mixer = nn.Sequential(ConvBn(dim, dim, 3, stride, 1, groups=dim), nn.Identity(), ConvBn(dim, out))
        self.channel_mixer = ChannelMixer(out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.channel_mixer(self.token_mixer(x))
        return y


def features(widths: Sequence[int], depths: Sequence[int], outer_norm: bool, last_stride: int) -> nn.ModuleList:
    """The official list of layers: stem, then the stages with a downsampling block between."""
    first = widths[0]
    layers: list[nn.Module] = [nn.Sequential(ConvBn(3, first // 2, 3, 2, 1), nn.GELU(),
                                             ConvBn(first // 2, first, 3, 2, 1))]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if i:
            layers.append(Downsample(widths[i - 1], width, last_stride if i == len(widths) - 1 else 2))
        layers += [Block(width, j % 2 == 0 and j < depth - 1, outer_norm) for j in range(depth)]
    return nn.ModuleList(layers)


class RepVit(nn.Module):
    """RepViT-SAM's encoder: four stages, the last at stride 16, and SAM's neck."""

    def __init__(self, out: int = 256) -> None:
        super().__init__()
        self.features = features(SAM_WIDTHS, SAM_DEPTHS, outer_norm=True, last_stride=1)
        self.neck = neck(SAM_WIDTHS[-1], out)

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image: a ``ConvBn``, or the fused convolution."""
        return self.features[0][0]  # type: ignore[no-any-return, index]  # a Sequential

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> ``image_embeddings`` (B, 256, S / 16, S / 16)."""
        for layer in self.features:
            x = layer(x)
        return {"image_embeddings": self.neck(x)}


class EdgeSamEncoder(nn.Module):
    """RepViT-M1 with the maps at strides 16 and 32 fused, and SAM's neck.

    Args:
        image_size: side S; the coarse map is enlarged bicubically by two.
    """

    def __init__(self, image_size: int = 1024, out: int = 256) -> None:
        super().__init__()
        self.features = features(M1_WIDTHS, M1_DEPTHS, outer_norm=False, last_stride=2)
        # Index of the last layer at stride 16.
        self.tap = len(self.features) - M1_DEPTHS[-1] - 2
        self.fuse_stage2 = nn.Conv2d(M1_WIDTHS[2], out, 1, bias=False)
        self.fuse_stage3 = nn.Conv2d(M1_WIDTHS[3], out, 1, bias=False)
        self.enlarge = CubicResize(image_size // 32, image_size // 16)
        self.neck = neck(out, out)

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image: a ``ConvBn``, or the fused convolution."""
        return self.features[0][0]  # type: ignore[no-any-return, index]  # a Sequential

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> ``image_embeddings`` (B, 256, S / 16, S / 16)."""
        fine = x
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i == self.tap:
                fine = x
        fused = self.fuse_stage2(fine) + self.enlarge(self.fuse_stage3(x))
        return {"image_embeddings": self.neck(fused)}


class RepVitTrunk(nn.Module):
    """EdgeTAM's trunk: RepViT-M1, one map a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.features = features(M1_WIDTHS, M1_DEPTHS, outer_norm=False, last_stride=2)
        # timm ends a stage before the block that precedes downsampling.
        ends = [sum(M1_DEPTHS[:i + 1]) + i for i in range(4)]
        self.taps = tuple(end - 1 if i < 3 else end for i, end in enumerate(ends))
        self.widths = M1_WIDTHS

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image: a ``ConvBn``, or the fused convolution."""
        return self.features[0][0]  # type: ignore[no-any-return, index]  # a Sequential

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, S, S) -> maps at strides 4, 8, 16 and 32."""
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                maps.append(x)
        return maps
