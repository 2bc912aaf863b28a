"""Many single clicks on one image: the mask decoder in factors, so that no prompt forms an image-sized projection.

Equal to :class:`MaskDecoder` for one foreground click and its padding point, up to float rounding. With N = h * w
positions, H heads of width d, T = 7 or 8 tokens and rows = H * T, the image after each of the two blocks is

    x1 = c + P1^T M1                           LN1(x1) = r1 (c + P1^T M1) g1 + b1
    x2 = r1 (c' + P1^T M1') + P2^T M2          LN2(x2) = r2 x2 g2 + b2

where c is the image centred over its channels (shared by all prompts), P (rows, N) are the probabilities of
image-to-token attention, and M (rows, C) each head's values behind the output projection. A layer norm is linear up to
one scale r a position once centring is folded into c and M, so every projection of the image splits into a shared part
and one with ``rows`` columns,

    q (LN1(x1) W)^T = r1 (q (c g1 W)^T + (q W^T g1 M1^T) P1) + q (b1 W)^T,

and the scale moves to the logits, or to the probabilities where values are summed. The variance is the quadratic form
|c|^2 + P1 . (2 M1 c^T + M1 M1^T P1). A bias b that the residual sum adds is taken into M2 as b / H a row, because the
probabilities of each head sum to one. :class:`ClickImage` makes the shared parts, :class:`ClickScores` the factors and
predicted IoU of a batch, :class:`ClickMasks` the masks of those that are worth it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketsam.click_specs import MASKS
from pocketsam.models.click_factors import (
    Folded,
    by_head,
    centred,
    double,
    from_rows,
    gram,
    joined,
    keep,
    matrix,
    second_upscaling,
    softmax_over_positions,
    softmax_over_tokens,
    to_heads,
    to_rows,
)
from pocketsam.models.layers import LayerNorm2d
from pocketsam.models.mask_decoder import Attention, TwoWayBlock
from pocketsam.models.prompt_encoder import PADDING_POINT
from pocketsam.models.sam import SegmentAnything
from pocketsam.models.upscaling import as_matrix, blocked, unblocked

FOREGROUND = 1
# Shared tensors of shape (H, d, N) in ``columns`` and (H, N, d) in ``values``.
COLUMNS, VALUES = 8, 3


class ClickImage(nn.Module):
    """What all prompts on an image share; made once an image.

    Forward: features in the order of the spec -> ``columns`` (8 H, d, N), keys, queries and what the variances need;
    ``values`` (3 H, N, d); ``norms`` (3, N); ``fine`` (N, 4 C1), the image's part of the first upscaling; and for
    models with skip features ``skip_1`` (N, 4 C1) and ``skip_0`` (16 N, C0) in the order of the upscaling, the
    constants of both upscalings added.
    """

    raw: Tensor
    raw_bias: Tensor
    first: Tensor
    second: Tensor
    offset: Tensor
    gain: Tensor
    carried: Tensor
    skip_bias_1: Tensor
    skip_bias_0: Tensor

    def __init__(self, model: SegmentAnything) -> None:
        super().__init__()
        decoder, prompts = model.mask_decoder, model.prompt_encoder
        f = Folded(decoder)
        self.heads = f.heads
        pe, dense = double(prompts.dense_pe()[0]), prompts.no_mask()
        base = torch.zeros(pe.shape[1]).double() if dense is None else double(dense).flatten()
        c = len(base)
        read, write = f.first.cross_attn_token_to_image, f.first.cross_attn_image_to_token
        read2, write2 = f.second.cross_attn_token_to_image, f.second.cross_attn_image_to_token
        raw = torch.cat([matrix(read.k_proj), matrix(write.q_proj) * f.scale, matrix(read.v_proj)], 1)
        moved = torch.cat([pe @ raw[:, :2 * raw.shape[1] // 3], torch.zeros(len(pe), raw.shape[1] // 3).double()], 1)
        bias = torch.cat([double(read.k_proj.bias), double(write.q_proj.bias) * f.scale, double(read.v_proj.bias)])
        first = [2 / c * f.w_out1.T, *(f.g1[:, None] * matrix(m) * s for m, s in (
            (read2.k_proj, 1), (write2.q_proj, f.scale), (read2.v_proj, 1)))]
        second = [2 / c * f.w_out1_next.T, 2 / c * f.w_out2.T, f.g2[:, None] * matrix(f.final.k_proj),
                  f.g2[:, None] * matrix(f.final.v_proj), f.w_up]
        keep(self, raw=raw, raw_bias=moved + bias + base @ raw, first=torch.cat(first, 1),
             second=torch.cat(second, 1), offset=base + double(write.out_proj.bias), gain=f.g1,
             carried=2 / c * f.carried[:, None], skip_bias_1=f.b_up)
        self.high_res = decoder.high_res
        if self.high_res:
            keep(self, skip_bias_0=double(second_upscaling(decoder).bias))

    def forward(self, image: Tensor, *skips: Tensor) -> tuple[Tensor, ...]:
        _, c, h, w = image.shape
        n = h * w
        rows = image.reshape(c, n).transpose(0, 1)
        k1, q1, v1 = (rows @ self.raw + self.raw_bias).chunk(3, 1)
        now = centred(rows + self.offset)
        after = centred(now * self.gain)
        x1, k2, q2, v2 = (now @ self.first).chunk(4, 1)
        d = k1.shape[1]
        rest = after @ self.second
        y1, y2, k3, v3, fine = torch.split(rest, [d, d, d, d, rest.shape[1] - 4 * d], 1)
        columns = torch.cat([k1, q1, x1, k2, q2, y1, y2, k3], 1).transpose(0, 1)
        values = torch.cat([v1, v2, v3], 1).reshape(n, VALUES * self.heads, -1).transpose(0, 1)
        squares = [(x * x).mean(1, keepdim=True) for x in (now, after)]
        norms = torch.cat([*squares, after @ self.carried], 1).transpose(0, 1)
        out = columns.reshape(COLUMNS * self.heads, -1, n), values, norms, fine
        if not self.high_res:
            return out
        first = blocked(skips[1], h, w, 1).reshape(n, -1) + self.skip_bias_1
        return (*out, first, blocked(skips[0], h, w, 2)[0] + self.skip_bias_0)


class LastAttention(nn.Module):
    """The last attention from tokens to an image in factors, for the tokens that are asked for."""

    w_k: Tensor
    w_v: Tensor
    const: Tensor
    b_v: Tensor

    def __init__(self, model: SegmentAnything, f: Folded) -> None:
        super().__init__()
        self.heads, layer = f.heads, f.final
        self.q_proj, self.out_proj = layer.q_proj, layer.out_proj
        self.norm = model.mask_decoder.transformer.norm_final_attn
        pe = double(model.prompt_encoder.dense_pe()[0]) + f.b2
        keep(self, w_k=by_head((f.g2[:, None] * matrix(layer.k_proj)).T, f.heads),
             w_v=by_head((f.g2[:, None] * matrix(layer.v_proj)).T, f.heads).transpose(1, 2),
             const=by_head((pe @ matrix(layer.k_proj)).T, f.heads),
             b_v=f.b2 @ matrix(layer.v_proj) + double(layer.v_proj.bias))

    def forward(self, tokens: Tensor, pe: Tensor, columns: Tensor, values: Tensor, weights: Tensor, basis: Tensor,
                scales: Tensor) -> Tensor:
        """Tokens (B, K, C), their encodings (1 or B, K, C) and an image in factors -> (B, K, C) after the norm."""
        b = tokens.shape[0]
        r2, both = scales[:, :1], scales[:, 1:]
        q = to_heads(self.q_proj(tokens + pe), self.heads)
        q = q * q.shape[-1] ** -0.5
        near = to_rows(q @ columns[-self.heads:], b) * both
        far = (to_rows(q @ self.w_k, b) @ basis.transpose(1, 2)) @ weights
        attention = softmax_over_positions(near + far * r2 + to_rows(q @ self.const, b))
        near = from_rows(attention * both, self.heads) @ values[-self.heads:]
        far = ((attention * r2) @ weights.transpose(1, 2)) @ basis
        read = joined(near + from_rows(far, self.heads) @ self.w_v, b) + self.b_v
        y: Tensor = self.norm(tokens + self.out_proj(read))
        return y


class ClickScores(nn.Module):
    """Predicted IoU of many clicks, and the factors of each one's image.

    Forward: ``columns``, ``values``, ``norms`` and ``point_coords`` (B, 1, 2), XY pixels in the prompt frame ->
    ``iou_predictions`` (B, 4); ``hyper`` (B, 3, C / 8), what the hypernetworks make of mask tokens 1 to 3;
    ``weights`` (B, 2 rows, N) and ``basis`` (B, 2 rows, C), [r1 P1; P2] and [M1'; M2]; ``scales`` (B, 2, N), r2 and
    r2 r1. Predicted IoU is what the model's head says, usually 0 to 1.
    """

    own: Tensor
    padding: Tensor
    click: Tensor
    w_out1: Tensor
    w_out1_next: Tensor
    w_out2: Tensor
    carried: Tensor
    w_k: Tensor
    w_q: Tensor
    w_v: Tensor
    b_v: Tensor
    k_const: Tensor
    q_const: Tensor

    def __init__(self, model: SegmentAnything) -> None:
        super().__init__()
        decoder, prompts = model.mask_decoder, model.prompt_encoder
        f = Folded(decoder)
        self.heads = f.heads
        self.first, self.second, self.final = f.first, f.second, LastAttention(model, f)
        self.iou_head, self.sigmoid = decoder.iou_prediction_head, decoder.style.iou_sigmoid
        self.hypernetworks = decoder.output_hypernetworks_mlps[1:]
        self.iou_index = int(decoder.style.object_score)
        self.pe_layer, self.image_size = prompts.pe_layer, prompts.image_size
        padding = prompts.points(torch.full((1, 1, 2), -1.0), torch.full((1, 1), float(PADDING_POINT)))[0]
        click = prompts.point_embeddings[str(FOREGROUND)]
        assert isinstance(click, nn.Embedding)
        read, write = f.second.cross_attn_token_to_image, f.second.cross_attn_image_to_token
        pe = double(prompts.dense_pe()[0]) + f.b1
        keep(self, own=double(decoder.own_tokens()), padding=double(padding),
             click=double(click.weight),
             w_out1=by_head(f.w_out1, f.heads), w_out1_next=by_head(f.w_out1_next, f.heads),
             w_out2=by_head(f.w_out2, f.heads), carried=f.carried / f.heads,
             w_k=by_head((f.g1[:, None] * matrix(read.k_proj)).T, f.heads),
             w_q=by_head((f.g1[:, None] * matrix(write.q_proj) * f.scale).T, f.heads),
             w_v=by_head((f.g1[:, None] * matrix(read.v_proj)).T, f.heads).transpose(1, 2),
             b_v=f.b1 @ matrix(read.v_proj) + double(read.v_proj.bias),
             k_const=by_head((pe @ matrix(read.k_proj)).T, f.heads),
             q_const=by_head(((pe @ matrix(write.q_proj) + double(write.q_proj.bias)) * f.scale).T, f.heads))
        self.eps1, self.eps2 = f.first.norm4.eps, f.second.norm4.eps

    def tokens(self, coords: Tensor) -> Tensor:
        """(B, 1, 2) -> (B, T, C): own tokens, click, padding point."""
        b = coords.shape[0]
        click = self.pe_layer((coords + 0.5) / self.image_size) + self.click
        return torch.cat([self.own.expand(b, -1, -1), click, self.padding.expand(b, -1, -1)], 1)

    def queries(self, attention: Attention, tokens: Tensor) -> Tensor:
        """(B, T, C) -> scaled (H, B T, d)."""
        q = to_heads(attention.q_proj(tokens), self.heads)
        scale: float = q.shape[-1] ** -0.5
        return q * scale

    def update(self, block: TwoWayBlock, tokens: Tensor, read: Tensor) -> Tensor:
        """What tokens read from the image, (B, T, D), and the MLP."""
        tokens = block.norm2(tokens + block.cross_attn_token_to_image.out_proj(read))
        y: Tensor = block.norm3(tokens + block.mlp(tokens))
        return y

    def sides(self, attention: Attention, tokens: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens, (H, B T, d) each."""
        return to_heads(attention.k_proj(tokens + pe), self.heads), to_heads(attention.v_proj(tokens), self.heads)

    def logits(self, q: Tensor, weight: Tensor, shared: Tensor, const: Tensor, m: Tensor, p1: Tensor,
               r1: Tensor) -> Tensor:
        """Products of (H, B T, d) with a projection of the image after block 1 -> (B, rows, N)."""
        b, n = r1.shape[0], r1.shape[2]
        near = (q @ shared).reshape(self.heads, b, -1, n) * r1 + (q @ const).reshape(self.heads, b, -1, n)
        far = (to_rows(q @ weight, b) @ m.transpose(1, 2)) @ p1
        y: Tensor = near.transpose(0, 1).reshape(b, -1, n) + far
        return y

    def forward(self, columns: Tensor, values: Tensor, norms: Tensor, coords: Tensor) -> tuple[Tensor, ...]:
        k1, q1, x1, k2, q2, y1, y2, _ = columns.chunk(COLUMNS)
        v1, v2, _ = values.chunk(VALUES)
        pe = self.tokens(coords)
        b, t, c = pe.shape
        h, n = self.heads, columns.shape[2]
        # Block 1: the image is the same for all.
        first, second = self.first, self.second
        tokens = first.norm1(first.self_attn(pe, pe, pe))
        attention = softmax_over_positions(self.queries(first.cross_attn_token_to_image, tokens + pe) @ k1)
        tokens = self.update(first, tokens, joined(attention @ v1, b))
        keys, worth = self.sides(first.cross_attn_image_to_token, tokens, pe)
        p = to_rows(softmax_over_tokens((keys @ q1).reshape(h * b, t, n)).reshape(h, b * t, n), b)
        m = to_rows(worth @ self.w_out1, b)
        square = (p * (gram(m) @ p + to_rows(worth @ x1, b))).sum(1, keepdim=True)
        r1 = (square + (norms[0] + self.eps1)).rsqrt()
        p1, m_next = p * r1, to_rows(worth @ self.w_out1_next, b)
        cross = to_rows(worth @ y1, b)
        # Block 2: the image is r1 (c + P1^T M1) g1 + b1.
        tokens = second.norm1(tokens + second.self_attn(tokens + pe, tokens + pe, tokens))
        q = self.queries(second.cross_attn_token_to_image, tokens + pe)
        attention = softmax_over_positions(self.logits(q, self.w_k, k2, self.k_const, m, p1, r1))
        far = from_rows((attention @ p1.transpose(1, 2)) @ m, h) @ self.w_v
        near = from_rows(attention * r1, h) @ v2
        tokens = self.update(second, tokens, joined(near + far, b) + self.b_v)
        keys, worth = self.sides(second.cross_attn_image_to_token, tokens, pe)
        p2 = self.logits(keys, self.w_q, q2, self.q_const, m, p1, r1)
        p2 = softmax_over_tokens(p2.reshape(b * h, t, n)).reshape(b, h * t, n)
        m2 = to_rows(worth @ self.w_out2, b) + self.carried
        weights, basis = torch.cat([p1, p2], 1), torch.cat([m_next, m2], 1)
        both = torch.cat([gram(m_next), 2 / c * (m_next @ m2.transpose(1, 2))], 2)
        square = p1 * (both @ weights + r1 * cross) + p2 * (gram(m2) @ p2 + r1 * to_rows(worth @ y2, b))
        r2 = (r1 * (r1 * norms[1] + norms[2]) + square.sum(1, keepdim=True) + self.eps2).rsqrt()
        scales = torch.cat([r2, r2 * r1], 1)
        # Nobody asks for token 0, the answer to an unambiguous prompt.
        i = self.iou_index
        asked, asked_pe = (torch.cat([x[:, i:i + 1], x[:, i + 2:i + 2 + MASKS]], 1) for x in (tokens, pe))
        answers = self.final(asked, asked_pe, columns, values, weights, basis, scales)
        hyper = torch.stack([mlp(answers[:, 1 + k]) for k, mlp in enumerate(self.hypernetworks)], 1)
        iou = self.iou_head(answers[:, 0])
        return iou.sigmoid() if self.sigmoid else iou, hyper, weights, basis, scales


class ClickMasks(nn.Module):
    """Masks of clicks from the factors of :class:`ClickScores`.

    Forward: ``fine``, with skip features ``skip_1`` and ``skip_0``, then ``hyper``, ``weights``, ``basis``, ``scales``
    -> ``low_res_masks`` (B, 3, 4h, 4w), tokens 1 to 3.
    """

    w_up: Tensor
    b_up: Tensor
    w_up2: Tensor
    b_up2: Tensor

    def __init__(self, model: SegmentAnything) -> None:
        super().__init__()
        decoder = model.mask_decoder
        f = Folded(decoder)
        self.side = model.spec.embed_size
        _, norm, self.act1, _, self.act2 = decoder.output_upscaling
        assert isinstance(norm, LayerNorm2d)
        self.norm, up2 = norm, second_upscaling(decoder)
        keep(self, w_up=f.w_up, b_up=f.b_up, w_up2=as_matrix(up2).double(), b_up2=double(up2.bias).repeat(4))

    def forward(self, fine: Tensor, *rest: Tensor) -> Tensor:
        *skips, hyper, weights, basis, scales = rest
        b, n = weights.shape[0], weights.shape[2]
        x = (weights * scales[:, :1]).transpose(1, 2) @ (basis @ self.w_up)
        x = x + scales[:, 1:].transpose(1, 2) * fine
        c1 = x.shape[2] // 4
        x = x.reshape(b, n * 4, c1) + skips[0].reshape(n * 4, c1) if skips else (x + self.b_up).reshape(b, n * 4, c1)
        x = self.act1(nn.functional.layer_norm(x, (c1,), self.norm.weight, self.norm.bias, self.norm.eps))
        x = x @ self.w_up2 if skips else x @ self.w_up2 + self.b_up2
        x = x.reshape(b, n * 16, hyper.shape[2])
        x = self.act2(x + skips[1] if skips else x)
        return unblocked(hyper @ x.transpose(1, 2), self.side, self.side)


CLICK_MODULES: dict[str, type[ClickImage | ClickScores | ClickMasks]] = {
    "click_image": ClickImage, "click_scores": ClickScores, "click_masks": ClickMasks}
