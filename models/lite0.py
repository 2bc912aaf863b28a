"""lite0, the built-in model: EfficientNet-Lite0 trunk, a small feature pyramid, SAM's prompt encoder and decoder.

Every operator of the encoder is a convolution, a BatchNorm that export folds away, ReLU6, an addition or a nearest
upsampling by two, because those quantize well everywhere. Padding is symmetric, so that no runtime needs a separate
pad operator; the TensorFlow original pads right and bottom more, which only shifts the grid by one pixel per stride.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pocketsam.models.catalog import SPECS
from pocketsam.models.mask_decoder import MaskDecoder
from pocketsam.models.prompt_encoder import PromptEncoder
from pocketsam.models.sam import SegmentAnything
from pocketsam.models.tiny_vit import ConvBn

STRIDE = 16
DECODER_MLP = 1024
SPEC = SPECS["lite0"]
MEAN, STD = SPEC.mean, SPEC.std
SKIP_CHANNELS = (SPEC.high_res_channels[0], SPEC.high_res_channels[1])


class Stage(NamedTuple):
    """Blocks of equal width: the first one has the stride, all share expansion and kernel."""

    blocks: int
    width: int
    stride: int
    expand: int
    kernel: int


STEM_WIDTH = 32
# EfficientNet-B0's stages (Tan and Le 2019, table 1); Lite0 drops squeeze-excite and uses ReLU6.
STAGES = (
    Stage(1, 16, 1, 1, 3),
    Stage(2, 24, 2, 6, 3),
    Stage(2, 40, 2, 6, 5),
    Stage(3, 80, 2, 6, 3),
    Stage(3, 112, 1, 6, 5),
    Stage(4, 192, 2, 6, 5),
    Stage(1, 320, 1, 6, 3),
)
# Indices into STAGES of the last stage at strides 4, 8, 16 and 32.
TAPS = (1, 2, 4, 6)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; ReLU6 after the first two; a residual sum where shapes allow it."""

    def __init__(self, width: int, out: int, stride: int, expand: int, kernel: int) -> None:
        super().__init__()
        hidden = width * expand
        self.expand = ConvBn(width, hidden) if expand > 1 else None
        self.depthwise = ConvBn(hidden, hidden, kernel, stride, kernel // 2, groups=hidden)
        self.project = ConvBn(hidden, out)
        self.act = nn.ReLU6()
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H / stride, W / stride)."""
        y: Tensor = x if self.expand is None else self.act(self.expand(x))
        y = self.project(self.act(self.depthwise(y)))
        return x + y if self.residual else y


class Trunk(nn.Module):
    """EfficientNet-Lite0 without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(3, STEM_WIDTH, 3, 2, 1)
        self.act = nn.ReLU6()
        self.stages = nn.ModuleList()
        width = STEM_WIDTH
        for stage in STAGES:
            blocks = []
            for i in range(stage.blocks):
                stride = stage.stride if i == 0 else 1
                blocks.append(InvertedResidual(width, stage.width, stride, stage.expand, stage.kernel))
                width = stage.width
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, S, S) -> maps of 24, 40, 112 and 320 channels at strides 4, 8, 16 and 32."""
        x = self.act(self.stem(x))
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in TAPS:
                maps.append(x)
        return maps


class Pyramid(nn.Module):
    """Top-down paths from stride 32 to 16 (the embedding), then to 8 and 4 (the skip features).

    Args:
        dim: channels C of the embedding.
        skips: channels (C0, C1) at strides 4 and 8.
    """

    def __init__(self, dim: int, skips: tuple[int, int]) -> None:
        super().__init__()
        c4, c8, c16, c32 = (STAGES[i].width for i in TAPS)
        self.lateral32 = ConvBn(c32, dim)
        self.lateral16 = ConvBn(c16, dim)
        self.blocks = nn.Sequential(*(InvertedResidual(dim, dim, 1, 2, 5) for _ in range(2)))
        self.lateral8 = ConvBn(c8, skips[1])
        self.down8 = ConvBn(dim, skips[1])
        self.smooth8 = ConvBn(skips[1], skips[1], 3, 1, 1)
        self.lateral4 = ConvBn(c4, skips[0])
        self.down4 = ConvBn(skips[1], skips[0])
        self.smooth4 = ConvBn(skips[0], skips[0], 3, 1, 1)
        self.act = nn.ReLU6()

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """The trunk's four maps -> features by contract name."""
        x4, x8, x16, x32 = maps
        x = self.blocks(self.lateral16(x16) + double(self.lateral32(x32)))
        y8 = self.act(self.lateral8(x8) + double(self.down8(x)))
        y4 = self.act(self.lateral4(x4) + double(self.down4(y8)))
        return {"image_embeddings": x, "high_res_features_0": self.smooth4(y4), "high_res_features_1": self.smooth8(y8)}


class Stream(NamedTuple):
    """A tensor between linear layers only: what may be scaled per channel without changing the network.

    Attributes:
        writers: layers whose outputs it is, or is the sum of.
        readers: layers that read it.
    """

    writers: list[nn.Module]
    readers: list[nn.Module]


class LiteEncoder(nn.Module):
    """Trunk and pyramid."""

    def __init__(self, dim: int, skips: tuple[int, int]) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.pyramid = Pyramid(dim, skips)

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image: a ``ConvBn``, or the fused convolution."""
        return self.trunk.stem

    def streams(self) -> list[Stream]:
        """The residual stream of every stage of the trunk; quantization scales their channels to equal ranges."""
        pyramid, stages = self.pyramid, [list(s.children()) for s in self.trunk.stages]
        taps = dict(zip(TAPS, (pyramid.lateral4, pyramid.lateral8, pyramid.lateral16, pyramid.lateral32), strict=True))
        found = []
        for i, blocks in enumerate(stages):
            after = stages[i + 1][:1] if i + 1 < len(stages) else []
            readers: list[Any] = [b.expand for b in (*blocks[1:], *after)] + ([taps[i]] if i in taps else [])
            writers: list[Any] = [b.project for b in blocks]
            found.append(Stream(writers, readers))
        return found

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised image to features.

        Args:
            x: (B, 3, S, S), S a multiple of 32.

        Returns:
            ``image_embeddings`` (B, C, S / 16, S / 16), ``high_res_features_0`` (B, C0, S / 4, S / 4) and
            ``high_res_features_1`` (B, C1, S / 8, S / 8).
        """
        features: dict[str, Tensor] = self.pyramid(self.trunk(x))
        return features


def double(x: Tensor) -> Tensor:
    """Nearest upsampling by two."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def lite0(image_size: int | None = None) -> SegmentAnything:
    """The built-in model, untrained, for its native input side or another."""
    spec = SPEC if image_size is None else SPEC.resized(image_size)
    encoder = LiteEncoder(spec.embed_dim, SKIP_CHANNELS)
    prompt_encoder = PromptEncoder(spec.embed_dim, spec.embed_size, spec.image_size, act=nn.ReLU)
    decoder = MaskDecoder(spec.embed_dim, DECODER_MLP, SKIP_CHANNELS, nn.ReLU)
    return SegmentAnything(spec, encoder, prompt_encoder, decoder).eval()
