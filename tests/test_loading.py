"""Checkpoints: wrappers, prefixes, recognition."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import FILES, MANIFESTS, Golden, read_manifest

from pocketsam import registry
from pocketsam.errors import CheckpointError
from pocketsam.models.catalog import SPECS
from pocketsam.models.checkpoints import CHECKPOINTS, FINGERPRINTS, HQ_KEY
from pocketsam.models.keys import RENAMES
from pocketsam.models.loading import identify, load_model, recognise, weights_sha256


@pytest.mark.parametrize("wrap", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_checkpoints(toy_checkpoint: Path, tmp_path: Path, wrap: str, prefix: str) -> None:
    state = torch.load(toy_checkpoint, weights_only=True)
    torch.save({wrap: {prefix + k: v for k, v in state.items()}, "epoch": 3}, tmp_path / "wrapped.pt")
    plain, wrapped = load_model("toy_sam", toy_checkpoint), load_model("toy_sam", tmp_path / "wrapped.pt")
    assert weights_sha256(plain) == weights_sha256(wrapped)
    assert not plain.training


def test_numbers_of_a_training_run_beside_the_weights(toy_checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(toy_checkpoint, weights_only=True)
    plain = weights_sha256(load_model("toy_sam", toy_checkpoint))
    for i, content in enumerate(({"model": state, "best": torch.tensor(0.3)},
                                 {"n_averaged": torch.tensor(5), **{f"module.{k}": v for k, v in state.items()}},
                                 {"model": {f"_orig_mod.{k}": v for k, v in state.items()}})):
        torch.save(content, tmp_path / f"{i}.pt")
        assert weights_sha256(load_model("toy_sam", tmp_path / f"{i}.pt")) == plain


def test_files_of_another_kind_are_named(toy_checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(toy_checkpoint, weights_only=True)
    torch.save({f"vision_encoder.{k}": v for k, v in state.items()}, tmp_path / "converted.pt")
    for call in (lambda path: load_model("toy_sam", path), recognise):
        with pytest.raises(CheckpointError, match="a conversion for the transformers library"):
            call(tmp_path / "converted.pt")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(CheckpointError, match="a TorchScript program; expected the official weights"):
        load_model("toy_sam", tmp_path / "program.pt")
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(CheckpointError, match="1 unexpected keys"):
        load_model("toy_sam", tmp_path / "more.pt")


def test_safetensors(toy_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = torch.load(toy_checkpoint, weights_only=True)
    save_file(state, tmp_path / "toy.safetensors")
    assert weights_sha256(load_model("toy_sam", tmp_path / "toy.safetensors")) == weights_sha256(
        load_model("toy_sam", toy_checkpoint))
    shutil.copy(tmp_path / "toy.safetensors", tmp_path / "toy.pth")
    assert weights_sha256(load_model("toy_sam", tmp_path / "toy.pth")) == weights_sha256(
        load_model("toy_sam", toy_checkpoint))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "toy.safetensors").read_bytes()[:200])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_model("toy_sam", tmp_path / "cut.safetensors")


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda v: v.to(torch.complex64), "expected the plain torch.float32 weights"),
    (lambda v: v.to(torch.int8), "expected the plain torch.float32 weights"),
    (lambda v: v.to_sparse(), "expected the plain torch.float32 weights"),
    (lambda v: v.to("meta"), "expected the plain torch.float32 weights"),
])
def test_tensors_of_another_kind_are_no_weights(toy_checkpoint: Path, tmp_path: Path,
                                                spoil: Callable[[torch.Tensor], torch.Tensor], words: str) -> None:
    """Of the right name and shape, and copied without a word they would be wrong weights."""
    state = torch.load(toy_checkpoint, weights_only=True)
    key = "mask_decoder.iou_token.weight"
    torch.save({**state, key: spoil(state[key])}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=f"holds {key} as .*{words}"):
        load_model("toy_sam", tmp_path / "odd.pt")


def test_a_checkpoint_that_holds_itself(tmp_path: Path) -> None:
    data: dict[str, Any] = {}
    data["model"] = data
    torch.save(data, tmp_path / "ring.pt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model("toy_sam", tmp_path / "ring.pt")


def test_a_packed_checkpoint_is_not_unfolded(toy_checkpoint: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(toy_checkpoint) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name in plain.namelist():
            out.writestr(name, plain.read(name))
    with pytest.raises(CheckpointError, match="is a compressed archive"):
        load_model("toy_sam", packed)


def test_an_hq_model_of_another_size_is_not_taken_for_plain_sam() -> None:
    shapes = {"image_encoder.pos_embed": (1, 64, 64, 1024)}
    assert identify(shapes) == "sam_vit_l"
    assert identify({**shapes, HQ_KEY: (1024, 256, 2, 2)}) is None


def test_identity_follows_the_weights(toy_checkpoint: Path) -> None:
    model = load_model("toy_sam", toy_checkpoint)
    before = weights_sha256(model)
    model.mask_decoder.iou_token.weight.data[0, 0] += 1e-3
    assert weights_sha256(model) != before


@pytest.mark.parametrize("name", sorted(FILES))
def test_wrong_model_is_named(name: str, tmp_path: Path) -> None:
    """A file of one official architecture, given for another, is recognised from its keys and shapes."""
    keys = Golden.of(name).manifest["keys"]
    shapes = {k: tuple(shape) for k, (shape, _) in keys.items()}
    assert identify(shapes) == name
    other = "sam_vit_l"
    # One number, expanded: the file stays small.
    state = {k: torch.zeros(()).expand(s) for k, s in shapes.items() if "transformer.layers.1" not in k}
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"is not {other}: .*looks like {name}"):
        load_model(other, tmp_path / "file.pth")


def test_every_architecture_is_recognised() -> None:
    manifests = {**FILES, **MANIFESTS}
    for name in (n for n in registry.MODELS if not n.startswith("toy")):
        if name in manifests:
            shapes = {k: tuple(s) for k, (s, _) in read_manifest(manifests[name])["keys"].items()}
        else:
            assert SPECS[name].family not in RENAMES, "our names are the official ones"
            with torch.device("meta"):
                shapes = {k: tuple(v.shape) for k, v in registry.load("model", name)().state_dict().items()}
        assert identify(shapes) == name
    assert identify({"a": (1,)}) is None
    assert set(FINGERPRINTS) >= {c.model for c in CHECKPOINTS}


def test_checkpoint_says_what_it_is(golden_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert recognise(golden_checkpoint("edge_sam")) == "edge_sam"
    torch.save({"some.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no model that PocketSAM knows"):
        recognise(tmp_path / "other.pt")


def test_licences_are_known() -> None:
    assert {c.model for c in CHECKPOINTS} == {n for n in registry.MODELS if not n.startswith("toy")}
    assert all("NON-COMMERCIAL" in c.licence for c in CHECKPOINTS if c.model == "edge_sam")
