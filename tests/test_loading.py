"""Checkpoints: wrappers, prefixes, recognition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from goldens import FILES, Golden

from pocketsam import registry
from pocketsam.errors import CheckpointError
from pocketsam.models.checkpoints import CHECKPOINTS, FINGERPRINTS
from pocketsam.models.loading import identify, load_model, weights_sha256


@pytest.mark.parametrize("wrap", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_checkpoints(toy_checkpoint: Path, tmp_path: Path, wrap: str, prefix: str) -> None:
    state = torch.load(toy_checkpoint, weights_only=True)
    torch.save({wrap: {prefix + k: v for k, v in state.items()}, "epoch": 3}, tmp_path / "wrapped.pt")
    plain, wrapped = load_model("toy_sam", toy_checkpoint), load_model("toy_sam", tmp_path / "wrapped.pt")
    assert weights_sha256(plain) == weights_sha256(wrapped)
    assert not plain.training


def test_safetensors(toy_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = torch.load(toy_checkpoint, weights_only=True)
    save_file(state, tmp_path / "toy.safetensors")
    assert weights_sha256(load_model("toy_sam", tmp_path / "toy.safetensors")) == weights_sha256(
        load_model("toy_sam", toy_checkpoint))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "toy.safetensors").read_bytes()[:200])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_model("toy_sam", tmp_path / "cut.safetensors")


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
    state = {k: torch.zeros(s) for k, s in shapes.items() if "encoder.blocks.1" not in k}
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"is not {other}: .*looks like {name}"):
        load_model(other, tmp_path / "file.pth")


def test_every_architecture_is_recognised() -> None:
    for name in set(registry.MODELS) - {"toy_sam"}:
        with torch.device("meta"):
            shapes = {k: tuple(v.shape) for k, v in registry.load("model", name)().state_dict().items()}
        assert identify(shapes) == name
    assert identify({"a": (1,)}) is None
    assert set(FINGERPRINTS) >= {c.model for c in CHECKPOINTS}
