"""Shared fixtures: a toy model that exports in seconds, and the deterministic MobileSAM checkpoint."""

from __future__ import annotations

import dataclasses
import fcntl
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "reference"))

from goldens import FILES, Golden, image, weights

TOY = "toy_sam"
# Minutes each.
LONGEST = ("test_matrix-lite0", "test_matrix-sam_vit_b", "test_everything", "test_matrix-mobile_sam", "test_export")


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def group(nodeid: str) -> str:
    """What must run in one process: the tests of a file, in the matrix those of a model, because fixtures are dear."""
    path, _, name = nodeid.partition("::")
    stem = Path(path).stem
    # The ids of the matrix begin with the model's name.
    return f"{stem}-{name.partition('[')[2].partition('-')[0]}" if stem == "test_matrix" else stem


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest groups first, so that no process works on alone at the end."""
    items.sort(key=lambda item: LONGEST.index(g) if (g := group(item.nodeid)) in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand whole groups to the processes of ``pytest -n``."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return ByGroup(config, log)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A temporary folder that the processes of one run have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """Name and maker of a file or folder -> its path; made by the first process that asks, awaited by the others."""
    def make(name: str, write: Callable[[Path], object]) -> Path:
        path = shared / "made" / name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                write(path)
        return path

    return make


@pytest.fixture(scope="session")
def groups(shared: Path) -> Callable[[str], None]:
    """Check that no group is spread over processes, which would build its fixtures twice and lets tests collide."""
    @cache
    def claim(name: str) -> None:
        (shared / f"group-{name}").open("x").close()

    return claim


@pytest.fixture(autouse=True)
def one_process_per_group(request: pytest.FixtureRequest, groups: Callable[[str], None]) -> None:
    groups(group(request.node.nodeid))


@pytest.fixture(scope="session")
def toy_registered() -> Iterator[None]:
    """Register small models of each family, ``toy_sam`` a plain ViT, for the whole run."""
    from pocketsam import registry
    from pocketsam.models import catalog
    from pocketsam.specs import ModelSpec

    small: dict[str, Any] = {"image_size": 128, "embed_dim": 32, "embed_size": 8}
    specs = {
        "build": ModelSpec(name=TOY, family="sam", **small),
        "edge": ModelSpec(name="toy_edge", family="sam", **small),
        "hq": ModelSpec(name="toy_hq", family="sam", **small, hq_channels=4, best_only=True),
        "sam2": dataclasses.replace(catalog.SPECS["sam2.1_tiny"], name="toy_sam2", family="sam",
                                    high_res_channels=(4, 8), **small),
        "efficient_sam": dataclasses.replace(catalog.SPECS["efficient_sam_ti"], name="toy_efficient_sam", family="sam",
                                             **small),
    }
    for builder, spec in specs.items():
        catalog.SPECS[spec.name] = spec
        registry.MODELS[spec.name] = f"toy_model:{builder}"
    yield
    for spec in specs.values():
        del catalog.SPECS[spec.name], registry.MODELS[spec.name]


@pytest.fixture(scope="session")
def toy_checkpoint(toy_registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the toy model with seeded weights."""
    import torch
    from toy_model import build

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("toy") / "toy.pt"
    torch.save(build().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def family_checkpoint(toy_registered: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a small model -> a checkpoint with seeded weights, made once."""
    import torch

    from pocketsam import registry

    folder = tmp_path_factory.mktemp("family")

    def make(model: str) -> Path:
        path = folder / f"{model}.pt"
        if not path.exists():
            torch.manual_seed(0)
            built = registry.load("model", model)()
            for p in built.parameters():
                # Tables start at zero, where errors cannot show.
                if not p.any():
                    torch.nn.init.normal_(p, std=0.2)
            torch.save(built.state_dict(), path)
        return path

    return make


@pytest.fixture(scope="session")
def toy_bundle(toy_checkpoint: Path, once: Callable[..., Path]) -> Path:
    """An exported ONNX bundle of the toy model; tests that damage it must copy it first."""
    import pocketsam

    return once("toy.bundle", lambda out: pocketsam.export(TOY, checkpoint=toy_checkpoint, out=out))


@pytest.fixture(scope="session")
def toy_everywhere(toy_checkpoint: Path, once: Callable[..., Path]) -> Path:
    """The toy model in every format and precision; made once, because converters are slow to start."""
    import pocketsam
    from pocketsam import registry
    from pocketsam.images import load_rgb
    from pocketsam.photos import photo_paths

    return once("everywhere.bundle", lambda out: pocketsam.export(
        TOY, checkpoint=toy_checkpoint, formats=list(registry.FORMATS), precisions=["fp32", "fp16"], out=out,
        images=[load_rgb(photo_paths()[1])]))


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model name -> checkpoint file with the deterministic weights, made once."""
    import torch

    folder = tmp_path_factory.mktemp("goldens")

    def make(model: str) -> Path:
        path = folder / f"{FILES[model]}.pt"
        if not path.exists():
            torch.save({k: torch.from_numpy(v) for k, v in weights(Golden.of(model).manifest).items()}, path)
        return path

    return make


@pytest.fixture(scope="session")
def golden_image() -> np.ndarray[Any, Any]:
    """The 480 x 720 test image of the goldens."""
    return image()


@pytest.fixture(scope="session")
def drawn_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled pack of six drawn images."""
    from drawn import write_pack

    return write_pack(tmp_path_factory.mktemp("drawn") / "pack.tar")


@pytest.fixture(scope="session")
def drawn_cache(drawn_pack: Path) -> Any:
    """The same, decoded for training."""
    from drawn import SIZE

    from pocketsam.training.packs import build_cache

    return build_cache([drawn_pack], SIZE, workers=1)


@pytest.fixture
def gradients() -> Iterator[None]:
    """Other modules of tests may have switched them off."""
    import torch

    with torch.enable_grad():
        yield


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``pocketsam ARGS`` in this process through its real entry point."""
    from pocketsam.cli import main

    def run(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pocketsam", *map(str, args)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four small photos of noise."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        rgb = np.random.default_rng(i).integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(folder / f"p{i}.png")
    return folder
