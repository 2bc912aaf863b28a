"""Training for int8: the encoder computes on 8-bit activations; its answers are pulled to those of the float model.

Quantization-aware training with the straight-through estimator (Jacob et al. 2018), of activations only: rounded
weights shift channel means, which export corrects, and training against an error that does not remain would only cost.
What remains is the rounding of activations, and the decoder has to learn that so small a change means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pocketsam.models.lite0 import LiteEncoder
from pocketsam.models.sam import SegmentAnything
from pocketsam.models.tiny_vit import ConvBn
from pocketsam.training.batches import Batch
from pocketsam.training.losses import DICE_WEIGHT, FOCAL_WEIGHT, divergence, per_prompt
from pocketsam.training.prompts import Prompts
from pocketsam.training.rounds import answer, encode, episode, repeat

LEVELS = 255


def round_to_levels(x: Tensor) -> Tensor:
    """Affine 8-bit rounding over the tensor's own range, zero kept exact; the gradient passes unchanged."""
    with torch.no_grad():
        low, high = torch.aminmax(x)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / LEVELS).clamp(min=1e-8)
        rounded = torch.round(x / scale) * scale
    return x + (rounded - x).detach()


@contextmanager
def int8_activations(encoder: LiteEncoder) -> Iterator[None]:
    """Round what every convolution but the first reads, and what those without an activation write."""
    handles = []
    for name, module in encoder.named_modules():
        if not isinstance(module, ConvBn) or module is encoder.stem:
            continue
        handles.append(module.register_forward_pre_hook(lambda _, inputs: (round_to_levels(inputs[0]),)))
        if not name.endswith(("expand", "depthwise")):
            handles.append(module.register_forward_hook(lambda *a: round_to_levels(a[2])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class FloatTwin:
    """A :class:`pocketsam.training.rounds.Teacher`: the same weights without rounding, asked the first prompts.

    Args:
        model: in training; no gradient flows through the twin.
        weight: of the loss: focal and dice's 20 : 1 on the differences, and the squared difference of scores.
    """

    def __init__(self, model: SegmentAnything, weight: float) -> None:
        self.model, self.weight = model, weight
        self.features: dict[str, Tensor] = {}
        self.asked = False

    @torch.no_grad()
    def prepare(self, batch: Batch) -> None:
        """Encode the images; before rounding is switched on."""
        self.features = repeat(encode(self.model, batch.images, batch.valid), len(batch.targets) // len(batch.images))

    def observe(self, batch: Batch) -> None:
        """A new batch: its first answers are compared."""
        self.asked = False

    def embedding_loss(self, features: dict[str, Tensor]) -> Tensor:
        """Zero: only masks and scores count."""
        return features["image_embeddings"].new_zeros(())

    def answer_loss(self, prompts: Prompts, logits: Tensor, scores: Tensor) -> Tensor:
        """Masks 1 to 3 for a single point, mask 0 for any other prompt."""
        if self.asked:
            return logits.new_zeros(())
        self.asked = True
        with torch.no_grad():
            taught, ranks = answer(self.model, self.features, prompts, None)
        p, target = logits.sigmoid(), taught.sigmoid()
        dice = ((p - target) ** 2).sum((-2, -1)) / ((p ** 2).sum((-2, -1)) + (target ** 2).sum((-2, -1)) + 1)
        errors = FOCAL_WEIGHT * divergence(logits, taught) + DICE_WEIGHT * dice + (scores - ranks) ** 2
        return self.weight * per_prompt(errors, prompts.ambiguous).mean()


def quantized_episode(model: SegmentAnything, batch: Batch, rounds: int, generator: torch.Generator,
                      weight: float = 1.0) -> dict[str, Tensor]:
    """:func:`pocketsam.training.rounds.episode` on 8-bit activations, with the float model as teacher.

    Raises:
        ValueError: the encoder is not lite0's, whose layers are known to this module.
    """
    if not isinstance(model.image_encoder, LiteEncoder):
        raise ValueError("training for int8 knows lite0's encoder only")
    twin = FloatTwin(model, weight)
    twin.prepare(batch)
    with int8_activations(model.image_encoder):
        return episode(model, batch, rounds, generator, twin)
