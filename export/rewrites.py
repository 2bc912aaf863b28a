"""Exact rewrites of a model before conversion. Each states its reason; tests hold each to float rounding.

They change the model in place: export works on its own instance, never on the PyTorch reference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pocketsam.models.efficient_vit import ConvLayer
from pocketsam.models.fpn import PyramidEncoder
from pocketsam.models.hiera import Block as HieraBlock
from pocketsam.models.hiera import Hiera
from pocketsam.models.layers import LayerNorm2d, VitBlock
from pocketsam.models.mask_decoder import Attention, MaskDecoder, TwoWayBlock
from pocketsam.models.plain_vit import PlainVit
from pocketsam.models.rep_vit import RepMixer
from pocketsam.models.sam import SegmentAnything
from pocketsam.models.sam_vit import Attention as GlobalAttention
from pocketsam.models.sam_vit import SamVit
from pocketsam.models.tiny_vit import Attention as WindowAttention
from pocketsam.models.tiny_vit import ConvBn
from pocketsam.models.tiny_vit import Mlp as TinyMlp
from pocketsam.models.upscaling import as_matrix, blocked, unblocked


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


def with_absorbed_decoder(model: SegmentAnything) -> SegmentAnything:
    """The same model with a decoder of its own (16 MB) whose projections are absorbed; for formats that gain by it."""
    decoder = copy.deepcopy(model.mask_decoder)
    absorb_projections(decoder)
    return SegmentAnything(model.spec, model.image_encoder, model.prompt_encoder, decoder).eval().requires_grad_(False)


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
