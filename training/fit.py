"""``fit``: packs and a preset in, a run folder out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pocketsam import registry
from pocketsam.doctor import machine
from pocketsam.errors import UsageError
from pocketsam.labelled import identity
from pocketsam.models.catalog import spec as spec_of
from pocketsam.models.lite0 import LiteEncoder, lite0
from pocketsam.models.loading import load_model, read_state_dict
from pocketsam.models.mask_decoder import TwoWayBlock
from pocketsam.models.sam import SegmentAnything
from pocketsam.training.checkpoint import CHECKPOINT, plan_of, read_checkpoint
from pocketsam.training.convert_trunk import load_trunk
from pocketsam.training.distill import StoredTeacher, check_weights, load_teacher
from pocketsam.training.loop import Recipe, Trainer
from pocketsam.training.packs import Cache, build_cache
from pocketsam.training.parallel import spawn
from pocketsam.training.presets import PRESETS
from pocketsam.training.propose import propose
from pocketsam.training.quantized import quantized_episode
from pocketsam.training.rounds import Teacher, episode
from pocketsam.training.ship import load_weights
from pocketsam.training.teach import open_taught

# Makes the attention to a token's own place about ten times the attention elsewhere.
ALIGNED_GAIN = 2.0
# Of the kernels that cuDNN knows for a convolution; trying ten takes a minute.
KERNELS_TRIED = 4


@dataclass(frozen=True)
class Teaching:
    """A teacher by registry name and checkpoint, and the weights of its two losses."""

    model: str
    checkpoint: Path
    embeddings: float
    logits: float

    def teacher(self, place: torch.device, data: Sequence[Path]) -> Teacher:
        return load_teacher(self.model, self.checkpoint, place, self.embeddings, self.logits)


@dataclass(frozen=True)
class Stored:
    """A teacher's embeddings of the packs, made by ``teach``, and the weight of their loss."""

    path: Path
    weight: float

    def teacher(self, place: torch.device, data: Sequence[Path]) -> Teacher:
        return StoredTeacher(open_taught(self.path, data), self.weight)


@dataclass(frozen=True)
class Start:
    """Where the weights come from: another run, or ImageNet for the trunk alone, or nothing."""

    initial: Path | None = None
    trunk: Path | None = None

    def model(self, seed: int) -> SegmentAnything:
        torch.manual_seed(seed)
        if self.initial is not None:
            return load_weights(self.initial)
        model = lite0()
        align_attention(model)
        encoder = model.image_encoder
        if self.trunk is not None and isinstance(encoder, LiteEncoder):
            load_trunk(encoder.trunk, read_state_dict(self.trunk))
        return model


@torch.no_grad()
def align_attention(model: SegmentAnything) -> None:
    """Start the decoder's cross-attention between tokens and image positions at "same place".

    With equal query and key projections the logits begin as a kernel of the distance between two positional
    encodings: a click looks at its surroundings and these look at the click. Random projections take thousands of
    steps to find that; a short run cannot spare them.
    """
    transformer = model.mask_decoder.transformer
    crossings = [transformer.final_attn_token_to_image]
    for block in transformer.layers:
        assert isinstance(block, TwoWayBlock)
        crossings += [block.cross_attn_token_to_image, block.cross_attn_image_to_token]
    for attention in crossings:
        attention.q_proj.weight *= ALIGNED_GAIN
        attention.k_proj.weight.copy_(attention.q_proj.weight)


def fit(data: Sequence[Path], out: Path, preset: str, minutes: float, *, trunk: Path | None = None,
        initial: Path | None = None, lr: float | None = None, seed: int = 0, workers: int = 2,
        teaching: Teaching | Stored | None = None, proposer: tuple[str, Path] | None = None,
        stop_after: float | None = None) -> None:
    """Train lite0, or continue the run in ``out``, by the same call but for ``workers`` and ``stop_after``.

    Args:
        data: packs to train on.
        out: folder of the run.
        preset: a name in ``PRESETS``.
        minutes: length of the run, counted over resumptions.
        trunk: ImageNet weights from ``convert-trunk``.
        initial: lite0 weights to start from instead.
        lr: peak learning rate instead of the preset's.
        seed: of initial weights, data and prompts.
        workers: threads that decode the packs.
        teaching: distil from another model, or from embeddings that one made.
        proposer: name and checkpoint of a model that proposes further regions for sparsely labelled images.
        stop_after: minutes after which to save and return, to be continued by the same call.

    Raises:
        UsageError: the run in ``out`` was begun by another call, the preset takes no teacher, a model sees photos in
            another frame than lite0, or a number is out of range.
        CheckpointError: weights to start from or to learn from cannot be read, or are another model's.
        EmbeddingError: the stored embeddings are not those of the packs.
        LabelError: a pack cannot be used.
    """
    _check_numbers(minutes, lr, workers, stop_after)
    for name in (*([teaching.model] if isinstance(teaching, Teaching) else []), *([proposer[0]] if proposer else [])):
        _check_frame(name)
    chosen = PRESETS[preset](minutes)
    device = "cuda" if torch.cuda.is_available() and preset == "gpu" else "cpu"
    recipe = replace(chosen.recipe, seed=seed, lr=chosen.recipe.lr if lr is None else lr,
                     bf16=chosen.recipe.bf16 and computes_bf16(device))
    call = {"preset": preset, "data": [identity(path) for path in data], "trunk": str(trunk), "initial": str(initial),
            "teacher": str(teaching), "propose": str(proposer)}
    if recipe.quantized and teaching is not None:
        raise UsageError(f"the preset {preset} has the float model as its teacher; it takes no other.")
    if isinstance(teaching, Teaching):
        check_weights(teaching.embeddings, teaching.logits)
    # Before minutes of decoding.
    start = Start(initial, trunk)
    start.model(seed)
    if (out / CHECKPOINT).is_file():
        read_checkpoint(out, plan_of(asdict(recipe), call), torch.device("cpu"))
    if isinstance(teaching, Stored):
        open_taught(teaching.path, data)
    cache = build_cache(data, chosen.cache, workers)
    if proposer is not None:
        cache = propose(load_model(*proposer).to(device), cache, computes_bf16(device))
        layers, images = sum(map(len, cache.proposed)), sum(map(bool, cache.proposed))
        print(f"{layers} layers proposed for {images} images", flush=True)
    spawn(chosen.processes, _train, cache, recipe, out, start, device, teaching, data,
          call, stop_after)


def _check_numbers(minutes: float, lr: float | None, workers: int, stop_after: float | None) -> None:
    for name, value in (("minutes", minutes), ("lr", 1 if lr is None else lr), ("workers", workers),
                        ("stop_after", 1 if stop_after is None else stop_after)):
        if not 0 < value < float("inf"):
            raise UsageError(f"{name} is {value}; expected more than 0.")


def _check_frame(model: str) -> None:
    """Raise UsageError for a model that cannot answer on batches that are padded as lite0's are."""
    registry.check("model", model)
    spec = spec_of(model)
    if spec.resize != "pad" or spec.padding == "fill":
        raise UsageError(f"{model} takes photos squashed to a square, or a fixed number of points; to teach or to "
                         "propose, choose a model that pads, such as mobile_sam.")


def computes_bf16(device: str) -> bool:
    """Whether bf16 is faster than float32 there: a CPU without the instructions emulates it, ten times slower."""
    return device == "cuda" or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(machine()["features"]))


def _train(cache: Cache, recipe: Recipe, out: Path, start: Start, device: str, teaching: Teaching | Stored | None,
           data: Sequence[Path], call: Mapping[str, Any], stop_after: float | None) -> None:
    place = torch.device(device)
    if place.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = KERNELS_TRIED
    model = start.model(recipe.seed).requires_grad_(True)
    model = model.to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    loss = partial(quantized_episode, weight=recipe.quantized) if recipe.quantized else episode
    if teaching is not None:
        loss = partial(episode, teacher=teaching.teacher(place, data))
    Trainer(model, cache, recipe, out, loss, call).run(stop_after=stop_after)
