"""Exact rewrites of a model before conversion. Each states its reason; tests hold each to float rounding.

They change the model in place: export works on its own instance, never on the PyTorch reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pocketsam.export.decoder_rewrites import matmul_upscale
from pocketsam.models.efficient_vit import ConvLayer
from pocketsam.models.fpn import PyramidEncoder
from pocketsam.models.hiera import Block as HieraBlock
from pocketsam.models.hiera import Hiera
from pocketsam.models.layers import VitBlock
from pocketsam.models.plain_vit import PlainVit
from pocketsam.models.rep_vit import RepMixer
from pocketsam.models.sam import SegmentAnything
from pocketsam.models.sam_vit import Attention as GlobalAttention
from pocketsam.models.sam_vit import SamVit
from pocketsam.models.tiny_vit import Attention as WindowAttention
from pocketsam.models.tiny_vit import ConvBn
from pocketsam.models.tiny_vit import Mlp as TinyMlp


@torch.no_grad()
def prepare(model: SegmentAnything) -> SegmentAnything:
    """Apply every rewrite that helps all formats."""
    merge_branches(model)
    fuse_conv_bn(model)
    freeze_tables(model)
    split_heads(model)
    fold_norms(model)
    merge_laterals(model.image_encoder)
    fold_std(model)
    matmul_upscale(model.mask_decoder)
    return model.requires_grad_(False)


def fuse_conv_bn(module: nn.Module) -> None:
    """Reason: converters fold BatchNorm only when they recognise it; here every format gets one plain convolution."""
    for name, child in module.named_children():
        if isinstance(child, ConvBn):
            conv, bn = child.children()
            setattr(module, name, fused(conv, bn))
        elif isinstance(child, ConvLayer):
            if child.norm is not None:
                child.conv, child.norm = fused(child.conv, child.norm), None
        else:
            fuse_conv_bn(child)


def merge_branches(module: nn.Module) -> None:
    """Reason: a depthwise 3x3, a depthwise 1x1, the identity and their norms are one 3x3 (RepViT's own form to run)."""
    for name, child in module.named_children():
        if isinstance(child, RepMixer):
            setattr(module, name, merged(child))
        else:
            merge_branches(child)


def merged(mixer: RepMixer) -> nn.Conv2d:
    """The single convolution that equals a :class:`RepMixer`."""
    out = fused(*mixer.conv.children())
    one = fused(*mixer.conv1.children()) if isinstance(mixer.conv1, ConvBn) else mixer.conv1
    assert isinstance(one, nn.Conv2d)
    assert out.bias is not None
    assert one.bias is not None
    out.weight[:, :, 1, 1] += one.weight[:, :, 0, 0] + 1
    out.bias += one.bias
    return out if mixer.bn is None else fused(out, mixer.bn)


def merge_laterals(encoder: nn.Module) -> None:
    """Reason: SAM 2's skip features pass two 1x1 convolutions with nothing between: one is 8 times less work."""
    if not isinstance(encoder, PyramidEncoder):
        return
    for skip, lateral in (("conv_s0", 3), ("conv_s1", 2)):
        first, second = encoder.laterals[lateral], getattr(encoder, skip)
        assert isinstance(first, nn.Conv2d)
        assert first.bias is not None
        one = nn.Conv2d(first.in_channels, second.out_channels, 1)
        assert one.bias is not None
        a, b = second.weight[:, :, 0, 0].double(), first.weight[:, :, 0, 0].double()
        one.weight.copy_((a @ b)[:, :, None, None])
        one.bias.copy_(a @ first.bias.double() + second.bias.double())
        encoder.laterals[lateral] = nn.Identity()
        setattr(encoder, skip, one)


def fused(conv: nn.Module, bn: nn.Module) -> nn.Conv2d:
    """A convolution, with or without bias, and the BatchNorm behind it as one convolution."""
    if not isinstance(conv, nn.Conv2d) or not isinstance(bn, nn.BatchNorm2d):
        raise TypeError("only a Conv2d followed by a BatchNorm2d can be fused")
    if bn.running_mean is None or bn.running_var is None:
        raise TypeError("BatchNorm without statistics cannot be folded")
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    out = nn.Conv2d(conv.in_channels, conv.out_channels, (conv.kernel_size[0], conv.kernel_size[1]),
                    (conv.stride[0], conv.stride[1]), (int(conv.padding[0]), int(conv.padding[1])), groups=conv.groups)
    out.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    assert out.bias is not None
    shift = bn.running_mean.double() if conv.bias is None else bn.running_mean.double() - conv.bias.double()
    out.bias.copy_(bn.bias.double() - shift * scale)
    return out.eval()


def freeze_tables(module: nn.Module) -> None:
    """Reason: TinyViT's bias gather and resized positional tables are constant, yet exporters keep their operators."""
    for child in module.modules():
        if isinstance(child, WindowAttention):
            child.frozen_bias = child.bias().detach().clone()
        elif isinstance(child, (Hiera, PlainVit, SamVit)):
            child.frozen_positions = child.positions().detach().clone().contiguous()
        elif isinstance(child, GlobalAttention):
            child.freeze()


def split_heads(module: nn.Module) -> None:
    """Reason: OpenVINO copies the interleaved q, k, v three times; three products go straight into its attention."""
    for child in module.modules():
        if isinstance(child, WindowAttention):
            child.split = nn.ModuleList(_part(child, i) for i in range(3))


def _part(attention: WindowAttention, index: int) -> nn.Linear:
    """The rows of q, k or v of TinyViT's joint projection as a linear layer of its own."""
    source = attention.qkv
    out = nn.Linear(source.in_features, source.out_features // 3)
    width = out.out_features // attention.heads
    rows = torch.arange(source.out_features).reshape(attention.heads, 3, width)[:, index].flatten()
    out.weight.copy_(source.weight[rows])
    out.bias.copy_(source.bias[rows])
    return out


def fold_norms(module: nn.Module) -> None:
    """Reason: LiteRT runs a norm's scale and shift as two passes over memory; the linear layer behind can take both."""
    for child in module.modules():
        if isinstance(child, WindowAttention) and child.split is not None:
            child.norm = _plain_norm(child.norm, list(child.split))
        elif isinstance(child, TinyMlp):
            child.norm = _plain_norm(child.norm, [child.fc1])
        elif isinstance(child, (HieraBlock, VitBlock)):
            child.norm2 = _plain_norm(child.norm2, [child.mlp.lin1])


def _plain_norm(norm: nn.LayerNorm, behind: Sequence[nn.Module]) -> nn.LayerNorm:
    """The norm without scale and shift, which move into every layer that reads it."""
    for linear in behind:
        assert isinstance(linear, nn.Linear)
        linear.bias.copy_(linear.bias.double() + linear.weight.double() @ norm.bias.double())
        linear.weight.mul_(norm.weight)
    return nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)


def fold_std(model: SegmentAnything) -> None:
    """Reason: dividing 3 S^2 values by the std costs more than 1 % of a small encoder; the first convolution can do it.

    Zero padding stays zero under a pure scale, so this is exact up to rounding. ``EncoderGraph`` then divides by 1.
    """
    stem = model.image_encoder.stem
    if not isinstance(stem, nn.Conv2d) or stem.in_channels != 3:
        return
    stem.weight.copy_(stem.weight.double() / torch.tensor(model.spec.std, dtype=torch.float64)[None, :, None, None])
    model.std_folded = True
