"""Models and graphs described as data: one spec feeds dummy inputs, export names, runtime checks and device code."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from pocketsam.errors import BundleError, UsageError

Dim = int | str
Resize = Literal["pad", "squash"]
Resampling = Literal["pillow", "antialias", "bilinear"]
Upscale = Literal["frame", "direct", "cubic"]
Padding = Literal["without_box", "always", "fill"]
GraphName = Literal["encoder", "decoder", "click_image", "click_scores", "click_masks"]
CLICK_GRAPHS: tuple[GraphName, ...] = ("click_image", "click_scores", "click_masks")

DTYPES = ("uint8", "float32")
DEFAULT_SLOTS = 8
BATCH = "batch"
# Coarsest stride of all encoders, and the input sides that make sense.
SIZE_STEP, SIZE_LEAST, SIZE_MOST = 64, 128, 2048


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output: name, dtype (``uint8`` or ``float32``) and shape; a string is a symbolic size."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"tensor {self.name!r} has dtype {self.dtype!r}, expected one of {DTYPES}")
        if not self.shape or any(isinstance(d, int) and d < 1 for d in self.shape):
            raise ValueError(f"tensor {self.name!r} has shape {self.shape}, expected positive sizes")

    def concrete(self, batch: int) -> tuple[int, ...]:
        """The shape with every symbolic size replaced by ``batch``."""
        return tuple(batch if isinstance(d, str) else d for d in self.shape)


@dataclass(frozen=True)
class GraphSpec:
    """The names, dtypes and shapes of one graph, in order."""

    name: GraphName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def input_names(self) -> list[str]:
        return [t.name for t in self.inputs]

    @property
    def output_names(self) -> list[str]:
        return [t.name for t in self.outputs]

    @property
    def batched(self) -> bool:
        """Whether an input has a symbolic prompt batch."""
        return any(isinstance(t.shape[0], str) for t in self.inputs)


@dataclass(frozen=True)
class ModelSpec:
    """Everything the host must know of a model to prepare inputs and read outputs.

    Attributes:
        name: registry name, e.g. ``mobile_sam``.
        family: the architecture family, e.g. ``sam``.
        image_size: side S in pixels of the square encoder input.
        embed_dim: channels C of ``image_embeddings``.
        embed_size: side h = w of ``image_embeddings``; low-resolution masks are 4h x 4w.
        resize: ``pad`` scales the long side to S and zero-pads right and bottom after normalisation (SAM);
            ``squash`` stretches both sides to S (SAM 2).
        mean, std: RGB colour statistics on the 0..255 scale.
        high_res_channels: channels (C0, C1) of the skip features at 4h x 4w and 2h x 2w; empty when there are none.
        object_score: whether the decoder also returns ``object_score_logits``.
        hq_channels: channels of ``hq_features`` at 4h x 4w (SAM-HQ), 0 when there are none.
        prompt_size: side of the frame that prompts and mask upscaling live in; 0 means ``image_size``.
        resampling: how the official code resizes: ``pillow`` in uint8 with antialiasing; ``antialias`` the same filter
            on floats; ``bilinear`` on floats without antialiasing. Exported graphs take the result rounded to uint8.
        upscale: how logits reach the image: ``frame`` bilinear through the prompt frame, ``direct`` bilinear at once,
            ``cubic`` bicubic at once.
        box_first: box corners come before the points.
        padding: when the padding point is appended: ``without_box``, ``always``, or ``fill`` up to ``max_points``.
        max_points: most points, box corners included, that the official code takes; 0 means any number.
        mask_prompt: whether the model takes a mask as prompt.
        stability: (delta, threshold) of SAM 2's single mask: token 0 unless its stability falls below the threshold,
            then the best of 1 to 3; empty where the single mask is always token 0.
        best_only: a multimask request returns the best of tokens 1 to 3 instead of all three (SAM-HQ).
        logit_limit: returned logits are clipped to +- this value after masks were made; 0 means no clipping.
    """

    name: str
    family: str
    image_size: int
    embed_dim: int = 256
    embed_size: int = 64
    resize: Resize = "pad"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    high_res_channels: tuple[int, ...] = ()
    object_score: bool = False
    hq_channels: int = 0
    prompt_size: int = 0
    resampling: Resampling = "pillow"
    upscale: Upscale = "frame"
    box_first: bool = False
    padding: Padding = "without_box"
    max_points: int = 0
    mask_prompt: bool = True
    stability: tuple[float, ...] = ()
    best_only: bool = False
    logit_limit: float = 0.0

    def __post_init__(self) -> None:
        if self.image_size < 32 or self.embed_size < 4 or self.embed_dim < 1:
            raise ValueError(f"model {self.name!r}: sizes must be positive and image_size at least 32")
        for value, known in ((self.resize, get_args(Resize)), (self.resampling, get_args(Resampling)),
                             (self.upscale, get_args(Upscale)), (self.padding, get_args(Padding))):
            if value not in known:
                raise ValueError(f"model {self.name!r}: {value!r} is not one of {known}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"model {self.name!r}: mean and std need three values")
        if not all(0 <= v <= 255 for v in self.mean) or not all(0 < v <= 255 for v in self.std):
            raise ValueError(f"model {self.name!r}: mean must be from 0 to 255, std above 0")
        if len(self.high_res_channels) not in (0, 2):
            raise ValueError(f"model {self.name!r}: high_res_channels needs zero or two entries")
        if len(self.stability) not in (0, 2):
            raise ValueError(f"model {self.name!r}: stability needs a delta and a threshold, or nothing")
        if not all(0 <= v <= 1e6 for v in (*self.stability, self.logit_limit)):
            raise ValueError(f"model {self.name!r}: stability and logit_limit must be from 0 to 1e6")
        if self.padding == "fill" and self.max_points < 2:
            raise ValueError(f"model {self.name!r}: padding 'fill' needs max_points of at least 2")

    @property
    def least_slots(self) -> int:
        """Prompt slots that a click and a box need, padding points included."""
        return {"without_box": 2, "always": 3}.get(self.padding, self.max_points)

    def resized(self, image_size: int) -> ModelSpec:
        """The same model for another input side; a model with a prompt frame of its own keeps its embedding grid.

        Raises:
            UsageError: not a multiple of 64 from 128 to 2048.
        """
        if image_size % SIZE_STEP or not SIZE_LEAST <= image_size <= SIZE_MOST:
            raise UsageError(f"image size {image_size} cannot be used; choose a multiple of {SIZE_STEP} from "
                             f"{SIZE_LEAST} to {SIZE_MOST}.")
        cells = self.embed_size if self.prompt_size else image_size * self.embed_size // self.image_size
        return replace(self, image_size=image_size, embed_size=cells)

    @property
    def frame_size(self) -> int:
        """Side of the frame that prompts live in."""
        return self.prompt_size or self.image_size

    @property
    def mask_size(self) -> int:
        """Side of the low-resolution masks."""
        return 4 * self.embed_size

    @property
    def pad_color(self) -> tuple[int, int, int]:
        """The uint8 RGB colour that the host pads with: the rounded mean, which the encoder graph maps to zero."""
        r, g, b = (int(m + 0.5) for m in self.mean)
        return r, g, b

    def feature_specs(self) -> tuple[TensorSpec, ...]:
        """The tensors that pass from the encoder to the prompt decoder."""
        h = self.embed_size
        specs = [TensorSpec("image_embeddings", "float32", (1, self.embed_dim, h, h))]
        for i, channels in enumerate(self.high_res_channels):
            side = 4 * h >> i
            specs.append(TensorSpec(f"high_res_features_{i}", "float32", (1, channels, side, side)))
        if self.hq_channels:
            specs.append(TensorSpec("hq_features", "float32", (1, self.hq_channels, 4 * h, 4 * h)))
        return tuple(specs)

    def encoder_graph(self) -> GraphSpec:
        """The encoder's contract: ``image`` uint8 (1, S, S, 3) RGB in, features out."""
        s = self.image_size
        return GraphSpec("encoder", (TensorSpec("image", "uint8", (1, s, s, 3)),), self.feature_specs())

    def decoder_graph(self, slots: int = DEFAULT_SLOTS) -> GraphSpec:
        """The prompt decoder's contract with ``slots`` fixed prompt slots and a symbolic prompt batch."""
        m = self.mask_size
        inputs = [
            *self.feature_specs(),
            TensorSpec("point_coords", "float32", (BATCH, slots, 2)),
            TensorSpec("point_labels", "float32", (BATCH, slots)),
        ]
        if self.mask_prompt:
            inputs.append(TensorSpec("mask_input", "float32", (BATCH, 1, m, m)))
            inputs.append(TensorSpec("has_mask_input", "float32", (BATCH,)))
        outputs = [TensorSpec("low_res_masks", "float32", (BATCH, 4, m, m)),
                   TensorSpec("iou_predictions", "float32", (BATCH, 4))]
        if self.object_score:
            outputs.append(TensorSpec("object_score_logits", "float32", (BATCH, 1)))
        return GraphSpec("decoder", tuple(inputs), tuple(outputs))

    @property
    def clickable(self) -> bool:
        """Whether the decoder has a form for many clicks: SAM's or SAM 2's own, not HQ's or EfficientSAM's."""
        return self.hq_channels == 0 and self.padding != "fill" and self.embed_dim % 16 == 0

    def graphs(self, slots: int = DEFAULT_SLOTS) -> dict[str, GraphSpec]:
        """All graphs that the model can have, by name: encoder, decoder and, if it is clickable, the click graphs."""
        from pocketsam.click_specs import click_graphs

        return {g.name: g for g in (self.encoder_graph(), self.decoder_graph(slots), *click_graphs(self))}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> ModelSpec:
        """Rebuild a spec from untrusted JSON.

        Raises:
            BundleError: a field is missing, unknown or out of range.
        """
        try:
            known = {f.name for f in fields(cls)}
            if unknown := sorted(set(data) - known):
                raise ValueError(f"unknown fields {unknown}")
            clean: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            for key, value in clean.items():
                _check_type(key, value)
            return cls(**clean)
        except (TypeError, ValueError, AttributeError) as e:
            raise BundleError(f"the bundle's model description is not usable ({e}); export the bundle again.") from e


_TEXTS = ("name", "family", "resize", "resampling", "upscale", "padding")
_COUNTS = ("image_size", "embed_dim", "embed_size", "prompt_size", "hq_channels", "max_points")


def _check_type(key: str, value: Any) -> None:
    """Raise ValueError unless a value of untrusted JSON has the type of its field in ModelSpec."""
    if key in _TEXTS:
        good, expected = isinstance(value, str), "text"
    elif key in _COUNTS:
        good, expected = _is_count(value), "an integer from 0 to 8192"
    elif key == "high_res_channels":
        good, expected = isinstance(value, tuple) and all(_is_count(v) and v for v in value), "integers from 1 to 8192"
    elif key in ("mean", "std", "stability"):
        good, expected = isinstance(value, tuple) and all(isinstance(v, (int, float)) for v in value), "numbers"
    elif key == "logit_limit":
        good, expected = isinstance(value, (int, float)), "a number"
    else:
        good, expected = isinstance(value, bool), "true or false"
    if not good:
        raise ValueError(f"{key} must be {expected}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 8192
