"""What is declared is what is on disk, and the wheel works where the repository is not."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("models", "export", "runtimes", "quantize", "benchmarks", "training")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_declared_packages_equal_the_disk() -> None:
    on_disk = {"pocketsam"}
    for init in (ROOT / "src/pocketsam").rglob("__init__.py"):
        on_disk.add(".".join(init.parent.relative_to(ROOT / "src").parts))
    for folder in MAPPED:
        for init in (ROOT / folder).rglob("__init__.py"):
            on_disk.add(".".join(("pocketsam", *init.parent.relative_to(ROOT).parts)))
    declared = project()["tool"]["setuptools"]
    assert set(declared["packages"]) == on_disk
    for package, folder in declared["package-dir"].items():
        assert (ROOT / folder / "__init__.py").is_file(), package


def test_version_is_the_same_everywhere() -> None:
    import pocketsam

    version = project()["project"]["version"]
    assert pocketsam.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_what_the_project_requires() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower().replace("_", "-")] = version
    data = project()["project"]
    wanted = [*data["dependencies"], *(d for group in data["optional-dependencies"].values() for d in group)]
    wanted = [w for w in wanted if not w.startswith("pocketsam[")]
    for requirement in wanted:
        name = requirement.split(">=")[0].split("[")[0].lower()
        assert name in pins, f"{name} is not pinned in constraints.txt"
    assert pins["torch"] == "2.13.0"
    assert not {"torchvision", "timm"} & set(pins)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)], check=True)
    return next(folder.glob("*.whl"))


def environment(folder: Path, wanted: str) -> Path:
    """The interpreter of a new virtual environment with the pinned versions of what is wanted."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), wanted], check=True)
    return python


@pytest.mark.slow
def test_wheel_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """Install the wheel in a new environment, run it from another folder; torch is never there."""
    names = zipfile.ZipFile(wheel).namelist()
    for package in project()["tool"]["setuptools"]["packages"]:
        assert f"{package.replace('.', '/')}/__init__.py" in names
    # What `bench kit` copies.
    assert "pocketsam/benchmarks/device/bench_device.py" in names
    assert "pocketsam/benchmarks/device/engines/litert.py" in names
    assert "pocketsam/assets/photos/cat.jpg" in names
    assert "pocketsam/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "export/", "models/"))]
    python = environment(tmp_path / "env", str(wheel))
    command = tmp_path / "env" / "bin" / "pocketsam"
    for arguments in (["--help"], ["--version"], ["models"], ["doctor"], ["segment", "--help"]):
        done = subprocess.run([command, *arguments], cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, encoding="utf-8", check=True).stdout
    assert "torch" not in listed
    export = [command, "export", "mobile_sam", "--checkpoint", "x.pt"]
    done = subprocess.run(export, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2
    assert "pip install 'pocketsam[export]'" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_everything_runs_without_torch(wheel: Path, tmp_path: Path, toy_everywhere: Path) -> None:
    """All masks of a photo on every engine, where torch is not installed."""
    python = environment(tmp_path / "env", f"{wheel}[onnx,openvino,litert]")
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, encoding="utf-8", check=True).stdout
    assert "torch" not in listed
    photo = ROOT / "src/pocketsam/assets/photos/cat.jpg"
    found = {}
    for runtime in ("onnxruntime", "openvino", "litert"):
        out = tmp_path / runtime
        command = [python.with_name("pocketsam"), "everything", photo, "-o", out, "--bundle", toy_everywhere,
                   "--runtime", runtime, "--grid", "4", "--pred-iou", "0", "--stability", "0", "--threads", "1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
        assert (out / "overlays" / "cat.jpg.png").stat().st_size > 0
        found[runtime] = len(json.loads((out / "labels" / "cat.jpg.json").read_text(encoding="utf-8"))["annotations"])
    assert min(found.values()) > 0
    assert len(set(found.values())) == 1, found
