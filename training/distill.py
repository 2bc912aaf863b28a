"""Learning from another model: a teacher of any size and family supplies embeddings, answers, or both.

The teacher sees the student's padded square as its image, scaled to its own input size, so that one frame serves
both and coordinates differ by a factor only.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.errors import UsageError
from pocketsam.models.loading import load_model
from pocketsam.models.sam import Features, SegmentAnything
from pocketsam.training.batches import Batch
from pocketsam.training.losses import divergence, per_prompt
from pocketsam.training.prompts import Prompts
from pocketsam.training.rounds import encode, repeat


def check_weights(embeddings: float, logits: float) -> None:
    """Raises UsageError if nothing would be learned from a teacher."""
    if min(embeddings, logits) < 0 or embeddings + logits == 0:
        raise UsageError(f"the weights of a teacher's embeddings and logits are {embeddings} and {logits}; expected "
                         "one above zero, none below.")


class ModelTeacher:
    """A :class:`pocketsam.training.rounds.Teacher` made of a trained model.

    Args:
        model: on the student's device; it is frozen.
        embeddings: weight of the mean square difference of image embeddings (MobileSAM's distillation).
        logits: weight of the divergence from the teacher's mask probabilities and of the squared score difference.

    Raises:
        UsageError: both weights are zero, or one is negative.
    """

    def __init__(self, model: SegmentAnything, embeddings: float = 1.0, logits: float = 1.0) -> None:
        check_weights(embeddings, logits)
        self.model = model.eval().requires_grad_(False)
        self.embeddings, self.logits = embeddings, logits
        self.features: Features = {}
        self.scale, self.regions = 1.0, 1

    @torch.no_grad()
    def observe(self, batch: Batch) -> None:
        side = self.model.spec.image_size
        images = F.interpolate(batch.images, (side, side), mode="bilinear", antialias=True)
        valid = F.interpolate(batch.valid, (side, side), mode="nearest")
        self.features = encode(self.model, images, valid)
        self.scale = side / batch.images.shape[-1]
        self.regions = len(batch.targets) // len(batch.images)

    def embedding_loss(self, features: Features) -> Tensor:
        """Mean square over (B, C, h, w), the teacher's map averaged or interpolated to the student's grid."""
        student, target = features["image_embeddings"].float(), self.features["image_embeddings"].float()
        if not self.embeddings:
            return student.new_zeros(())
        if student.shape[1] != target.shape[1]:
            raise UsageError(f"the teacher's embedding has {target.shape[1]} channels and the student's "
                             f"{student.shape[1]}; distil logits instead.")
        size = (student.shape[-2], student.shape[-1])
        return self.embeddings * F.mse_loss(student, _resize(target, size))

    def answer_loss(self, prompts: Prompts, logits: Tensor, scores: Tensor) -> Tensor:
        """Masks 1 to 3 for a single point, mask 0 for any other prompt, in the teacher's order of masks."""
        if not self.logits:
            return logits.new_zeros(())
        with torch.no_grad():
            features = repeat(self.features, self.regions)
            taught, ranks, *_ = self.model.decode(features, prompts.coords * self.scale, prompts.labels, None, None,
                                                  fixed_slots=True)
            taught = _resize(taught.float(), (logits.shape[-2], logits.shape[-1]))
        errors = divergence(logits, taught) + (scores - ranks.float()) ** 2
        return self.logits * per_prompt(errors, prompts.ambiguous).mean()


class StoredTeacher:
    """A :class:`pocketsam.training.rounds.Teacher` of embeddings made beforehand (``teach``), for images shown whole.

    Args:
        taught: float16 (N, C, h, w), one row for each image of the cache.
        weight: of the mean square difference, relative to the embeddings' variance.
    """

    def __init__(self, taught: Tensor, weight: float) -> None:
        self.taught = taught
        self.weight = weight / float(taught[:: max(1, len(taught) // 64)].float().var())
        self.shown = torch.empty(0, dtype=torch.long)

    def observe(self, batch: Batch) -> None:
        self.shown = batch.shown.cpu()

    def embedding_loss(self, features: Features) -> Tensor:
        """Mean square over the images that are shown whole, times their share of the batch."""
        student = features["image_embeddings"].float()
        whole = self.shown >= 0
        target = self.taught[self.shown[whole]].to(student.device).float()
        size = (student.shape[-2], student.shape[-1])
        errors = (student[whole.to(student.device)] - _resize(target, size)) ** 2
        return self.weight * errors.sum() / student.numel()

    def answer_loss(self, prompts: Prompts, logits: Tensor, scores: Tensor) -> Tensor:
        """Nothing: the answers were not stored."""
        return logits.new_zeros(())


def load_teacher(name: str, checkpoint: Path, device: torch.device, embeddings: float, logits: float) -> ModelTeacher:
    """A teacher from an official checkpoint of any model of the registry."""
    return ModelTeacher(load_model(name, checkpoint).to(device), embeddings, logits)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *size): averaged when it shrinks, bilinear when it grows."""
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True)
