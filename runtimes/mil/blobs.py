"""Constant values: immediate numbers and bytes, and ``weight.bin`` with its aligned records.

``weight.bin`` starts with a 64-byte header. A value's offset points to a 64-byte record: sentinel 0xDEADBEEF, dtype
code, size in bytes and position of the data, each little-endian. Elements below 8 bits are packed from the least
significant bit of each byte upwards.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketsam.errors import BundleError
from pocketsam.runtimes.mil.errors import UnknownOperator

SENTINEL = 0xDEADBEEF
RECORD = struct.Struct("<IIQQ")
PREFIX = "@model_path/"

# MIL dtype -> what it is stored as, and what torch computes with; torch lacks arithmetic on wide unsigned integers.
STORED = {"bool": np.bool_, "fp16": np.float16, "fp32": np.float32, "int8": np.int8, "uint8": np.uint8,
          "int16": np.int16, "uint16": np.uint16, "int32": np.int32, "uint32": np.uint32, "int64": np.int64}
WIDER = {"uint16": np.int32, "uint32": np.int64}
PACKED_BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}


class Blobs:
    """The weight files beside one model file, mapped into memory and read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, NDArray[np.uint8]] = {}

    def tensor(self, name: str, offset: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """The value of dtype and shape whose record is at ``offset`` of the file ``@model_path/...``.

        Raises:
            BundleError: the file is missing or damaged, or lies elsewhere.
        """
        data = self._file(name)
        if offset < 0 or offset + RECORD.size > data.size:
            raise BundleError(f"{name} has no record at {offset}; export the bundle again.")
        sentinel, _, size, start = RECORD.unpack(data[offset:offset + RECORD.size].tobytes())
        if sentinel != SENTINEL or start + size > data.size:
            raise BundleError(f"{name} has a damaged record at {offset}; export the bundle again.")
        return decode_bytes(data[start:start + size], dtype, shape)

    def _file(self, name: str) -> NDArray[np.uint8]:
        if name not in self.files:
            path = (self.folder / name.removeprefix(PREFIX)).resolve()
            if not name.startswith(PREFIX) or not path.is_relative_to(self.folder.resolve()) or not path.is_file():
                raise BundleError(f"the Core ML program names the weights {name!r}, which are not inside its package; "
                                  "do not use this bundle.")
            if not path.stat().st_size:
                raise BundleError(f"{name} is empty; export the bundle again.")
            # Copy on write, because torch refuses to hold read-only memory silently.
            self.files[name] = np.memmap(path, np.uint8, "c")
        return self.files[name]


def decode_bytes(data: bytes | NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Raw little-endian bytes -> tensor; sub-byte types come out as int8 or uint8.

    Raises:
        BundleError: too few bytes for the shape.
    """
    raw = np.frombuffer(bytearray(data), np.uint8) if isinstance(data, bytes) else data
    count = math.prod(shape)
    if dtype in PACKED_BITS:
        return torch.from_numpy(unpack(raw, PACKED_BITS[dtype], count, signed=dtype == "int4").reshape(shape))
    if dtype not in STORED:
        raise UnknownOperator("const", f"dtype {dtype}")
    need = count * np.dtype(STORED[dtype]).itemsize
    if raw.size < need:
        raise BundleError(f"a constant of the Core ML program holds {raw.size} bytes, expected {need}; export the "
                          "bundle again.")
    array: NDArray[Any] = np.asarray(raw[:need]).view(STORED[dtype]).reshape(shape)
    return torch.from_numpy(array.astype(WIDER[dtype]) if dtype in WIDER else array)


def from_numbers(values: Sequence[float], dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Immediate numbers -> tensor."""
    array: NDArray[Any] = np.array(values, STORED[dtype]).reshape(shape)
    return torch.from_numpy(array.astype(WIDER[dtype]) if dtype in WIDER else array)


def unpack(raw: NDArray[np.uint8], bits: int, count: int, signed: bool = False) -> NDArray[np.generic]:
    """``count`` integers of ``bits`` bits from packed bytes, least significant bit first -> uint8, or int8 if signed.

    Raises:
        BundleError: too few bytes.
    """
    if raw.size * 8 < count * bits:
        raise BundleError(f"a packed constant holds {raw.size} bytes for {count} values of {bits} bits; export the "
                          "bundle again.")
    rows = np.unpackbits(raw, bitorder="little")[:count * bits].reshape(count, bits)
    out = np.zeros(count, np.uint8)
    for i in range(bits):
        out |= rows[:, i] << i
    if signed:
        return (out.astype(np.int8) << (8 - bits)) >> (8 - bits)
    return out
