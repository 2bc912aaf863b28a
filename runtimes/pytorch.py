"""PyTorch eager on the CPU: the reference. It follows the official predictors exactly (padding, dynamic prompts)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pocketsam.errors import UsageError
from pocketsam.geometry import Frame
from pocketsam.images import Rgb
from pocketsam.models.click_decoder import CLICK_MODULES
from pocketsam.models.loading import load_model, weights_sha256
from pocketsam.models.sam import SegmentAnything
from pocketsam.prompts import EMPTY_SLOT
from pocketsam.resampling import Floats
from pocketsam.runtime import Features, Tensors

# The official decoder takes any number of points; this only bounds the arrays that carry them.
MAX_SLOTS = 64


class PyTorchRuntime:
    """Executes a model of ``pocketsam.models`` in fp32; images may be float32, not yet rounded to uint8.

    Args:
        model: in eval mode.
        sha256: identity of its weights, from :func:`pocketsam.models.loading.weights_sha256`.
        threads: CPU threads, a setting of the whole process in PyTorch.
    """

    takes_floats = True

    def __init__(self, model: SegmentAnything, sha256: str, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = model.eval()
        self.spec = model.spec
        self.slots = MAX_SLOTS
        self._sha256 = sha256
        self.clicks = self.spec.clickable
        self.click_workers = 1
        # Folded from the weights when they are first asked for.
        self._click = functools.cache(lambda name: CLICK_MODULES[name](self.model).eval())

    @classmethod
    def from_checkpoint(cls, model: str, checkpoint: Path, threads: int | None = None,
                        image_size: int | None = None) -> PyTorchRuntime:
        """Load an official checkpoint, for its native input side or another.

        Raises:
            CheckpointError: the file is damaged or belongs to another model.
        """
        loaded = load_model(model, checkpoint, image_size)
        return cls(loaded, weights_sha256(loaded), threads)

    @classmethod
    def open(cls, *args: object, **kwargs: object) -> PyTorchRuntime:
        """Bundles hold no PyTorch weights.

        Raises:
            UsageError: always; the message says what to call instead.
        """
        raise UsageError("a bundle holds no PyTorch weights; load the model by name with its checkpoint instead.")

    @torch.inference_mode()
    def encode(self, image: Rgb | Floats, frame: Frame) -> Features:
        content = torch.from_numpy(image[:, :frame.content_height, :frame.content_width].copy())
        x = self.model.normalize(content)
        x = F.pad(x, (0, frame.size - frame.content_width, 0, frame.size - frame.content_height))
        return {name: tensor.numpy() for name, tensor in self.model.encode(x).items()}

    @torch.inference_mode()
    def decode(self, features: Features, prompts: Tensors) -> Tensors:
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in {**features, **prompts}.items()}
        feats = {t.name: tensors[t.name] for t in self.spec.feature_specs()}
        labels = tensors["point_labels"]
        has_mask = tensors.get("has_mask_input", torch.zeros(len(labels)))
        outputs = self.spec.decoder_graph().outputs
        out = {t.name: torch.empty(t.concrete(len(labels))) for t in outputs}
        for rows in _same_pattern(labels, has_mask):
            used = labels[rows[0]] != EMPTY_SLOT
            mask = (tensors["mask_input"][rows], has_mask[rows]) if has_mask[rows[0]] > 0.5 else (None, None)
            answer = self.model.decode(feats, tensors["point_coords"][rows][:, used], labels[rows][:, used], *mask)
            for t, values in zip(outputs, answer, strict=True):
                out[t.name][rows] = values
        return {name: values.numpy() for name, values in out.items()}

    @torch.inference_mode()
    def click(self, graph: str, inputs: Tensors) -> Tensors:
        spec = self.spec.graphs()[graph]
        out = self._click(graph)(*(torch.from_numpy(np.ascontiguousarray(inputs[n])) for n in spec.input_names))
        answers = out if isinstance(out, tuple) else (out,)
        return {n: t.numpy() for n, t in zip(spec.output_names, answers, strict=True)}

    def info(self) -> dict[str, Any]:
        return {"runtime": "pytorch", "version": torch.__version__, "precision": "fp32",
                "threads": torch.get_num_threads(), "weights_sha256": self._sha256}


def _same_pattern(labels: torch.Tensor, has_mask: torch.Tensor) -> list[list[int]]:
    """Indices of prompts that use the same slots, so that each group runs in the official dynamic form."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate((labels != EMPTY_SLOT).tolist()):
        groups.setdefault((*row, bool(has_mask[i] > 0.5)), []).append(i)
    return list(groups.values())
