"""The header of a safetensors file, read with suspicion. Standard library only.

Format: https://github.com/huggingface/safetensors#format - eight bytes (little-endian length of the header), the header
(JSON: name -> dtype, shape, data_offsets; offsets count from the header's end), then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .disk import regular_size
from .spec import TrainError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: str
    """A key of DTYPE_BITS."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file. `start` and `end` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    entries: dict[str, TensorEntry]
    """In the order of their offsets."""
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Raises TrainError, naming the file, when it is absent, cut short, or does not follow the format to the letter."""
    try:
        size = regular_size(path)
        with open(path, "rb") as f:
            prefix = f.read(8)
            if len(prefix) < 8:
                raise _damaged(path, f"{size} bytes are too few for a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES or length > size - 8:
                raise _damaged(path, f"the header claims {length} bytes, the file has {size}")
            text = f.read(length)
    except OSError as e:
        raise TrainError(f"{path}: cannot be read: {os.strerror(e.errno or 0)}") from e
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise _damaged(path, f"the header is not valid JSON ({e})") from e
    if not isinstance(fields, dict):
        raise _damaged(path, "the header is not a JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "__metadata__ is not a map of strings")
    entries = [(name, _entry(path, name, value, 8 + length)) for name, value in fields.items()]
    entries.sort(key=lambda item: (item[1].start, item[1].end))
    _check_layout(path, entries, 8 + length, size)
    return Header(dict(entries), metadata)


def pack_header(tensors: Iterable[TensorSpec], metadata: dict[str, str]) -> bytes:
    """Length, JSON and padding to a multiple of 8 bytes, as the safetensors library writes them."""
    fields: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for tensor in tensors:
        end = at + tensor.nbytes
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    if not is_printable_name(name):
        raise _damaged(path, f"tensor name {name!r}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name!r}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, f"tensor {name!r}: unknown dtype {dtype!r}; known: {', '.join(DTYPE_BITS)}")
    if not _counts(shape) or len(shape) > 64:
        raise _damaged(path, f"tensor {name!r}: shape {str(shape)[:80]}")
    if not _counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r}: data_offsets {str(offsets)[:80]}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise _damaged(path, f"tensor {name!r}: offsets {offsets} do not hold {dtype} {shape}")
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_layout(path: Path, entries: list[tuple[str, TensorEntry]], data_start: int, size: int) -> None:
    at = data_start
    for name, entry in entries:
        if entry.end > size:
            raise _damaged(path, f"tensor {name!r} ends at byte {entry.end}, the file at byte {size} (cut short)")
        if entry.start != at:
            raise _damaged(
                path, f"tensor {name!r} {'overlaps the one' if entry.start < at else 'leaves a gap'} before it"
            )
        at = entry.end
    if at != size:
        raise _damaged(path, f"{size - at} bytes follow the last tensor")


def is_printable_name(name: str) -> bool:
    """True for a name that can be printed and written: no control characters, no lone surrogates, not empty."""
    return name.isprintable() and bool(name)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _damaged(path: Path, what: str) -> TrainError:
    return TrainError(f"{path}: {what}", "The file is damaged or not safetensors; fetch or write it again.")
