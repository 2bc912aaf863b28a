"""A teacher's embeddings made beforehand, and its prompt decoder grafted onto lite0."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import PLAIN, SIZE, generator, toy
from tars import read_tar, write_tar

import pocketsam
from pocketsam.errors import EmbeddingError, LabelError, UsageError
from pocketsam.labelled import read_pack
from pocketsam.models.builders import mobile_sam
from pocketsam.models.lite0 import lite0
from pocketsam.predictor import Predictor
from pocketsam.training.__main__ import main
from pocketsam.training.augment import Augment
from pocketsam.training.batches import image_weights, make_batch
from pocketsam.training.distill import StoredTeacher
from pocketsam.training.graft import graft
from pocketsam.training.packs import Cache
from pocketsam.training.rounds import encode, episode
from pocketsam.training.ship import load_weights
from pocketsam.training.teach import open_taught, read_taught, teach

pytestmark = pytest.mark.usefixtures("gradients")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher() -> Predictor:
    return pocketsam.load("lite0", runtime="pytorch")


def test_embeddings_are_the_teachers_averaged(teacher: Predictor, drawn_pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "taught.npy"
    taught = teach(teacher, [drawn_pack], out, 16)
    assert taught.done == taught.photos == 6
    for row, sample in zip(open_taught(out, [drawn_pack]), read_pack(drawn_pack), strict=True):
        features = torch.from_numpy(teacher.embed(sample.image).features["image_embeddings"])
        torch.testing.assert_close(row.float(), F.avg_pool2d(features, 2)[0], atol=2e-3, rtol=2e-3)


def test_an_interrupted_teacher_continues(teacher: Predictor, drawn_pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "taught.npy"
    teach(teacher, [drawn_pack], out, 16)
    whole = np.load(out)
    rows = np.load(out, mmap_mode="r+")
    rows[:2], rows[4:] = 7, 0
    rows.flush()
    beside = out.with_suffix(".json")
    beside.write_text(json.dumps({**json.loads(beside.read_text()), "done": 4}))
    with pytest.raises(EmbeddingError, match="4 of 6 photos"):
        open_taught(out, [drawn_pack])
    teach(teacher, [drawn_pack], out, 16)
    again = np.load(out)
    assert read_taught(out).done == 6
    assert (again[:2] == 7).all()
    np.testing.assert_array_equal(again[2:], whole[2:])


def test_a_description_without_its_file_counts_nothing_as_done(teacher: Predictor, drawn_pack: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "taught.npy"
    teach(teacher, [drawn_pack], out, 16)
    out.unlink()

    def stop(image: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher, "embed", stop)
    with pytest.raises(KeyboardInterrupt):
        teach(teacher, [drawn_pack], out, 16)
    with pytest.raises(EmbeddingError, match="0 of 6 photos"):
        open_taught(out, [drawn_pack])


def test_other_packs_sides_and_frames_are_refused(teacher: Predictor, drawn_pack: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "taught.npy"
    with pytest.raises(UsageError, match="side 32, which 24"):
        teach(teacher, [drawn_pack], out, 24)
    whole = teacher.runtime.spec
    monkeypatch.setattr(teacher.runtime, "spec", replace(whole, resize="squash"))
    with pytest.raises(UsageError, match="squashes photos to a square and the student pads them"):
        teach(teacher, [drawn_pack], out, 16)
    monkeypatch.setattr(teacher.runtime, "spec", whole)
    teach(teacher, [drawn_pack], out, 16)
    with pytest.raises(EmbeddingError, match="choose another file"):
        teach(teacher, [drawn_pack, drawn_pack], out, 16)
    with pytest.raises(EmbeddingError, match=r"not of pack\.tar, pack\.tar"):
        open_taught(out, [drawn_pack, drawn_pack])
    with pytest.raises(LabelError, match="as a pack"):
        open_taught(out, [Path("other.tar")])


def test_embeddings_belong_to_the_bytes_of_a_pack(teacher: Predictor, drawn_pack: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """A pack may be moved and renamed; the same name and number of photos with another picture is another pack."""
    out, moved = tmp_path / "taught.npy", tmp_path / "moved.tar"
    shutil.copy(drawn_pack, moved)
    teach(teacher, [drawn_pack], out, 16)
    assert len(open_taught(out, [moved])) == 6
    members = read_tar(drawn_pack)
    changed = write_tar(tmp_path / drawn_pack.name, {**members, "im3.jpg": members["im5.jpg"]})
    with pytest.raises(EmbeddingError, match="as it was then"):
        open_taught(out, [changed])
    with pytest.raises(EmbeddingError, match="choose another file"):
        teach(teacher, [changed], out, 16)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--data", str(changed), "--taught", str(out), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "as it was then" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_embeddings_of_unknown_packs_are_refused(teacher: Predictor, drawn_pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "taught.npy"
    teach(teacher, [drawn_pack], out, 16)
    beside = out.with_suffix(".json")
    values = json.loads(beside.read_text())
    del values["packs_sha256"]
    beside.write_text(json.dumps(values))
    for use in (lambda: open_taught(out, [drawn_pack]), lambda: teach(teacher, [drawn_pack], out, 16)):
        with pytest.raises(EmbeddingError, match="does not say which packs"):
            use()


def test_only_images_shown_whole_learn_stored_embeddings(drawn_cache: Cache) -> None:
    weights = image_weights(drawn_cache)
    cut = make_batch(drawn_cache, weights, 4, 2, SIZE, Augment(whole=0.5, flip=0, colour=0, grey=0), generator(3))
    batch = cut.batch(CPU)
    whole = batch.shown >= 0
    assert whole.any()
    assert not whole.all()
    for image, index in zip(batch.images[whole], batch.shown[whole], strict=True):
        torch.testing.assert_close(image, drawn_cache.images[index].permute(2, 0, 1).float())
    model = toy()
    features = encode(model, batch.images, batch.valid)
    taught = torch.zeros(len(drawn_cache.sources), *features["image_embeddings"].shape[1:])
    taught[batch.shown[whole]] = features["image_embeddings"][whole].detach()
    stored = StoredTeacher(taught, 1.0)
    stored.observe(batch)
    assert stored.embedding_loss(features).item() < 1e-9
    stored.taught = taught + 1
    features["image_embeddings"].retain_grad()
    stored.embedding_loss(features).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    gradient = features["image_embeddings"].grad
    assert gradient is not None
    assert gradient.flatten(1).abs().amax(1).gt(0).tolist() == whole.tolist()


def test_an_episode_without_rounds_learns_embeddings_alone(drawn_cache: Cache) -> None:
    batch = make_batch(drawn_cache, image_weights(drawn_cache), 2, 1, SIZE, PLAIN, generator()).batch(CPU)
    model = toy()
    side = encode(model, batch.images, batch.valid)["image_embeddings"].shape[-1]
    taught = torch.randn(len(drawn_cache.sources), model.spec.embed_dim, side, side, generator=generator())
    parts = episode(model, batch, 0, generator(), StoredTeacher(taught, 1.0))
    assert set(parts) == {"loss", "distill"}
    parts["loss"].backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    assert all(p.grad is None for p in model.mask_decoder.parameters())
    assert any(p.grad is not None for p in model.image_encoder.parameters())


def test_a_graft_keeps_the_decoder(drawn_cache: Cache, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = mobile_sam().eval()
    taught = torch.randn(len(drawn_cache.sources), 256, SIZE // 16, SIZE // 16, generator=generator()) * 0.1 + 0.5
    lost = graft(lite0(), theirs, taught, drawn_cache, tmp_path / "lite0.safetensors", batches=2)
    assert 0 < lost < 0.2
    mine = load_weights(tmp_path / "lite0.safetensors")
    assert torch.equal(mine.mask_decoder.mask_tokens.weight, theirs.mask_decoder.mask_tokens.weight)
    assert torch.equal(mine.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix,
                       theirs.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix)
    kept = mine.mask_decoder.transformer.layers[0].mlp.lin1.weight
    known = theirs.mask_decoder.transformer.layers[0].mlp.lin1.weight
    assert all((known == row).all(1).any() for row in kept[:20])
    features = mine.encode(torch.randn(1, 3, SIZE, SIZE, generator=generator()))
    assert not features["high_res_features_0"].any()
    assert not features["high_res_features_1"].any()
    begun = mine.image_encoder.pyramid.lateral16.bn.bias.mean() * 2
    torch.testing.assert_close(begun, taught.mean(), atol=0.05, rtol=0)
