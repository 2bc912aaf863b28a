"""The promptable segmenter: image encoder, prompt encoder and mask decoder under the official key names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketsam.models.mask_decoder import MASKED, MaskDecoder
from pocketsam.models.prompt_encoder import EMPTY_SLOT, PromptEncoder
from pocketsam.specs import ModelSpec

Features = dict[str, Tensor]


class SegmentAnything(nn.Module):
    """A model of the Segment Anything family in image mode.

    Args:
        spec: its description.
        image_encoder: (B, 3, S, S) normalised -> features by contract name.
    """

    def __init__(self, spec: ModelSpec, image_encoder: nn.Module, prompt_encoder: PromptEncoder,
                 mask_decoder: MaskDecoder) -> None:
        super().__init__()
        self.spec = spec
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        # Set by export once the first convolution divides by the std.
        self.std_folded = False

    def normalize(self, image: Tensor) -> Tensor:
        """uint8 or float (B, H, W, 3) RGB on the 0..255 scale -> (B, 3, H, W) with the model's mean and std."""
        mean, std = (torch.tensor(v, dtype=torch.float32, device=image.device) for v in (self.spec.mean, self.spec.std))
        return ((image.float() - mean) / std).permute(0, 3, 1, 2)

    def encode(self, x: Tensor) -> Features:
        """(B, 3, S, S) normalised and zero-padded -> features by contract name."""
        features: Features = self.image_encoder(x)
        return features

    def decode(self, features: Features, point_coords: Tensor, point_labels: Tensor, mask_input: Tensor | None,
               has_mask_input: Tensor | None, fixed_slots: bool = False) -> tuple[Tensor, ...]:
        """Masks for a batch of prompts on one image.

        Args:
            features: from :meth:`encode`, batch 1, or batch B to decode one prompt per image.
            point_coords: (B, N, 2) XY pixels in the prompt frame, whose side is ``spec.frame_size``.
            point_labels: (B, N): 1, 0, 2 and 3 box corners, -1 padding point, -2 empty slot.
            mask_input: (B, 1, 4h, 4w) logits, or None when no prompt has a mask.
            has_mask_input: (B,) 0 or 1, or None as above.
            fixed_slots: mask empty slots out of attention; off, N must hold no empty slot (the official form).

        Returns:
            low_res_masks (B, 4, 4h, 4w), iou_predictions (B, 4) and, for families that have it, object_score_logits
            (B, 1).
        """
        encoder = self.prompt_encoder
        tokens = encoder.points(point_coords, point_labels)
        bias = (point_labels == EMPTY_SLOT).to(tokens.dtype) * MASKED if fixed_slots else None
        if mask_input is None or has_mask_input is None:
            dense = encoder.no_mask()
        else:
            dense = encoder.masks(mask_input, has_mask_input)
        image = features["image_embeddings"] if dense is None else features["image_embeddings"] + dense
        if image.shape[0] != tokens.shape[0]:
            image = image.expand(tokens.shape[0], -1, -1, -1)
        high_res = [features[k] for k in ("high_res_features_0", "high_res_features_1") if k in features]
        answer: tuple[Tensor, ...] = self.mask_decoder(image, encoder.dense_pe(), tokens, bias, high_res,
                                                       features.get("hq_features"))
        return answer
