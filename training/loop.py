"""The training loop: AdamW, warm-up and cosine, an average of the weights, checkpoints to resume from.

A run that is counted in steps resumes bit for bit. One that is counted in minutes follows the clock: after a break the
same phases and rates come at other steps.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketsam.files import staged_file
from pocketsam.models.lite0 import LiteEncoder
from pocketsam.models.sam import SegmentAnything
from pocketsam.photos import CALIBRATION_IMAGES
from pocketsam.training.augment import Augment
from pocketsam.training.batches import Batch, image_weights, make_batch
from pocketsam.training.checkpoint import CHECKPOINT, plan_of, read_checkpoint, write_checkpoint
from pocketsam.training.on_device import DeviceCache
from pocketsam.training.packs import Cache
from pocketsam.training.parallel import average, rank
from pocketsam.training.rounds import encode, episode, set_input_size
from pocketsam.training.seeds import seeded

LOG = "log.jsonl"


@dataclass(frozen=True)
class Phase:
    """One part of the schedule: until this fraction of the run, at this input side and batch.

    Attributes:
        until: end as a fraction of the run, 1 for the last phase.
        size: input side S.
        images: B images per step.
        prompts: P regions per image.
        rounds: answers per prompt; 0 learns the teacher's embeddings alone.
        frozen: leading trunk stages (and the stem) that keep their ImageNet weights; -1 freezes nothing.
        augment: instead of the recipe's.
    """

    until: float
    size: int
    images: int
    prompts: int
    rounds: int
    frozen: int = -1
    augment: Augment | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the data.

    Attributes:
        phases: in order.
        steps: length of the run in steps, or None when ``minutes`` rules.
        minutes: length of the run in minutes of wall clock, counted over resumptions.
        lr: peak rate of the new layers; the trunk gets ``lr * trunk_lr``, the prompt decoder ``lr * decoder_lr``.
        warmup: fraction of the run.
        ema: decay of the weight average.
        bf16: autocast the forward pass; ``fit`` turns it off on CPUs that only emulate it.
        quantized: above 0, train on 8-bit activations with this weight of the agreement with the float model.
        seed: of everything.
    """

    phases: tuple[Phase, ...]
    steps: int | None = None
    minutes: float | None = None
    lr: float = 6e-4
    trunk_lr: float = 0.25
    decoder_lr: float = 1.0
    weight_decay: float = 0.05
    warmup: float = 0.03
    clip: float = 1.0
    ema: float = 0.998
    bf16: bool = False
    quantized: float = 0.0
    seed: int = 0
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")
        if not self.phases or self.phases[-1].until < 1:
            raise ValueError("the last phase must end at 1")


class Trainer:
    """A run in a folder: model, average, optimizer, generators and log, saved and resumed together.

    Args:
        model: to be trained, on its device.
        cache: decoded packs.
        recipe: how.
        out: the run's folder; an existing checkpoint in it is continued.
        loss: what a step minimises; :func:`pocketsam.training.rounds.episode` unless a teacher is used.
        call: what else decides the result, as plain values; a checkpoint is continued with the same only.

    Raises:
        UsageError: the checkpoint in ``out`` is of a run with another recipe or call.
    """

    def __init__(self, model: SegmentAnything, cache: Cache, recipe: Recipe, out: Path,
                 loss: Callable[[SegmentAnything, Batch, int, torch.Generator], dict[str, Tensor]] = episode,
                 call: Mapping[str, Any] | None = None) -> None:
        self.model, self.cache, self.recipe, self.out, self.loss = model, cache, recipe, out, loss
        self.plan = plan_of(asdict(recipe), call or {})
        self.device = next(model.parameters()).device
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, betas=(0.9, 0.98))
        self.weights = image_weights(cache)
        self.near = None if self.device.type == "cpu" else DeviceCache(cache, self.device)
        self.step, self.seconds = 0, 0.0
        self.started = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        if (out / CHECKPOINT).is_file():
            self.resume()
        else:
            calibrate(model, cache, recipe)
            self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
            if not rank():
                # Of a run that died before its first checkpoint.
                (out / LOG).unlink(missing_ok=True)
            self.log({"recipe": asdict(recipe), "images": len(cache.sources)})

    @property
    def progress(self) -> float:
        """Done fraction of the run."""
        if self.recipe.steps is not None:
            return self.step / self.recipe.steps
        assert self.recipe.minutes is not None
        return self.seconds / 60 / self.recipe.minutes

    def run(self, save_minutes: float = 3, log_steps: int = 20, stop_after: float | None = None) -> None:
        """Train to the end of the schedule.

        Args:
            save_minutes: between checkpoints.
            log_steps: steps averaged in each row of the log.
            stop_after: save and return after this many minutes, to be continued later.
        """
        sums: dict[str, Tensor] = {}
        logged = self.step
        if self.near is not None:
            self._rehearse()
        saved = first = self.seconds
        self.started = time.monotonic() - self.seconds
        while self.progress < 1 and (stop_after is None or self.seconds - first < 60 * stop_after):
            # Numbers stay on the device until they are logged, so that it never waits for the host.
            for name, value in self.train_step().items():
                sums[name] = sums[name] + value if name in sums else value
            if self.step % log_steps == 0:
                self._log_means(sums, self.step - logged)
                sums, logged = {}, self.step
                if self.seconds - saved > 60 * save_minutes:
                    self.save()
                    saved = self.seconds
        if sums:
            self._log_means(sums, self.step - logged)
        self.save()

    @property
    def phase(self) -> Phase:
        progress = self.progress
        return next(p for p in self.recipe.phases if progress < p.until or p is self.recipe.phases[-1])

    def _log_means(self, sums: dict[str, Tensor], steps: int) -> None:
        means = {name: float(value) / steps for name, value in sums.items()}
        if not math.isfinite(means["gradient"]):
            raise FloatingPointError(f"the gradient was not finite in the steps before {self.step}")
        self.log({"step": self.step, "progress": self.progress, "minutes": self.seconds / 60, "size": self.phase.size,
                  "lr": max(g["lr"] for g in self.optimizer.param_groups), **means})

    def _rehearse(self) -> None:
        """Each phase once without an update: a GPU looks for its fastest kernels, which is no part of the schedule."""
        for phase in self.recipe.phases:
            float(self._backward(phase)["loss"].detach())

    def batch(self, phase: Phase) -> Batch:
        """The batch of this step: the same again after resuming."""
        augment = phase.augment or self.recipe.augment
        generator = seeded(self.device, self.recipe.seed, rank(), self.step, "batch")
        if self.near is not None:
            return self.near.batch(phase.images, phase.prompts, phase.size, augment, generator)
        return make_batch(self.cache, self.weights, phase.images, phase.prompts, phase.size, augment,
                          generator).batch(self.device)

    def train_step(self) -> dict[str, Tensor]:
        """One update; returns the scalars of the loss."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * recipe.lr * schedule(self.progress, recipe.warmup)
        parts = self._backward(self.phase)
        self.seconds = average(self.model, time.monotonic() - self.started)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.step += 1
        self._update_average()
        return {**{k: v.detach() for k, v in parts.items()}, "gradient": norm}

    def _backward(self, phase: Phase) -> dict[str, Tensor]:
        """The gradients of this step, and the scalars of its loss."""
        batch = self.batch(phase)
        train_mode(self.model, phase.frozen)
        set_input_size(self.model, phase.size)
        generator = seeded(self.device, self.recipe.seed, rank(), self.step, "prompts")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            parts = self.loss(self.model, batch, phase.rounds, generator)
        self.optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return parts

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if rank():
            return
        state = {"model": self.model.state_dict(), "ema": self.average, "optimizer": self.optimizer.state_dict(),
                 "step": self.step, "seconds": self.seconds}
        write_checkpoint(self.out, state, self.plan)

    def resume(self) -> None:
        state = read_checkpoint(self.out, self.plan, self.device)
        self.model.load_state_dict(state["model"])
        self.average = state["ema"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self._forget_later_rows()

    def _forget_later_rows(self) -> None:
        """Steps that were logged after the checkpoint come again."""
        log = self.out / LOG
        if rank() or not log.is_file():
            return
        lines = log.read_text(encoding="utf-8").splitlines()
        with staged_file(log) as staged:
            staged.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= self.step), encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        """Append one JSON line."""
        if rank():
            return
        with (self.out / LOG).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")

    @torch.no_grad()
    def _update_average(self) -> None:
        # Early in the run the average must not remember the random start.
        weight = 1 - min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        current = self.model.state_dict()
        floats = [k for k, v in current.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in floats], [current[k] for k in floats], weight)
        for k, v in current.items():
            if not v.is_floating_point():
                self.average[k].copy_(v)


def _step_of(line: str) -> float:
    """The step of a line of the log; a line that a crash cut off is after every step."""
    try:
        return float(json.loads(line).get("step", 0))
    except ValueError:
        return math.inf


def schedule(progress: float, warmup: float) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine to 1 %."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    done = min(1.0, (progress - warmup) / (1 - warmup))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(model: SegmentAnything, recipe: Recipe) -> list[dict[str, Any]]:
    """New layers and trunk, each with and without weight decay; norms, biases and embeddings are not decayed."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        scale = recipe.trunk_lr if ".trunk." in name else 1.0 if "image_encoder." in name else recipe.decoder_lr
        plain = parameter.ndim < 2 or "embed" in name or "_token" in name
        groups.setdefault((scale, 0.0 if plain else recipe.weight_decay), []).append(parameter)
    return [{"params": p, "scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]


@torch.no_grad()
def calibrate(model: SegmentAnything, cache: Cache, recipe: Recipe, images: int = CALIBRATION_IMAGES) -> None:
    """Measure the statistics of the new BatchNorm layers once; they stay fixed, because batches are small."""
    encoder = model.image_encoder
    if not isinstance(encoder, LiteEncoder):
        return
    generator = torch.Generator().manual_seed(recipe.seed)
    cut = make_batch(cache, image_weights(cache), images, 1, recipe.phases[0].size, Augment(whole=1), generator)
    batch = cut.batch(next(model.parameters()).device)
    norms = [m for m in encoder.pyramid.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    encoder.pyramid.train()
    encode(model, batch.images, batch.valid)
    encoder.pyramid.eval()


def train_mode(model: SegmentAnything, frozen: int) -> None:
    """Training mode with fixed BatchNorm statistics and the early stages of the trunk frozen."""
    model.train()
    encoder = model.image_encoder
    if isinstance(encoder, LiteEncoder):
        encoder.eval()
        for module in _early(encoder, frozen):
            for parameter in module.parameters():
                parameter.requires_grad_(False)
        for module in list(encoder.trunk.stages)[frozen + 1:]:
            for parameter in module.parameters():
                parameter.requires_grad_(True)


def _early(encoder: LiteEncoder, frozen: int) -> Iterator[nn.Module]:
    if frozen >= 0:
        yield encoder.trunk.stem
        yield from list(encoder.trunk.stages)[:frozen + 1]
