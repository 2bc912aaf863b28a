"""Imports run one way: core -> nothing; models -> core; export -> core, models; runtimes -> core; only cli sees all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"core": "src/pocketsam", "models": "models", "export": "export", "runtimes": "runtimes",
           "quantize": "quantize", "benchmarks": "benchmarks", "training": "training",
           "commands": "src/pocketsam/commands"}
ALLOWED = {
    "core": {"core"},
    "models": {"core", "models"},
    "export": {"core", "models", "export"},
    "runtimes": {"core", "runtimes"},
    "quantize": {"core", "export", "runtimes", "quantize"},
    "benchmarks": {"core", "runtimes", "benchmarks"},
    "training": {"core", "models", "training"},
    "commands": set(FOLDERS),
}
# The reference runtime executes the torch models themselves; the command line hands out everything.
EXCEPTIONS = {"runtimes/pytorch.py": {"models"}, "src/pocketsam/cli.py": set(FOLDERS)}
HEAVY = {"torch", "onnx", "onnxruntime", "onnxscript", "scipy", "cv2", "safetensors", "ray"}


def files() -> list[tuple[str, Path]]:
    found = [(room, f) for room, folder in FOLDERS.items() for f in sorted((ROOT / folder).rglob("*.py"))]
    return [(room, f) for room, f in found if room == "commands" or ROOT / FOLDERS["commands"] not in f.parents]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


def rooms(names: set[str]) -> set[str]:
    used = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "pocketsam":
            used.add(parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "core")
    return used


@pytest.mark.parametrize(("room", "path"), [pytest.param(r, p, id=str(p.relative_to(ROOT))) for r, p in files()])
def test_imports_run_one_way(room: str, path: Path) -> None:
    names = imports(path)
    if path.name in ("__init__.py", "api.py") and room == "core":
        names.discard("pocketsam.api.export")
    allowed = ALLOWED[room] | EXCEPTIONS.get(str(path.relative_to(ROOT)), set())
    assert rooms(names) <= allowed, f"{path} may import {sorted(allowed)}"
    if room == "core":
        assert not {n.split(".")[0] for n in names} & HEAVY, f"{path}: the core needs numpy and Pillow only"


def test_tables_and_files_agree() -> None:
    from pocketsam import registry

    for table, folder in ((registry.FORMATS, "export"), (registry.RUNTIMES, "runtimes")):
        for name, target in table.items():
            module, attribute = target.split(":")
            path = ROOT / folder / f"{name}.py"
            assert module == f"pocketsam.{folder}.{name}"
            assert path.is_file()
            assert f"class {attribute}" in path.read_text(encoding="utf-8")
    assert set(registry.RUNTIME_PACKAGES) == set(registry.RUNTIMES)
    assert set(registry.FORMAT_PACKAGES) == set(registry.FORMATS)
    assert set(registry.RUNTIME_FORMATS) <= set(registry.RUNTIMES)
    shared = {"__init__", "conversions", "existing", "graphs", "decoder_rewrites", "rewrites", "pipeline", "request"}
    for folder, table in (("export", registry.FORMATS), ("runtimes", registry.RUNTIMES)):
        stray = {p.stem for p in (ROOT / folder).glob("*.py")} - shared - set(table)
        assert not stray, f"{folder}: {stray} is not registered"


def test_every_model_has_a_spec_and_a_checkpoint() -> None:
    from pocketsam import registry
    from pocketsam.models.catalog import SPECS
    from pocketsam.models.checkpoints import CHECKPOINTS

    names = {n for n in registry.MODELS if not n.startswith("toy")}
    assert names == {n for n in SPECS if not n.startswith("toy")}
    assert {c.model for c in CHECKPOINTS} == names


@pytest.mark.parametrize("code", [
    "import pocketsam", "from pocketsam import cli", "import pocketsam.models.catalog, pocketsam.models.checkpoints",
    "import sys; sys.argv = ['pocketsam', '--help']; from pocketsam.cli import app\n"
    "try:\n app()\nexcept SystemExit: pass",
    "import sys; sys.argv = ['pocketsam', 'models', '--json']; from pocketsam.cli import app\n"
    "try:\n app()\nexcept SystemExit: pass",
    "import sys; sys.argv = ['pocketsam', 'doctor', '--json']; from pocketsam.cli import app\n"
    "try:\n app()\nexcept SystemExit: pass",
], ids=["import", "cli", "catalog", "help", "models", "doctor"])
def test_light_imports(code: str) -> None:
    """Importing the package and asking for help loads no engine."""
    check = f"\nimport sys\nassert not [m for m in {sorted(HEAVY)} if m in sys.modules]"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def test_running_a_bundle_needs_no_torch(toy_bundle: Path) -> None:
    code = f"""
import sys
class Ban:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'onnx', 'onnxscript', 'safetensors', 'typer', 'rich', 'scipy'):
            raise ImportError(name + ' is banned here')
sys.meta_path.insert(0, Ban())
import numpy, pocketsam
sam = pocketsam.load({str(toy_bundle)!r})
sam.set_image(numpy.zeros((40, 60, 3), numpy.uint8))
assert sam.predict(points=[(5, 5)]).masks.shape == (3, 40, 60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_runtime_names_the_command(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pocketsam
    from pocketsam.errors import MissingDependency

    monkeypatch.delitem(sys.modules, "pocketsam.runtimes.onnxruntime", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match=r"pip install 'pocketsam\[onnx\]'"):
        pocketsam.load(toy_bundle, runtime="onnxruntime")
