"""The head that predicts IoU, fitted anew: it learns to rank, and nothing else of the model changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drawn import SIZE, generator, toy
from safetensors.torch import load_file
from torch import Tensor

from pocketsam.builtin import checkpoint_for
from pocketsam.errors import OutputError
from pocketsam.labelled import read_pack
from pocketsam.models.mask_decoder import Mlp
from pocketsam.training.ranking import Answers, fit_ranking, photo_answers, rank, standing

pytestmark = pytest.mark.usefixtures("gradients")
HEAD = "mask_decoder.iou_prediction_head."


def test_answers_are_those_of_the_model(drawn_pack: Path) -> None:
    model, sample = toy(SIZE), next(iter(read_pack(drawn_pack)))
    (tokens, iou, ambiguous), again = (photo_answers(model, sample, generator()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((tokens, iou, ambiguous), again, strict=True))
    # Two regions, four prompts each.
    assert tokens.shape == (8, 64)
    assert iou.shape == (8, 4)
    assert 0 < float(iou.mean()) < 1
    assert ambiguous.tolist() == [True, True, False, False, True, True, False, False]
    seen: list[Tensor] = []
    handle = model.mask_decoder.register_forward_hook(lambda *x: seen.append(x[-1][1]))
    photo_answers(model, sample, generator())
    handle.remove()
    torch.testing.assert_close(model.mask_decoder.iou_prediction_head(tokens), torch.cat(seen))


def test_a_head_learns_to_rank() -> None:
    torch.manual_seed(0)
    truth = torch.nn.Linear(64, 4)

    def made(rows: int) -> Answers:
        tokens = torch.randn(rows, 64)
        return Answers(tokens, truth(tokens).sigmoid().detach(), torch.rand(rows) < 0.5,
                       torch.ones(rows))

    head = Mlp(64, 64, 4)
    kept = [p.clone() for p in head.parameters()]
    judged = made(1000)
    before, after = standing(head, judged), standing(fit_ranking(head, made(20000), steps=200), judged)
    assert all(torch.equal(a, b) for a, b in zip(kept, head.parameters(), strict=True))
    assert before.ranked < before.oracle - 0.05
    assert after.oracle == before.oracle
    assert after.ranked > after.oracle - 0.01
    assert after.pearson is not None
    assert after.pearson > 0.7


def test_a_place_that_cannot_be_written_is_told_before_the_work(drawn_pack: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketsam.training.ranking.collect", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        rank(checkpoint_for("lite0", None), [drawn_pack], tmp_path / "file/ranked.safetensors")


def test_only_the_head_changes(drawn_pack: Path, tmp_path: Path) -> None:
    weights = checkpoint_for("lite0", None)
    rank(weights, [drawn_pack], tmp_path / "ranked.safetensors", workers=1)
    before, after = load_file(weights), load_file(tmp_path / "ranked.safetensors")
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.startswith(HEAD)}
