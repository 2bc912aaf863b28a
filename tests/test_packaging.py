"""What is declared is what is on disk, and the wheel works where the repository is not."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("models", "export", "runtimes", "quantize", "benchmarks", "training")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


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
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_what_the_project_requires() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
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


@pytest.mark.slow
def test_wheel_in_a_fresh_environment(tmp_path: Path) -> None:
    """Build the wheel, install it in a new environment, run it from another folder; torch is never there."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True,
                   capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    for package in project()["tool"]["setuptools"]["packages"]:
        assert f"{package.replace('.', '/')}/__init__.py" in names
    assert "pocketsam/assets/photos/cat.jpg" in names
    assert "pocketsam/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "export/", "models/"))]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
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
