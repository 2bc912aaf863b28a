"""Training itself: losses, the loop, resumption, shipping and the command line, on drawn images."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import PLAIN, SIZE, generator, toy, write_pack
from PIL import Image
from safetensors.torch import save_file

import pocketsam.training.fit as training_fit
from pocketsam.errors import UsageError
from pocketsam.models.lite0 import lite0
from pocketsam.training import losses
from pocketsam.training.__main__ import main
from pocketsam.training.augment import Augment
from pocketsam.training.checkpoint import CHECKPOINT
from pocketsam.training.curves import draw_curves
from pocketsam.training.fit import Teaching, fit
from pocketsam.training.loop import LOG, Phase, Recipe, Trainer, schedule
from pocketsam.training.on_device import DeviceCache
from pocketsam.training.packs import Cache
from pocketsam.training.presets import PRESETS, Preset
from pocketsam.training.rounds import chosen_logits
from pocketsam.training.ship import load_weights, ship

pytestmark = pytest.mark.usefixtures("gradients")
RECIPE = Recipe((Phase(1, SIZE, 2, 2, 2, frozen=2),), steps=4, augment=Augment())


def test_losses_equal_values_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [-math.log(3), math.log(3)]])
    target = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    # Probabilities 1/2, 3/4, 1/4, 3/4.
    focal = (0.25 * math.log(2) + 0.0625 * math.log(4 / 3) * 2 + 0.5625 * math.log(4)) / 4
    assert float(losses.focal_loss(logits, target)) == pytest.approx(focal)
    assert float(losses.dice_loss(logits, target)) == pytest.approx(1 - (2 * 1.25 + 1) / (2.25 + 2 + 1))
    assert float(losses.mask_iou(logits, target)) == pytest.approx(1 / 3)
    assert float(losses.mask_iou(-torch.ones(2, 2), torch.zeros(2, 2))) == 1


def test_only_the_best_of_three_masks_learns_from_a_point() -> None:
    target = torch.zeros(2, 8, 8)
    target[:, :4] = 1
    logits = torch.randn(2, 4, 8, 8, generator=generator())
    logits[0, 2] = target[0] * 8 - 4
    logits.requires_grad_(True)
    scores = torch.zeros(2, 4, requires_grad=True)
    losses.prompt_loss(logits, scores, target, torch.tensor([True, False]))["loss"].backward()
    assert logits.grad is not None
    assert scores.grad is not None
    learning = logits.grad.flatten(2).abs().sum(-1) > 0
    assert learning.tolist() == [[False, False, True, False], [True, False, False, False]]
    assert scores.grad.ne(0).tolist()[1] == [True, False, False, False]
    assert not scores.grad[0, 0]


def test_a_point_is_answered_by_the_best_ranked_mask() -> None:
    logits = torch.arange(8.0).reshape(2, 4, 1, 1)
    scores = torch.tensor([[9.0, 1, 3, 2], [9, 1, 3, 2]])
    assert chosen_logits(logits, scores, torch.tensor([True, False])).flatten().tolist() == [2, 4]


def test_schedule_warms_up_and_decays() -> None:
    values = [schedule(p, 0.1) for p in (0.05, 0.1, 0.55, 1.0)]
    assert values == pytest.approx([0.5, 1.0, 0.505, 0.01])


def test_a_recipe_needs_one_length() -> None:
    with pytest.raises(ValueError, match="either steps or minutes"):
        replace(RECIPE, minutes=1)


def fresh(drawn_cache: Cache, out: Path) -> Trainer:
    torch.manual_seed(0)
    return Trainer(lite0(), drawn_cache, RECIPE, out)


def test_resuming_continues_bit_for_bit(drawn_cache: Cache, tmp_path: Path) -> None:
    whole = fresh(drawn_cache, tmp_path / "whole")
    for _ in range(4):
        whole.train_step()
    first = fresh(drawn_cache, tmp_path / "parts")
    for _ in range(2):
        first.train_step()
    first.save()
    assert not (tmp_path / "parts" / (CHECKPOINT + ".partial")).exists()
    torch.manual_seed(99)
    second = Trainer(lite0(), drawn_cache, RECIPE, tmp_path / "parts")
    assert second.step == 2
    for _ in range(2):
        second.train_step()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
        assert torch.equal(whole.average[key], second.average[key]), key


@pytest.mark.parametrize(("change", "named"), [
    ({"lr": 1e-4}, "another lr;"), ({"seed": 1}, "another seed;"), ({"steps": 8}, "another steps;"),
    ({"steps": None, "minutes": 3}, "another minutes, steps;"),
    ({"phases": (Phase(1, SIZE, 2, 2, 1, frozen=2),)}, "another phases;"),
])
def test_a_run_is_continued_with_its_own_recipe_only(drawn_cache: Cache, tmp_path: Path, change: dict[str, Any],
                                                     named: str) -> None:
    """But on any machine, whatever it computes in."""
    Trainer(toy(), drawn_cache, RECIPE, tmp_path).save()
    before = (tmp_path / CHECKPOINT).read_bytes()
    assert Trainer(toy(), drawn_cache, replace(RECIPE, bf16=True), tmp_path).step == 0
    with pytest.raises(UsageError, match=named):
        Trainer(toy(), drawn_cache, replace(RECIPE, **change), tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_checkpoint_without_its_recipe_is_refused(drawn_cache: Cache, tmp_path: Path) -> None:
    trainer = Trainer(toy(), drawn_cache, RECIPE, tmp_path)
    trainer.save()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    del state["plan"]
    torch.save(state, tmp_path / CHECKPOINT)
    with pytest.raises(UsageError, match="earlier version"):
        trainer.resume()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half"])
def test_a_damaged_checkpoint_is_one_sentence(drawn_cache: Cache, tmp_path: Path, content: bytes | str) -> None:
    trainer = Trainer(toy(), drawn_cache, RECIPE, tmp_path)
    trainer.save()
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[:len(whole) // 2])
    with pytest.raises(UsageError, match=r"cannot be read .*remove it to begin again"):
        trainer.resume()


def test_a_run_without_a_checkpoint_starts_its_log_anew(drawn_cache: Cache, tmp_path: Path) -> None:
    Trainer(toy(), drawn_cache, RECIPE, tmp_path)
    trainer = Trainer(toy(), drawn_cache, RECIPE, tmp_path)
    assert len((tmp_path / LOG).read_text().splitlines()) == 1
    trainer.save()
    Trainer(toy(), drawn_cache, RECIPE, tmp_path).run(log_steps=2)
    assert [json.loads(line).get("step") for line in (tmp_path / LOG).read_text().splitlines()] == [None, 2, 4]


def test_steps_after_the_checkpoint_are_logged_once(drawn_cache: Cache, tmp_path: Path) -> None:
    """As after a crash between two checkpoints, which may cut a line off."""
    trainer = fresh(drawn_cache, tmp_path)
    trainer.step = 2
    trainer.save()
    for step in (2, 4):
        trainer.log({"step": step})
    with (tmp_path / LOG).open("a") as log:
        log.write('{"step": 6, "lo')
    fresh(drawn_cache, tmp_path).log({"step": 4})
    assert [json.loads(line).get("step") for line in (tmp_path / LOG).read_text().splitlines()] == [None, 2, 4]


@pytest.mark.parametrize(("options", "words"), [
    ({"minutes": -5}, "minutes is -5"), ({"minutes": 0}, "minutes is 0"), ({"lr": 0}, "lr is 0"),
    ({"workers": 0}, "workers is 0"), ({"stop_after": 0}, "stop_after is 0"),
    ({"proposer": ("sam2.1_tiny", Path("x"))}, "sam2.1_tiny takes photos squashed"),
    ({"teaching": Teaching("efficient_sam_ti", Path("x"), 1, 1)}, "efficient_sam_ti takes photos squashed"),
])
def test_what_fit_cannot_do_is_said_first(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        fit([tmp_path / "missing.tar"], tmp_path / "run", **{"preset": "cpu", "minutes": 1, **options})


@pytest.mark.parametrize("pair", [("teacher", "taught"), ("trunk", "initial")])
def test_options_of_fit_that_exclude_each_other(tmp_path: Path, pair: tuple[str, str],
                                                capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [text for name in pair for text in (f"--{name}", "x")]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--data", "x", "--out", "x", *chosen, "--teacher-checkpoint", "x"])
    assert stop.value.code == 2
    assert "exclude each other" in capsys.readouterr().err


def test_fit_continues_by_the_same_call_only(drawn_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    for name, frozen in (("one", 6), ("two", 5)):
        monkeypatch.setitem(PRESETS, name, partial(small_preset, frozen))
    run, more = tmp_path / "run", write_pack(tmp_path / "more.tar", seed=1)
    call = {"--data": drawn_pack, "--out": run, "--preset": "one", "--minutes": 0.02}

    def call_with(**options: object) -> None:
        main(["fit", *(str(x) for pair in {**call, **{f"--{k}": v for k, v in options.items()}}.items() for x in pair)])

    moved = tmp_path / "moved.tar"
    shutil.copy(drawn_pack, moved)
    call_with()
    call_with(data=moved, workers=1)
    monkeypatch.setattr(training_fit, "build_cache", None)
    for options, named in (({"lr": 1e-5}, "another lr"), ({"seed": 2}, "another seed"), ({"preset": "two"}, "preset"),
                           ({"minutes": 9}, "another minutes"), ({"data": more}, "another data"),
                           ({"initial": run}, "another initial")):
        with pytest.raises(SystemExit) as stop:
            call_with(**options)
        assert stop.value.code == 2
        assert named in capsys.readouterr().err


def small_preset(frozen: int, minutes: float) -> Preset:
    return Preset(Recipe((Phase(1, SIZE, 1, 1, 1, frozen=frozen),), minutes=minutes), cache=SIZE)


def test_a_gradient_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(drawn_cache: Cache,
                                                                                 tmp_path: Path) -> None:
    trainer = fresh(drawn_cache, tmp_path)
    trainer.save()
    trainer.loss = lambda model, *_: {"loss": torch.nan * model.mask_decoder.iou_token.weight.sum()}
    with pytest.raises(FloatingPointError, match="not finite"):
        trainer.run()
    assert all(torch.isfinite(v).all() for v in load_weights(tmp_path).state_dict().values())


def test_training_from_a_cache_on_the_device(drawn_cache: Cache, tmp_path: Path) -> None:
    """As on a GPU: kernels are rehearsed without an update, and steps are the same again after resuming."""
    def trainer(out: str) -> Trainer:
        torch.manual_seed(0)
        made = Trainer(toy(), drawn_cache, replace(RECIPE, steps=4), tmp_path / out)
        made.near = DeviceCache(drawn_cache, torch.device("cpu"))
        return made

    whole, part = trainer("whole"), trainer("parts")
    whole.run()
    for _ in range(2):
        part.train_step()
    part.save()
    rest = trainer("parts")
    assert rest.step == 2
    rest.run()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[key]), key


def test_frozen_stages_keep_their_weights(drawn_cache: Cache, tmp_path: Path) -> None:
    trainer = fresh(drawn_cache, tmp_path)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train_step()
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert not [k for k in moved if "trunk.stem" in k or "trunk.stages.2." in k or "running_" in k]
    assert "image_encoder.trunk.stages.3.0.expand.c.weight" in moved
    assert "mask_decoder.mask_tokens.weight" in moved


def test_training_lowers_the_loss(drawn_cache: Cache, tmp_path: Path) -> None:
    recipe = Recipe((Phase(1, SIZE, 4, 4, 1),), steps=60, lr=2e-3, augment=PLAIN)
    trainer = Trainer(toy(), drawn_cache, recipe, tmp_path)
    trainer.run(log_steps=20)
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()][1:]
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert (tmp_path / CHECKPOINT).is_file()
    draw_curves(tmp_path / LOG, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500


def test_shipped_weights_load_and_stay_small(drawn_cache: Cache, tmp_path: Path) -> None:
    trainer = fresh(drawn_cache, tmp_path)
    trainer.train_step()
    trainer.save()
    assert ship(tmp_path, tmp_path / "lite0.safetensors") <= 15_000_000
    a, b = load_weights(tmp_path), load_weights(tmp_path / "lite0.safetensors")
    for key, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[key], value, rtol=1e-3, atol=1e-3)


def test_command_line_evaluates_and_ships(drawn_pack: Path, drawn_cache: Cache, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    fresh(drawn_cache, tmp_path).save()
    main(["ship", str(tmp_path), str(tmp_path / "w.safetensors")])
    main(["evaluate", str(tmp_path / "w.safetensors"), "--data", str(drawn_pack), "--size", "64", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "drawn0" in out
    assert "pearson" in out


PARALLEL = """
import sys
import torch
from pocketsam.training.parallel import average, rank, spawn

def work(out):
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.full((1, 2), float(rank())), torch.full((1,), 4.0 * rank())
    seconds = average(model, 10.0 * rank())
    torch.save([seconds, model.weight.grad, model.bias.grad], f"{out}/{rank()}.pt")

if __name__ == "__main__":
    spawn(2, work, sys.argv[1])
"""


@pytest.mark.slow
def test_processes_average_gradients_and_clock(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PARALLEL)
    subprocess.run([sys.executable, str(tmp_path / "script.py"), str(tmp_path)], check=True, timeout=120)
    for i in range(2):
        seconds, weight, bias = torch.load(tmp_path / f"{i}.pt", weights_only=True)
        assert seconds == 5.0
        assert weight.tolist() == [[0.5, 0.5]]
        assert bias.tolist() == [2.0]


FAILING = """
import sys
from pocketsam.errors import LabelError
from pocketsam.training.parallel import rank, spawn

def work():
    if rank() == 1:
        raise LabelError("no regions.")

if __name__ == "__main__":
    try:
        spawn(2, work)
    except LabelError as e:
        sys.exit(f"named: {e}")
"""


def test_an_error_of_a_process_comes_back_as_itself(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    got = subprocess.run([sys.executable, str(script)], capture_output=True, encoding="utf-8", timeout=120)
    assert got.stderr.splitlines()[-1] == "named: no regions.", got.stderr


def test_weights_that_cannot_be_used_are_one_sentence(drawn_pack: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    (tmp_path / "run").mkdir()
    out = str(tmp_path / "out")
    fit = ("fit", "--data", str(drawn_pack), "--out", out)
    for call, words in ((("ship", str(tmp_path / "none"), out), "holds no run"),
                        (("ship", str(tmp_path / "run"), out), "holds no run"),
                        (("evaluate", str(other), "--data", str(drawn_pack)), "does not hold lite0"),
                        (("evaluate", str(tmp_path / "none.safetensors"), "--data", str(drawn_pack)), "does not exist"),
                        ((*fit, "--initial", str(other)), "does not hold lite0"),
                        ((*fit, "--trunk", str(other)), "not a trunk of lite0")):
        with pytest.raises(SystemExit) as stopped:
            main(call)
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    assert not Path(out).exists()
