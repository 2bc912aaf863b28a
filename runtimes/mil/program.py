"""A saved ``.mlpackage`` as plain data: functions, operations and decoded constant values."""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pocketsam.errors import BundleError
from pocketsam.runtimes.mil.blobs import Blobs, decode_bytes, from_numbers


class Text(list[str]):
    """A constant string; a class of its own, because a plain ``str`` among inputs is a variable name."""


Value = Tensor | list[str]


@dataclass(frozen=True)
class Named:
    """A variable of the program: its name, MIL dtype (``fp16``, ``int32`` ...) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One operator: inputs are variable names or constant values.

    ``attributes`` hold the value of a ``const`` and the parameters of iOS 16 ``constexpr`` operators.
    """

    type: str
    inputs: dict[str, tuple[str | Value, ...]]
    outputs: tuple[Named, ...]
    attributes: dict[str, Value]


@dataclass(frozen=True)
class Function:
    """Operations in execution order."""

    name: str
    inputs: tuple[Named, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Package:
    """Functions by name, which of them is the default, the Core ML description, and the specification version."""

    functions: dict[str, Function]
    default: str
    version: int
    image_inputs: dict[str, str]


def load_package(path: Path) -> Package:
    """Parse a saved ``.mlpackage`` folder.

    Raises:
        BundleError: no package, damaged, or not an ML program.
    """
    spec_file = _spec_file(path)
    spec = proto("Model_pb2").Model()
    try:
        spec.ParseFromString(spec_file.read_bytes())
    except Exception as e:  # protobuf raises its own class, which differs between its implementations
        raise BundleError(f"{path} holds no readable Core ML model ({e}); export the bundle again.") from e
    if spec.WhichOneof("Type") != "mlProgram":
        raise BundleError(f"{path} is a Core ML {spec.WhichOneof('Type')}, not an ML program; export the bundle again.")
    reader = _Reader(proto("MIL_pb2"), Blobs(spec_file.parent))
    functions = {name: reader.function(name, f) for name, f in spec.mlProgram.functions.items()}
    default = spec.description.defaultFunctionName or "main"
    return Package(functions, default, spec.specificationVersion, _image_inputs(spec))


def proto(module: str) -> Any:
    """A protobuf module of coremltools, imported without its remarks about torch versions and macOS."""
    loggers = [logging.getLogger(name) for name in ("coremltools", "torch.utils._pytree", "torchao")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(f"coremltools.proto.{module}")
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _spec_file(path: Path) -> Path:
    try:
        manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
        relative = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        file: Path = (path / "Data" / relative).resolve()
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BundleError(f"{path} is not a Core ML package ({e}); export the bundle again.") from e
    if not file.is_relative_to(path.resolve()) or not file.is_file():
        raise BundleError(f"{path} names the model file {relative!r}, which is not inside it; do not use this bundle.")
    return file


def _image_inputs(spec: Any) -> dict[str, str]:
    """Image inputs by name with their colour space, e.g. ``RGB``, over all functions."""
    described = [*spec.description.input, *(i for f in spec.description.functions for i in f.input)]
    spaces = proto("FeatureTypes_pb2").ImageFeatureType.ColorSpace
    return {i.name: str(spaces.Name(i.type.imageType.colorSpace)) for i in described
            if i.type.WhichOneof("Type") == "imageType"}


class _Reader:
    """Turns protobuf messages into the classes above."""

    def __init__(self, mil: Any, blobs: Blobs) -> None:
        self.blobs = blobs
        self.dtypes = {number: _short(name) for name, number in mil.DataType.items()}

    def function(self, name: str, function: Any) -> Function:
        block = function.block_specializations[function.opset]
        return Function(name, tuple(self.named(i) for i in function.inputs), tuple(block.outputs),
                        tuple(self.operation(o) for o in block.operations))

    def operation(self, message: Any) -> Operation:
        inputs = {key: tuple(b.name if b.WhichOneof("binding") == "name" else self.constant(b.value)
                             for b in argument.arguments) for key, argument in message.inputs.items()}
        attributes = {k: self.constant(v) for k, v in message.attributes.items() if k != "name"}
        return Operation(message.type, inputs, tuple(self.named(o) for o in message.outputs), attributes)

    def named(self, message: Any) -> Named:
        return Named(message.name, *self.tensor_type(message.type))

    def tensor_type(self, value_type: Any) -> tuple[str, tuple[int, ...]]:
        if value_type.WhichOneof("type") != "tensorType":
            raise BundleError(f"the Core ML program holds a {value_type.WhichOneof('type')}, expected tensors; export "
                              "the bundle again.")
        tensor = value_type.tensorType
        return self.dtypes[tensor.dataType], tuple(int(d.constant.size) for d in tensor.dimensions)

    def constant(self, value: Any) -> Value:
        dtype, shape = self.tensor_type(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            return self.blobs.tensor(value.blobFileValue.fileName, value.blobFileValue.offset, dtype, shape)
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field == "strings":
            return Text(tensor.strings.values)
        if field == "bytes":
            return decode_bytes(tensor.bytes.values, dtype, shape)
        # An empty tensor has no field at all.
        return from_numbers(list(getattr(tensor, field).values) if field else [], dtype, shape)


def _short(name: str) -> str:
    """``FLOAT16`` -> ``fp16``; the other names only change their case."""
    return {"FLOAT16": "fp16", "FLOAT32": "fp32"}.get(name, name.lower())
