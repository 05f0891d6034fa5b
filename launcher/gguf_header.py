"""The header of a GGUF file, read with the standard library: sizes of a model without its tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LaunchError

KEPT_ARRAY_LENGTH = 64
"""Longer arrays (tokens, merges) are skipped: only their length is kept."""

_MIN_HEADER_BYTES = 24
_MAX_DIMS = 4
_MAX_NAME_BYTES = 1024
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}

# ggml type number -> (name, elements of a block, bytes of a block), from ggml.h.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}


@dataclass(frozen=True)
class SkippedArray:
    """Stands for a long array in the metadata."""

    length: int


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is in ggml order: the fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the tensor data. Metadata values are scalars, strings, tuples or `SkippedArray`."""

    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    file_bytes: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads the header only. Raises LaunchError when the file is absent, is no GGUF, is damaged, or is cut short."""
    try:
        with open(path, "rb") as f:
            size = f.seek(0, 2)
            if size < _MIN_HEADER_BYTES:
                raise LaunchError(f"{path} has {size} bytes: not a GGUF file", "Download the file again.")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path, size))
    except OSError as e:
        raise LaunchError(f"cannot read {path}: {e.strerror}", "Check the path and its permissions.") from None


class _Cursor:
    """A position in the mapped file; every read is checked against its end."""

    def __init__(self, data: mmap.mmap, path: Path, size: int) -> None:
        self.data = data
        self.path = path
        self.size = size
        self.pos = 0

    def damaged(self, what: str) -> LaunchError:
        """The error for everything that a GGUF header must not contain."""
        return LaunchError(f"{self.path}: damaged GGUF header at byte {self.pos}: {what}", "Download the file again.")

    def scalar(self, fmt: str) -> Any:
        """One number of struct format `fmt`."""
        end = self.pos + struct.calcsize(fmt)
        if end > self.size:
            raise self.damaged("the file ends inside the header")
        (value,) = struct.unpack_from(fmt, self.data, self.pos)
        self.pos = end
        return value

    def count(self, what: str, min_item_bytes: int) -> int:
        """A u64 number of items; it cannot be larger than the rest of the file allows."""
        value = self.scalar("<Q")
        if value * min_item_bytes > self.size - self.pos:
            raise self.damaged(f"{value} {what} do not fit into {self.size} bytes")
        return value

    def string(self) -> str:
        """A length-prefixed UTF-8 string."""
        length = self.count("bytes of a string", 1)
        raw = self.data[self.pos : self.pos + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("a string is not UTF-8") from None
        self.pos += length
        return text

    def skip_strings(self, count: int) -> None:
        """Step over `count` strings without decoding them."""
        unpack, data, pos, last = struct.Struct("<Q").unpack_from, self.data, self.pos, self.size - 8
        for _ in range(count):
            if pos > last:
                raise self.damaged("an array of strings runs past the end of the file")
            pos += 8 + unpack(data, pos)[0]
        if pos > self.size:
            raise self.damaged("an array of strings runs past the end of the file")
        self.pos = pos


def _parse(cursor: _Cursor) -> GgufHeader:
    magic = cursor.data[:4]
    if magic != b"GGUF":
        raise LaunchError(
            f"{cursor.path} does not start with GGUF but with {magic!r}",
            "Give a .gguf file. A Git LFS pointer or a web page saved under that name looks like this too.",
        )
    cursor.pos = 4
    version = cursor.scalar("<I")
    if version not in (2, 3):
        what = "a big-endian file" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise LaunchError(f"{cursor.path} is {what}", "Versions 2 and 3, little-endian, can be read. Convert it again.")
    num_tensors = cursor.count("tensors", 24)
    num_keys = cursor.count("metadata keys", 13)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.damaged(f"the key {key} occurs twice")
        metadata[key] = _value(cursor, cursor.scalar("<I"))
    tensors = _tensors(cursor, num_tensors, metadata.get("general.alignment", 32))
    return GgufHeader(version, metadata, tensors, cursor.size)


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        raise cursor.damaged(f"value type {kind} is not known")
    item = cursor.scalar("<I")
    if item != _STRING and item not in _SCALARS:
        raise cursor.damaged(f"an array of type {item} cannot be read")
    width = 8 if item == _STRING else struct.calcsize(_SCALARS[item])
    length = cursor.count("array items", width)
    if length <= KEPT_ARRAY_LENGTH:
        return tuple(_value(cursor, item) for _ in range(length))
    if item == _STRING:
        cursor.skip_strings(length)
    else:
        cursor.pos += length * width
    return SkippedArray(length)


def _tensors(cursor: _Cursor, num_tensors: int, alignment: Any) -> tuple[TensorInfo, ...]:
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment}, not a power of two")
    relative = [_tensor_info(cursor) for _ in range(num_tensors)]
    if len({t.name for t in relative}) != num_tensors:
        raise cursor.damaged("two tensors have the same name")
    start = -(-cursor.pos // alignment) * alignment
    tensors = tuple(TensorInfo(t.name, t.shape, t.type_name, start + t.offset, t.num_bytes) for t in relative)
    end = max((t.offset + t.num_bytes for t in tensors), default=0)
    if end > cursor.size:
        raise LaunchError(
            f"{cursor.path} is cut short: its tensors need {end} bytes, the file has {cursor.size}",
            "Download the file again.",
        )
    return tensors


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.string()
    if not name or len(name) > _MAX_NAME_BYTES:
        raise cursor.damaged("a tensor name is empty or longer than 1024 characters")
    num_dims = cursor.scalar("<I")
    if num_dims > _MAX_DIMS:
        raise cursor.damaged(f"tensor {name} has {num_dims} dimensions")
    shape = tuple(cursor.scalar("<Q") for _ in range(num_dims))
    kind = cursor.scalar("<I")
    offset = cursor.scalar("<Q")
    if kind not in TENSOR_TYPES:
        raise cursor.damaged(f"tensor {name} has the unknown type {kind}")
    type_name, block, block_bytes = TENSOR_TYPES[kind]
    if shape and shape[0] % block:
        raise cursor.damaged(f"tensor {name}: rows of {shape[0]} do not fill blocks of {block} ({type_name})")
    return TensorInfo(name, shape, type_name, offset, math.prod(shape) // block * block_bytes)
