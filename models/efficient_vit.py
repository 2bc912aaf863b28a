"""EfficientViT-SAM's image encoder (official ``efficientvit/models``; Cai et al. 2023): convolutional stages, then
blocks with ReLU linear attention, and a neck that sums three scales at 64 x 64.

Every norm of these models, the decoder's included, has eps 1e-6; GELU is the tanh form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketsam.models.layers import CubicResize, LayerNorm2d

EPS = 1e-6
HEAD_DIM = 32
GRID = 64


@dataclass(frozen=True)
class Config:
    """One size of the family.

    Attributes:
        widths, depths: channels and repeated blocks a stage, the stem's first.
        blocks: kind of each stage: ``res``, ``fmb`` (fused), ``mb`` (depthwise), ``att3`` or ``att5`` (attention with
            that aggregation kernel).
        expand: expansion a stage; the block that opens a stage has four times as much.
        few_norms: stages whose inner convolutions have biases instead of norms.
        neck_depth, neck_expand: blocks of the neck and their expansion.
        image_size: native side.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    blocks: tuple[str, ...]
    expand: tuple[int, ...]
    few_norms: tuple[bool, ...]
    neck_depth: int
    neck_expand: int
    image_size: int


def large(depths: tuple[int, ...], neck_depth: int) -> Config:
    """L0, L1 and L2 differ in depth only."""
    return Config((32, 64, 128, 256, 512), depths, ("res", "fmb", "fmb", "mb", "att5"), (1, 4, 4, 4, 6),
                  (False, False, False, True, True), neck_depth, 1, 512)


def extra_large(depths: tuple[int, ...], neck_depth: int) -> Config:
    """XL0 and XL1 have one more stage and a native side of 1024."""
    return Config((32, 64, 128, 256, 512, 1024), depths, ("res", "fmb", "fmb", "fmb", "att3", "att3"),
                  (1, 4, 4, 4, 4, 6), (False, False, False, False, True, True), neck_depth, 4, 1024)


CONFIGS = {
    "efficientvit_sam_l0": large((1, 1, 1, 4, 4), 4),
    "efficientvit_sam_l1": large((1, 1, 1, 6, 6), 8),
    "efficientvit_sam_l2": large((1, 2, 2, 8, 8), 12),
    "efficientvit_sam_xl0": extra_large((0, 1, 1, 2, 3, 3), 6),
    "efficientvit_sam_xl1": extra_large((1, 2, 2, 4, 6, 6), 12),
}


class ConvLayer(nn.Module):
    """Convolution with BatchNorm or bias, then GELU or nothing (official names ``conv`` and ``norm``)."""

    def __init__(self, inp: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, norm: bool = True,
                 act: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out, eps=EPS) if norm else None
        self.act = nn.GELU(approximate="tanh") if act else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.act is None else self.act(x)


def local_block(kind: str, inp: int, out: int, stride: int, expand: int, few_norms: bool) -> nn.Sequential:
    """``res``, ``fmb`` or ``mb`` under the official child names."""
    hidden, norm = inp * expand, not few_norms
    block = nn.Sequential()
    if kind == "res":
        block.add_module("conv1", ConvLayer(inp, hidden, 3, stride, norm=norm, bias=few_norms))
        block.add_module("conv2", ConvLayer(hidden, out, 3, act=False))
        return block
    if kind == "fmb":
        block.add_module("spatial_conv", ConvLayer(inp, hidden, 3, stride, norm=norm, bias=few_norms))
    else:
        block.add_module("inverted_conv", ConvLayer(inp, hidden, norm=norm, bias=few_norms))
        block.add_module("depth_conv", ConvLayer(hidden, hidden, 3, stride, hidden, norm=norm, bias=few_norms))
    block.add_module("point_conv", ConvLayer(hidden, out, act=False))
    return block


class Residual(nn.Module):
    """``main`` plus identity, or ``main`` alone where the shape changes."""

    def __init__(self, main: nn.Module, skip: bool = True) -> None:
        super().__init__()
        self.main = main
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x)
        return x + y if self.skip else y


class LinearAttention(nn.Module):
    """ReLU linear attention over two scales: the projections as they are and aggregated by a depthwise kernel."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.qkv = ConvLayer(dim, 3 * dim, norm=False, act=False)
        self.aggreg = nn.ModuleList([nn.Sequential(
            nn.Conv2d(3 * dim, 3 * dim, kernel, padding=kernel // 2, groups=3 * dim, bias=False),
            nn.Conv2d(3 * dim, 3 * dim, 1, groups=3 * dim // HEAD_DIM, bias=False))])
        self.proj = ConvLayer(2 * dim, dim, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> same."""
        b, _, h, w = x.shape
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, self.aggreg[0](qkv)], dim=1).reshape(b, -1, 3 * HEAD_DIM, h * w)
        q, k, v = F.relu(qkv[:, :, :HEAD_DIM]), F.relu(qkv[:, :, HEAD_DIM:2 * HEAD_DIM]), qkv[:, :, 2 * HEAD_DIM:]
        keys = k.transpose(-1, -2)
        # The official code appends a row of ones to v; its product with the keys is their sum over positions.
        out = (v @ keys) @ q / (k.sum(-1)[:, :, None] @ q + 1e-15)
        y: Tensor = self.proj(out.reshape(b, -1, h, w))
        return y


class AttentionBlock(nn.Module):
    """Linear attention, then a depthwise block, both residual."""

    def __init__(self, dim: int, kernel: int, expand: int) -> None:
        super().__init__()
        self.context_module = Residual(LinearAttention(dim, kernel))
        self.local_module = Residual(local_block("mb", dim, dim, 1, expand, few_norms=True))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.local_module(self.context_module(x))
        return y


class OpList(nn.Module):
    """A sequence under the official name ``op_list``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.op_list:
            x = layer(x)
        return x


def stage(config: Config, i: int) -> OpList:
    """One stage: an opening block that halves the map, then repeated ones."""
    width, kind, expand, few = config.widths[i], config.blocks[i], config.expand[i], config.few_norms[i]
    if i == 0:
        layers: list[nn.Module] = [ConvLayer(3, width, 3, 2)]
    else:
        opening = local_block("fmb" if kind == "fmb" else "mb", config.widths[i - 1], width, 2, 4 * expand, few)
        layers = [Residual(opening, skip=False)]
    for _ in range(config.depths[i]):
        if kind.startswith("att"):
            layers.append(AttentionBlock(width, int(kind[-1]), expand))
        else:
            layers.append(Residual(local_block(kind, width, width, 1, expand, few)))
    return OpList(*layers)


class Neck(nn.Module):
    """The last three stages at 64 x 64, summed, then fused blocks."""

    def __init__(self, config: Config, image_size: int, out: int) -> None:
        super().__init__()
        last = len(config.widths) - 1
        inputs = []
        for i in (last, last - 1, last - 2):
            side = image_size >> (i + 1)
            resize = [] if side == GRID else [CubicResize(side, GRID)]
            inputs.append(OpList(ConvLayer(config.widths[i], out, act=False), *resize))
        self.input_ops = nn.ModuleList(inputs)
        self.middle = OpList(*(Residual(local_block("fmb", out, out, 1, config.neck_expand, few_norms=False))
                               for _ in range(config.neck_depth)))
        self.output_ops = nn.ModuleList([OpList(ConvLayer(out, out, norm=False, act=False, bias=True))])

    def forward(self, maps: list[Tensor]) -> Tensor:
        a, b, c = (op(x) for op, x in zip(self.input_ops, reversed(maps), strict=True))
        y: Tensor = self.output_ops[0](self.middle(a + b + c))
        return y


class EfficientVit(nn.Module):
    """Backbone, neck and a last norm over channels.

    Args:
        config: the size.
        image_size: side S, a multiple of 64; the embedding is 64 x 64 whatever S is.
    """

    def __init__(self, config: Config, image_size: int, out: int = 256) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"stages": nn.ModuleList(stage(config, i) for i in range(len(config.widths)))})
        self.neck = Neck(config, image_size, out)
        self.norm = LayerNorm2d(out, eps=EPS)

    @property
    def stem(self) -> nn.Module:
        """The first layer, which sees the normalised image."""
        return self.backbone["stages"][0].op_list[0].conv  # type: ignore[index, no-any-return]  # ModuleDict

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> ``image_embeddings`` (B, 256, 64, 64)."""
        maps = []
        for layer in self.backbone["stages"]:  # type: ignore[attr-defined]  # a ModuleList
            x = layer(x)
            maps.append(x)
        return {"image_embeddings": self.norm(self.neck(maps[-3:]))}
