"""ONNX files through torch's dynamo exporter, cleaned and checked."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxscript
import torch

from pocketsam.bundle import onnx_file
from pocketsam.export.graphs import Graph, bytes_of, example_inputs
from pocketsam.quiet import quiet
from pocketsam.specs import GraphSpec

OPSET = 20
# Protobuf refuses messages of 2 GiB: such weights lie beside the file, in a folder.
LARGEST = 2 ** 31 - 2 ** 24


class OnnxExporter:
    """Writes ``onnx/<graph>.<precision>.onnx``: opset 20, weights inside, symbolic prompt batch where there is one.

    Where weights would make the file larger than protobuf allows, the artifact is a folder with ``model.onnx`` and
    ``model.onnx.data``.
    """

    name = "onnx"
    runtime = "onnxruntime"
    extension = "onnx"
    precisions = ("fp32",)
    absorb = True

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        return {"torch": torch.__version__, "onnx": onnx.__version__, "onnxscript": onnxscript.__version__}

    @staticmethod
    def export(graph: Graph, spec: GraphSpec, precision: str, path: Path) -> None:
        """Convert one graph and write it."""
        # Two prompts in the example, because a batch of one would be frozen as a constant.
        inputs = example_inputs(spec, batch=2)
        batch = torch.export.Dim("batch", min=1, max=4096)
        shapes = tuple({0: batch} if isinstance(t.shape[0], str) else None for t in spec.inputs)
        # Graphs with a batch take *inputs, which torch.export sees as one tuple.
        dynamic = (shapes,) if spec.batched else None
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph, inputs, dynamo=True, opset_version=OPSET, input_names=spec.input_names,
                output_names=spec.output_names, dynamic_shapes=dynamic, verbose=False, optimize=True)
            assert program is not None
            large = bytes_of(graph) > LARGEST
            if large:
                path.mkdir()
            program.save(str(onnx_file(path)), external_data=large)
        _finish(onnx_file(path), spec)


def _finish(path: Path, spec: GraphSpec) -> None:
    """Name the symbolic sizes as the contract does, drop exporter notes, and check the file."""
    model = onnx.load(str(path), load_external_data=False)
    for info, tensor in zip([*model.graph.input, *model.graph.output], [*spec.inputs, *spec.outputs], strict=True):
        for dim, size in zip(info.type.tensor_type.shape.dim, tensor.shape, strict=True):
            if isinstance(size, str):
                dim.dim_param = size
    for node in model.graph.node:
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    onnx.save(model, str(path))
    # By its path, because weights may lie beside it.
    onnx.checker.check_model(str(path), full_check=False)
