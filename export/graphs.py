"""The graphs of the contract, as torch modules that every converter takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketsam.models.click_decoder import CLICK_MODULES
from pocketsam.models.sam import SegmentAnything
from pocketsam.specs import DEFAULT_SLOTS, GraphSpec


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's weights and tables."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


class EncoderGraph(nn.Module):
    """``image`` uint8 (1, S, S, 3) RGB -> features, with normalisation and exact zero padding inside.

    The host pads with the rounded mean colour, which normalises to at most 0.006 instead of 0. Where the means are
    not whole numbers, pixels of exactly that colour are set to zero, so padding equals the official
    pad-after-normalisation bit for bit; a real pixel of that colour moves by less than half a grey level.
    """

    mean: Tensor
    std: Tensor
    pad_color: Tensor

    def __init__(self, model: SegmentAnything) -> None:
        super().__init__()
        spec = model.spec
        self.encoder = model.image_encoder
        self.names = [t.name for t in spec.feature_specs()]
        self.divide = not model.std_folded
        self.exact_pad = spec.resize == "pad" and tuple(float(p) for p in spec.pad_color) != spec.mean
        for name, values in (("mean", spec.mean), ("std", spec.std), ("pad_color", spec.pad_color)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        # Planes first: subtracting three values along the last axis is many times slower in ONNX Runtime.
        x = image.permute(0, 3, 1, 2).to(torch.float32)
        y = x - self.mean
        if self.exact_pad:
            y = y * (x - self.pad_color).abs().sum(1, keepdim=True).clamp(max=1.0)
        features = self.encoder(y / self.std if self.divide else y)
        return tuple(features[n] for n in self.names)


class DecoderGraph(nn.Module):
    """Features and fixed prompt slots -> the outputs of ``ModelSpec.decoder_graph``, in its order."""

    def __init__(self, model: SegmentAnything, slots: int = DEFAULT_SLOTS) -> None:
        super().__init__()
        self.model = model
        self.spec = model.spec.decoder_graph(slots)
        self.names = [t.name for t in model.spec.feature_specs()]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        n = len(self.names)
        features = dict(zip(self.names, inputs[:n], strict=True))
        coords, labels, *mask = inputs[n:]
        mask_input, has_mask_input = mask or (None, None)
        return self.model.decode(features, coords, labels, mask_input, has_mask_input, fixed_slots=True)


class ClickGraph(nn.Module):
    """One of the click graphs, inputs and outputs in the order of its spec."""

    def __init__(self, model: SegmentAnything, name: str) -> None:
        super().__init__()
        self.inner = CLICK_MODULES[name](model)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.inner(*inputs)
        return out if isinstance(out, tuple) else (out,)


Graph = EncoderGraph | DecoderGraph | ClickGraph


def example_inputs(spec: GraphSpec, batch: int) -> tuple[Tensor, ...]:
    """Seeded inputs of the right shapes and dtypes, with plausible coordinates and labels, for tracing."""
    rng = torch.Generator().manual_seed(0)
    out = []
    for t in spec.inputs:
        shape = t.concrete(batch)
        if t.dtype == "uint8":
            out.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng))
        elif t.name == "point_labels":
            out.append(torch.randint(-2, 4, shape, generator=rng).float())
        else:
            out.append(torch.randn(shape, generator=rng))
    return tuple(out)
