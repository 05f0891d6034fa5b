"""Tensors in safetensors files without torch: read in pieces, rounded, written in one pass, split into shards.

Nothing here holds a whole tensor unless asked for one: memory is a few pieces of CHUNK elements.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from .disk import storage_error, write_text, writing
from .spec import TrainError
from .tensor_header import FLOAT_DTYPES, TensorEntry, TensorSpec, pack_header, read_header

CHUNK = 2**18
"""Elements converted at a time: 1 MiB of fp32, so that the passes of a rounding stay in the processor's cache."""
COPY_BYTES = 2**26
WRITTEN_BYTES = 2**22
"""Written by one call of the system."""
FLUSHED_BYTES = 2**26
"""Written before the disk is asked, in a thread, to take them: at the end little is left to wait for."""
HASHED_AHEAD = 16
"""Writes that may be done before the first of them is hashed: 64 MiB of memory at most."""
AHEAD = 16
"""Pieces that may be computed before the first of them is written."""

Item = TypeVar("Item")
Result = TypeVar("Result")

NUMPY_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "F16": np.float16,
    "BF16": np.uint16, "U32": np.uint32, "I32": np.int32, "F32": np.float32, "U64": np.uint64, "I64": np.int64,
    "F64": np.float64,
}  # fmt: skip
"""BF16 is held as its bits."""
STORED_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""Recipe words -> safetensors words."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def fill(buffer: memoryview, fd: int, offset: int, path: Path) -> None:
    """Read `buffer` full from `offset` of an open file. Raises TrainError, naming `path`, when it ends before or fails."""
    done = 0
    while done < len(buffer):
        try:
            size = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as e:
            raise TrainError(f"{path}: cannot be read: {e.strerror}") from e
        if size == 0:
            raise TrainError(f"{path}: ends at byte {offset + done} while it is being read")
        done += size


class TensorFile:
    """A safetensors file opened for reading. Raises TrainError, naming the file, when it is damaged or cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.entries = self.header.entries
        self._fd = os.open(path, os.O_RDONLY)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        return self._fd

    def read_bytes_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) from `offset` of the file."""
        fill(buffer, self._fd, offset, self.path)

    def read(self, name: str, start: int = 0, numel: int | None = None) -> np.ndarray:
        """A copy of `numel` elements (default: all) from element `start`: flat, BF16 as uint16 bits."""
        entry = self.entries[name]
        kind = np.dtype(NUMPY_DTYPES[entry.dtype])
        out = np.empty(entry.numel - start if numel is None else numel, kind)
        self.read_bytes_into(entry.start + start * kind.itemsize, out.view(np.uint8).data)
        return out

    def array(self, name: str) -> np.ndarray:
        """The tensor as a read-only memory map in its own shape, BF16 as uint16 bits."""
        entry = self.entries[name]
        return np.memmap(self.path, NUMPY_DTYPES[entry.dtype], "r", offset=entry.start, shape=entry.shape or (1,))


class SafetensorsWriter:
    """Writes a safetensors file front to back: header first, then the tensors in the order of `tensors`.

    Use as a context manager; a normal end checks that every tensor is complete and flushes the file to the disk.
    Raises TrainError when the disk refuses. With `hashed` a thread hashes what was written, so that `sha256` is known at the
    end without reading it again; pieces must then stay as they are.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[TensorSpec],
        metadata: dict[str, str] | None = None,
        hashed: bool = False,
    ) -> None:
        self.path = path
        self._digest = hashlib.sha256() if hashed else None
        self._hasher = ThreadPoolExecutor(1) if hashed else None
        self._unhashed: deque[Future[None]] = deque()
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._unflushed = 0
        self._left = [(tensor.name, tensor.nbytes) for tensor in reversed(tensors) if tensor.nbytes]
        header = pack_header(tensors, metadata or {"format": "pt"})
        with self._writing():
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._write_all(memoryview(header))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                assert not self._left, f"{self.path}: not written: {self._left[-1][0]}"
                with self._writing():
                    if self._flushing is not None:
                        self._flushing.result()
                    os.fsync(self._fd)
        finally:
            self._flusher.shutdown()
            if self._hasher is not None:
                self._hasher.shutdown()
            os.close(self._fd)

    def write(self, name: str, piece: np.ndarray) -> None:
        """Append the next piece of tensor `name`; its bytes are written as they are."""
        self._account(name, piece.nbytes)
        self._write_all(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)

    def copy(self, name: str, source: TensorFile, entry: TensorEntry) -> None:
        """Append tensor `name` whole from another file, inside the kernel where the file system can and nobody hashes."""
        self._account(name, entry.nbytes)
        at = entry.start
        while at < entry.end:
            size = self._copy_range(source, at, min(entry.end - at, COPY_BYTES))
            if size == 0:
                raise TrainError(f"{source.path}: ends at byte {at} while it is being read")
            at += size
            self._flush_behind()

    def _copy_range(self, source: TensorFile, offset: int, size: int) -> int:
        try:
            if self._digest is None:
                return os.copy_file_range(source.fileno(), self._fd, size, offset)
        except OSError as e:
            if e.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise storage_error(e, self.path, _KEPT) from e
        buffer = memoryview(bytearray(min(size, 2**23)))
        source.read_bytes_into(offset, buffer)
        self._write_all(buffer)
        return len(buffer)

    def _account(self, name: str, size: int) -> None:
        self._unflushed += size
        if size == 0:
            return
        expected, left = self._left[-1]
        assert (name, size <= left) == (expected, True), (
            f"{self.path}: {size} bytes of {name}, not {left} of {expected}"
        )
        if size == left:
            self._left.pop()
        else:
            self._left[-1] = (name, left - size)

    def sha256(self) -> str:
        """Hex digest of all that was written; asked for after the end."""
        assert self._digest is not None
        return self._digest.hexdigest()

    def _write_all(self, data: memoryview) -> None:
        while data:
            with self._writing():
                size = os.write(self._fd, data[:WRITTEN_BYTES])
            if self._hasher is not None and self._digest is not None:
                self._unhashed.append(self._hasher.submit(self._digest.update, data[:size]))
                if len(self._unhashed) > HASHED_AHEAD:
                    self._unhashed.popleft().result()
            data = data[size:]
        self._flush_behind()

    def _flush_behind(self) -> None:
        if self._unflushed < FLUSHED_BYTES or (self._flushing is not None and not self._flushing.done()):
            return
        with self._writing():
            if self._flushing is not None:
                # The kernel tells of a failed write once: it must not be lost.
                self._flushing.result()
            self._flushing = self._flusher.submit(os.fdatasync, self._fd)
        self._unflushed = 0

    def _writing(self) -> Any:
        return writing(self.path, _KEPT)


_KEPT = "Nothing was published; what was read is unchanged."


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits (uint16), rounded to nearest, ties to even, as torch does. NaN stays NaN; too large becomes inf."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        # The carry of the rounding would turn a NaN with a small payload into an infinity, or into -0.
        out[nan] = (bits[nan] >> 16 | 0x40).astype(np.uint16)
    return out


def to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Elements of a stored float dtype -> fp32, exact but for F64."""
    if dtype == "BF16":
        wide = values.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(np.float32, copy=False)


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 -> a stored float dtype, rounded once to nearest even; BF16 as uint16 bits."""
    if dtype == "BF16":
        return bf16_bits(values)
    with np.errstate(over="ignore"):
        return values.astype(NUMPY_DTYPES[dtype], copy=False)


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """False when an element is infinite or NaN. `values` as stored: BF16 as uint16 bits."""
    if dtype in ("BF16", "F16"):
        exponent = 0x7F80 if dtype == "BF16" else 0x7C00
        return not values.size or int((values.view(np.uint16) & 0x7FFF).max()) < exponent
    return bool(np.isfinite(values).all())


def read_as(source: TensorFile, name: str, dtype: str, start: int, numel: int) -> np.ndarray:
    """Elements of a float tensor, rounded to `dtype`. Raises TrainError when a value is not finite there."""
    piece = source.read(name, start, numel)
    out = from_float32(to_float32(piece, source.entries[name].dtype), dtype)
    if not all_finite(out, dtype):
        raise TrainError(f"{source.path}: {name} holds a value that is not finite as {dtype}", _finite_hint(dtype))
    return out


def _finite_hint(dtype: str) -> str:
    return "fp16 ends at 65504: use --dtype bf16 or fp32." if dtype == "F16" else "The weights are broken."


def in_order(pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results of `function` in the order of `items`, computed by the pool a few items ahead: memory stays bounded."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@dataclass(frozen=True)
class StoredTensor:
    """Where a model folder keeps a tensor."""

    path: Path
    entry: TensorEntry

    @property
    def is_float(self) -> bool:
        return self.entry.dtype in FLOAT_DTYPES


@dataclass(frozen=True)
class Shard:
    """One file of a model folder that is to be written."""

    file: str
    tensors: tuple[TensorSpec, ...]


def plan_shards(tensors: list[TensorSpec], max_bytes: int) -> list[Shard]:
    """Split in order, so that no file holds more than `max_bytes` (unless one tensor does), named as transformers does."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return [Shard(WEIGHTS, tuple(groups[0]))]
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    return [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def write_index(folder: Path, shards: list[Shard]) -> None:
    """model.safetensors.index.json, when there is more than one shard."""
    if len(shards) == 1:
        return
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n", _KEPT)


def parse_size(text: str) -> int:
    """ "5GB" -> 5 * 10^9 bytes, "500MB", "2GiB" -> 2 * 2^30, or plain bytes. Raises TrainError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?\s*", text, re.IGNORECASE)
    unit = (match[2] or "").lower() if match else ""
    base = 1024 if unit.endswith("i") else 1000
    size = int(float(match[1]) * base ** (" kmgt".index(unit[0]) if unit else 0)) if match else 0
    if size <= 0:
        raise TrainError(f"{text!r} is not a size", "Write a number and a unit, such as 5GB, 500MB or 2GiB.")
    return size
