"""OpenVINO IR, converted from the ONNX form of the graph."""

from __future__ import annotations

import tempfile
from pathlib import Path

import openvino as ov

from pocketsam.bundle import IR_FILE, onnx_file
from pocketsam.export.graphs import Graph
from pocketsam.export.onnx import OnnxExporter
from pocketsam.specs import GraphSpec


class OpenVinoExporter:
    """Writes ``openvino/<graph>.<precision>.ir/model.xml`` and ``model.bin``; fp16 stores the weights in half size.

    Conversion goes through ONNX: tracing the torch module directly took 57 s instead of 1.4 s for MobileSAM's encoder
    and left shape arithmetic in the graph, at the same speed of the result.
    """

    name = "openvino"
    runtime = "openvino"
    extension = "ir"
    precisions = ("fp32", "fp16")
    absorb = True

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        return {**OnnxExporter.tools(), "openvino": ov.get_version()}

    @staticmethod
    def export(graph: Graph, spec: GraphSpec, precision: str, path: Path) -> None:
        """Convert one graph and write its folder."""
        with tempfile.TemporaryDirectory() as folder:
            # The same export made the ONNX artifact of this graph a moment ago, where both formats are asked for.
            source = path.parents[1] / "onnx" / f"{spec.name}.fp32.onnx"
            # A path that is no bundle's has strangers beside it.
            if path.parent.name != OpenVinoExporter.name or not source.exists():
                source = Path(folder) / "graph.onnx"
                OnnxExporter.export(graph, spec, "fp32", source)
            model = ov.convert_model(onnx_file(source))
            save(model, path, compress=precision == "fp16")


def save(model: ov.Model, path: Path, compress: bool = False) -> None:
    """Write an IR folder; its XML without indentation, which was a sixth of it.

    Args:
        compress: weights to fp16.
    """
    path.mkdir(exist_ok=True)
    file = path / IR_FILE
    ov.save_model(model, file, compress_to_fp16=compress)
    plain = file.with_suffix(".tmp")
    with file.open(encoding="utf-8") as lines, plain.open("w", encoding="utf-8") as out:
        out.writelines(line.strip() for line in lines)
    plain.replace(file)
