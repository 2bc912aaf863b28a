"""Bundles: a folder with ``bundle.json`` and artifacts ``<format>/<graph>.<precision>.<ext>``, verified on loading.

A bundle is untrusted input: every path must stay inside the folder and every file must match its sha256.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from pocketsam.errors import BundleError, CheckpointError, UnknownName
from pocketsam.files import sha256_path, size_of
from pocketsam.specs import CLICK_GRAPHS, ModelSpec

MANIFEST = "bundle.json"
SCHEMA = 1
MAX_MANIFEST_BYTES = 16 * 2**20
ONNX_FILE = "model.onnx"
IR_FILE = "model.xml"


@dataclass(frozen=True)
class Artifact:
    """One exported graph.

    Attributes:
        path: POSIX path relative to the bundle: a file, or a folder for formats of several files.
        graph: ``encoder``, ``decoder`` or one of the click graphs.
        format, precision: e.g. ``onnx`` and ``fp32``.
        sha256, bytes: of the file, or of all files of the folder (``pocketsam.files.sha256_path``).
        inputs, outputs: [{name, dtype, shape}] as exported.
        key: sha256 of everything the artifact depends on; export rebuilds it only when this changes.
        measured: numbers taken when it was made (tensor error, mask agreement, seconds).
        quantization: of int8 artifacts: recipe, calibration, layers in float and why, size and time against fp32.
    """

    path: str
    graph: str
    format: str
    precision: str
    sha256: str
    bytes: int
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    key: str
    measured: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)

    @property
    def agreement(self) -> float:
        """Mean mask IoU with PyTorch as measured; 0 where the bundle does not say."""
        mean: float = self.measured.get("all", {}).get("mean", 0.0)
        return mean


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: its folder, its model and its artifacts."""

    root: Path
    spec: ModelSpec
    slots: int
    weights: dict[str, Any]
    tools: dict[str, str]
    artifacts: tuple[Artifact, ...]

    @property
    def weights_sha256(self) -> str:
        return str(self.weights.get("sha256", ""))

    def formats(self) -> list[str]:
        return sorted({a.format for a in self.artifacts})

    def find(self, format: str, precision: str, graph: str) -> Artifact:
        """The artifact of one graph.

        Raises:
            BundleError: the bundle has no such format or precision.
        """
        rows = [a for a in self.artifacts if a.format == format and a.graph == graph]
        if not rows:
            have = ", ".join(self.formats()) or "nothing"
            raise BundleError(f"{self.root} holds {have}, not {format}; export it with --to {format}.")
        for row in rows:
            if row.precision == precision:
                return row
        raise UnknownName("precision", precision, [a.precision for a in rows])

    def identity(self, format: str, precision: str) -> str:
        """sha256 over the artifacts of one format and precision: weights stay the same when int8 is made anew."""
        rows = sorted((a.graph, a.sha256) for a in self.artifacts if (a.format, a.precision) == (format, precision))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def check_weights(self, sha256: str) -> None:
        """That a reference has the weights that this was exported from.

        Raises:
            CheckpointError: it has others.
        """
        if sha256 != self.weights_sha256:
            raise CheckpointError(f"{self.root} was exported from other weights than the checkpoint given; "
                                  "pass the checkpoint that it was made from.")

    def has_clicks(self, format: str, precision: str) -> bool:
        """Whether it holds the graphs for many clicks, in the form of this version; not every bundle does."""
        graphs = self.spec.graphs()
        held = {a.graph for a in self.artifacts if (a.format, a.precision) == (format, precision)
                and a.graph in graphs and [tuple(t["shape"]) for t in a.inputs] == [
                    t.shape for t in graphs[a.graph].inputs]}
        return held.issuperset(CLICK_GRAPHS)

    def file(self, artifact: Artifact) -> Path:
        """The artifact's file or folder after checking that it stays in the bundle and matches its hash.

        Raises:
            BundleError: the path leaves the folder, the file is missing, or its bytes changed.
        """
        path = safe_path(self.root, artifact.path)
        try:
            if not (path.is_file() or path.is_dir()) and path.exists():
                raise BundleError(f"{path} is neither a file nor a folder; do not use this bundle.")
            intact = size_of(path) == artifact.bytes and sha256_path(path) == artifact.sha256
        except FileNotFoundError as e:
            raise BundleError(f"{self.root} lacks {artifact.path}; the bundle is incomplete: export it again.") from e
        except (OSError, ValueError):
            intact = False
        if not intact:
            raise BundleError(f"{path} does not match its recorded sha256; the file was changed or damaged: "
                              "export the bundle again.")
        return path


def onnx_file(path: Path) -> Path:
    """The ONNX file of an artifact, which is a folder where the weights are too large to be inside the file."""
    return path / ONNX_FILE if path.is_dir() else path


def safe_path(root: Path, relative: str) -> Path:
    """``root / relative`` if it stays inside ``root``, symbolic links included.

    Raises:
        BundleError: the path is absolute, climbs out, is a link that does, or is no path at all.
    """
    pure = PurePosixPath(relative)
    inside = not pure.is_absolute() and ".." not in pure.parts and "\\" not in relative and ":" not in relative
    path = root / pure
    try:
        inside = inside and path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as e:
        raise BundleError(f"the bundle names the file {relative!r}, which is no usable path ({e}); do not use this "
                          "bundle.") from e
    if not inside:
        raise BundleError(f"the bundle names the file {relative!r}, which is outside its folder; do not use this "
                          "bundle.")
    return path


def read_bundle(root: str | Path) -> Bundle:
    """Read and check ``bundle.json``; files are verified when they are opened (:meth:`Bundle.file`).

    Raises:
        BundleError: no bundle, damaged JSON, a newer schema, or unsafe contents.
    """
    root = Path(root)
    manifest = root / MANIFEST
    try:
        if not root.exists():
            raise BundleError(f"{root} does not exist; export one with `pocketsam export MODEL --to onnx -o {root}`.")
        if not manifest.is_file():
            raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}.")
        if manifest.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{manifest} is larger than {MAX_MANIFEST_BYTES // 2**20} MB and was not read.")
    except OSError as e:
        raise BundleError(f"{root} cannot be opened ({e.strerror}); check the path.") from e
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BundleError(f"{manifest} cannot be read ({e}); export the bundle again.") from e
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, int):
        raise BundleError(f"{manifest} has no schema number; it is not a PocketSAM bundle.")
    if schema > SCHEMA:
        raise BundleError(f"{root} uses bundle schema {schema} and this version reads up to {SCHEMA}; "
                          "upgrade pocketsam.")
    return _parse(root, data)


def to_json(bundle: Bundle) -> str:
    """The text of ``bundle.json``."""
    data = {
        "schema": SCHEMA,
        "model": bundle.spec.to_json(),
        "slots": bundle.slots,
        "weights": bundle.weights,
        "tools": bundle.tools,
        "artifacts": [asdict(a) for a in bundle.artifacts],
    }
    return json.dumps(data, indent=2) + "\n"


def _check(row: Artifact) -> None:
    """Raise ValueError, TypeError or KeyError unless every value of an untrusted row has its type."""
    texts = row.path, row.graph, row.format, row.precision, row.sha256, row.key
    if not all(isinstance(v, str) for v in texts) or not isinstance(row.bytes, int):
        raise ValueError("an artifact row has values of the wrong type")
    if any(not isinstance(t["shape"], list) for t in (*row.inputs, *row.outputs)):
        raise ValueError("a tensor's shape is no list")
    if not isinstance(row.measured, dict) or not isinstance(row.quantization, dict):
        raise ValueError("the measurements of an artifact are no table")
    for name, value, most in (("a mask agreement", row.agreement, 1), ("a gate", row.measured.get("gate", 0), 2)):
        if not isinstance(value, (int, float)) or not 0 <= value <= most:
            raise ValueError(f"{name} is no number from 0 to {most}")


def _parse(root: Path, data: dict[str, Any]) -> Bundle:
    try:
        names = {f.name for f in fields(Artifact)}
        artifacts = tuple(Artifact(**{k: v for k, v in row.items() if k in names}) for row in data["artifacts"])
        slots, weights, tools = data["slots"], dict(data["weights"]), dict(data["tools"])
        if not isinstance(slots, int) or not 2 <= slots <= 4096:
            raise ValueError(f"slots is {slots!r}")
        for artifact in artifacts:
            _check(artifact)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BundleError(f"{root / MANIFEST} is damaged ({e}); export the bundle again.") from e
    for artifact in artifacts:
        safe_path(root, artifact.path)
    return Bundle(root, ModelSpec.from_json(data.get("model")), slots, weights, tools, artifacts)
