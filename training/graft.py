"""SAM's prompt decoder in lite0: the weights of a released checkpoint, fitted to lite0's smaller form.

Every SAM-style checkpoint with embeddings of 256 channels carries the decoder that was trained on SA-1B. lite0's
differs in three ways: token MLPs half as wide, ReLU instead of GELU, skip features while upscaling. The MLPs keep the
hidden units that matter most on real prompts, their output layers fitted anew; the skips begin at zero; training mends
the rest. The encoder's last layers begin with the mean and spread of the teacher's embeddings, channel by channel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pocketsam.files import check_writable, staged_file
from pocketsam.models.layers import MlpBlock
from pocketsam.models.lite0 import InvertedResidual, LiteEncoder
from pocketsam.models.mask_decoder import TwoWayBlock
from pocketsam.models.sam import SegmentAnything
from pocketsam.models.tiny_vit import ConvBn
from pocketsam.training.augment import Augment
from pocketsam.training.batches import image_weights, make_batch
from pocketsam.training.packs import Cache
from pocketsam.training.prompts import first_prompts
from pocketsam.training.rounds import set_input_size
from pocketsam.training.seeds import seeded

BATCHES, IMAGES, PROMPTS = 40, 8, 8
# Of the spread of an embedding channel, what a residual block adds at the start.
BLOCK_SHARE = 0.3
RIDGE = 1e-4


@torch.no_grad()
def graft(student: SegmentAnything, teacher: SegmentAnything, taught: Tensor, cache: Cache, out: Path,
          batches: int = BATCHES) -> float:
    """Give a lite0 the decoder of a SAM and write it as fp32 safetensors, for ``fit --initial``.

    Args:
        student: lite0 with the encoder to start from; it is changed.
        teacher: a SAM-style model whose embeddings have as many channels as lite0's.
        taught: float16 (N, C, h, w), the teacher's embeddings of the cache's images at lite0's size.
        cache: the images.
        out: the file.
        batches: of prompts that the MLPs are judged by.

    Returns:
        The share of the MLP outputs' variance that the narrower MLPs lose, the larger of both.
    """
    check_writable(out)
    lost = 0.0
    inputs = _mlp_inputs(teacher, taught, cache, batches)
    for mine, theirs, x in zip(_blocks(student), _blocks(teacher), inputs, strict=True):
        lost = max(lost, _narrow(mine.mlp, theirs.mlp, x))
    _copy(student.prompt_encoder, teacher.prompt_encoder)
    _copy(student.mask_decoder, teacher.mask_decoder, ".mlp.")
    assert isinstance(student.image_encoder, LiteEncoder)
    sample = taught[:: max(1, len(taught) // 256)].float()
    _match(student.image_encoder, sample.mean((0, 2, 3)), sample.std((0, 2, 3)))
    with staged_file(out) as staged:
        save_file({k: v.contiguous() for k, v in student.state_dict().items()}, staged)
    return lost


def _blocks(model: SegmentAnything) -> list[TwoWayBlock]:
    return [m for m in model.mask_decoder.transformer.layers if isinstance(m, TwoWayBlock)]


def _copy(mine: nn.Module, theirs: nn.Module, but: str | None = None) -> None:
    """Take over every entry that the student has, but those with ``but`` in their key."""
    source = theirs.state_dict()
    for key, value in mine.state_dict().items():
        if but is None or but not in key:
            value.copy_(source[key])


@dataclass
class _Seen:
    """Inputs of one layer, as a hook collects them."""

    rows: list[Tensor] = field(default_factory=list)

    def add(self, _module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.rows.append(inputs[0].flatten(0, -2).clone())


def _mlp_inputs(teacher: SegmentAnything, taught: Tensor, cache: Cache, batches: int) -> list[Tensor]:
    """What the token MLPs of the teacher see for boxes and points on its embeddings at the student's size."""
    size = cache.size
    seen = [_Seen() for _ in _blocks(teacher)]
    hooks = [b.mlp.register_forward_pre_hook(s.add) for b, s in zip(_blocks(teacher), seen, strict=True)]
    set_input_size(teacher, size)
    weights, plain = image_weights(cache), Augment(whole=1, flip=0, colour=0, grey=0)
    for step in range(batches):
        cut = make_batch(cache, weights, IMAGES, PROMPTS, size, plain, seeded("cpu", "graft", step))
        batch = cut.batch(torch.device("cpu"))
        prompts = first_prompts(batch.targets, batch.boxes, size, seeded("cpu", "graft prompts", step))
        features = {"image_embeddings": taught[batch.shown].float().repeat_interleave(PROMPTS, 0)}
        teacher.decode(features, prompts.coords, prompts.labels, None, None, fixed_slots=True)
    set_input_size(teacher, teacher.spec.image_size)
    for hook in hooks:
        hook.remove()
    return [torch.cat(s.rows) for s in seen]


def _narrow(mine: MlpBlock, theirs: MlpBlock, x: Tensor) -> float:
    """Keep the hidden units with the largest share of the output, and fit the output layer to what is left of them.

    Args:
        x: (n, C) inputs.

    Returns:
        The lost share of the output's variance.
    """
    width = mine.lin1.out_features
    hidden = theirs.act(theirs.lin1(x))
    y = hidden @ theirs.lin2.weight.T
    share = hidden.square().mean(0) * theirs.lin2.weight.square().sum(0)
    kept = share.topk(width).indices
    h = torch.cat([hidden[:, kept], torch.ones(len(x), 1)], 1).double()
    gram = h.T @ h
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    # Towards the old weights, not towards zero: where data say little, nothing should change.
    old = torch.cat([theirs.lin2.weight[:, kept].T, torch.zeros(1, y.shape[1])]).double()
    solved = old + torch.linalg.solve(gram, h.T @ (y.double() - h @ old))
    mine.lin1.weight.copy_(theirs.lin1.weight[kept])
    mine.lin1.bias.copy_(theirs.lin1.bias[kept])
    mine.lin2.weight.copy_(solved[:-1].T)
    mine.lin2.bias.copy_(theirs.lin2.bias + solved[-1])
    return float((y - h @ solved).square().sum() / (y - y.mean(0)).square().sum())


def _match(encoder: LiteEncoder, mean: Tensor, spread: Tensor) -> None:
    """Let the embedding begin with the mean and spread (C,) of the teacher's, and the skip features at zero."""
    pyramid = encoder.pyramid
    for lateral in (pyramid.lateral16, pyramid.lateral32):
        _begin(lateral, spread / 2 ** 0.5, mean / 2)
    for block in pyramid.blocks:
        assert isinstance(block, InvertedResidual)
        _begin(block.project, BLOCK_SHARE * spread, torch.zeros_like(mean))
    for smooth in (pyramid.smooth4, pyramid.smooth8):
        _begin(smooth, torch.zeros(()), torch.zeros(()))


def _begin(layer: ConvBn, spread: Tensor, mean: Tensor) -> None:
    norm = layer[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.weight.copy_(spread)
    norm.bias.copy_(mean)
