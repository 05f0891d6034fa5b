"""Tensors of a file written by torch.save, without torch and without running anything that the file asks for.

Such a file is a zip archive: a pickle that describes objects, and one stored member for each tensor storage
(https://docs.pytorch.org/docs/stable/notes/serialization.html). The pickle may name any Python function. Here a short
list of names builds tensors and containers, a second one becomes objects that do nothing, and every other name is an
error. Storages are read from their place in the file when somebody asks, so that frozen weights cost nothing.
"""

from __future__ import annotations

import _compat_pickle
import collections
import errno
import io
import math
import os
import pickle
import pickletools
import re
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .disk import regular_size
from .spec import TrainError
from .tensor_files import NUMPY_DTYPES, fill
from .tensor_header import DTYPE_BITS

MAX_PICKLE_BYTES = 2**25
MAX_DIMENSIONS = 64
MAX_TUPLE_SIZE = 100_000
"""Elements of a tuple, those of the tuples in it included."""
_MARK = -1
STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}  # fmt: skip

INERT = re.compile(
    r"deepspeed\.runtime\.fp16\.loss_scaler\.(LossScaler|DynamicLossScaler)"
    r"|deepspeed\.utils\.tensor_fragment\.\w+"
    r"|deepspeed\.runtime\.\w+(\.\w+)*\.\w*(Config|Enum)"
    r"|mmengine\.logging\.history_buffer\.HistoryBuffer"
    r"|mmengine\.config\.config\.(Config|ConfigDict)"
    r"|addict\.addict\.Dict"
    r"|numpy\.(_?core\.multiarray\.(_reconstruct|scalar)|ndarray|dtype|random\.\w+)"
    r"|torch\.(device|dtype|bfloat16|float16|float32|float64|int64|Generator)"
    r"|argparse\.Namespace|pathlib\.(PosixPath|Path|PurePosixPath)|datetime\.\w+|_codecs\.encode|builtins\.(getattr|set|slice|complex)"
)
"""Names that training programs are known to leave in their files, and that no tensor needs."""


DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError,
    ValueError, struct.error,
)  # fmt: skip
"""What a pickle that was damaged or made up may end in."""


@dataclass(frozen=True)
class ArchiveTensor:
    """A tensor in the file, not read yet."""

    path: Path
    dtype: str
    """A key of tensor_header.DTYPE_BITS."""
    at: int
    """Byte offset in the file of its first element."""
    shape: tuple[int, ...]
    is_contiguous: bool

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a pickle may not change a tensor")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int, numel: int) -> np.ndarray:
        """A copy of `numel` elements from element `start` of the flattened tensor; BF16 as uint16 bits. Raises TrainError."""
        assert self.is_contiguous
        assert 0 <= start <= start + numel <= self.numel, (start, numel, self.numel)
        kind = np.dtype(NUMPY_DTYPES[self.dtype])
        out = np.empty(numel, kind)
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError as e:
            raise TrainError(f"{self.path}: cannot be read: {e.strerror}") from e
        try:
            fill(out.view(np.uint8).data, fd, self.at + start * kind.itemsize, self.path)
        finally:
            os.close(fd)
        return out


@dataclass(frozen=True)
class _Storage:
    """A member of the archive; only `_Reader.persistent_load` makes one, so that no pickle can name a file."""

    path: Path
    dtype: str
    at: int
    numel: int

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a pickle may not change a storage")


class _Builder:
    """A function that a pickle may call, in a form that it cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a pickle may not change a function")


class Inert:
    """What stands in for an object of a known kind: can be made, called and given a state, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of an open file, as a file of their own."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            # As the system says it, which zipfile expects of a file that is too short.
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def read_archive(path: Path, start: int = 0, length: int | None = None) -> Any:
    """The objects of the file, or of the archive in `length` bytes of it, with ArchiveTensor for every tensor.

    Raises TrainError, naming the file and what it asked for.
    """
    try:
        size = regular_size(path)
        if start + (length or 0) > size:
            raise TrainError(f"{path}: has {size} bytes, {start + (length or 0)} were promised", "It is cut short.")
        with path.open("rb") as file:
            window = _Window(file, start, size - start if length is None else length)
            with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]  # a file for all that zipfile asks
                return _read(path, archive, start)
    except OSError as e:
        raise TrainError(f"{path}: cannot be read: {e.strerror or e}") from e
    except TrainError:
        raise
    except (NotImplementedError, *DAMAGE) as e:
        # zipfile says NotImplementedError for compressions and encryptions that it does not know, and anything of DAMAGE
        # for a directory of members that was made up.
        raise TrainError(
            f"{path}: is not an archive of torch.save ({e})",
            "It is cut short, or written by torch < 1.6: save it again.",
        ) from e


def _read(path: Path, archive: zipfile.ZipFile, start: int) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise TrainError(f"{path}: holds {len(pickles)} pickles, an archive of torch.save holds one")
    root = pickles[0].removesuffix("data.pkl")
    for name, limit in ((f"{root}byteorder", 16), (pickles[0], MAX_PICKLE_BYTES)):
        info = members.get(name)
        # A compressed member could grow to anything; torch stores them as they are.
        if info is not None and (info.compress_type != zipfile.ZIP_STORED or info.file_size > limit):
            raise TrainError(f"{path}: {name} has {info.file_size} bytes, or is compressed; at most {limit} are read")
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
        raise TrainError(f"{path}: was written on a big-endian machine")
    content = archive.read(pickles[0])
    held = {name: info for name, info in members.items() if name.startswith(root)}
    reader = _Reader(io.BytesIO(content), path, held, root, start)
    try:
        check_opcodes(content, path)
        return reader.load()
    except TrainError:
        raise
    except DAMAGE as e:
        raise TrainError(f"{path}: its pickle is damaged ({type(e).__name__}: {e})", "Copy or save it again.") from e


def refused(path: Path, name: str) -> TrainError:
    """The error for a pickle that asks for `name`."""
    return TrainError(
        f"{path}: asks for {name}, which has no place in a checkpoint; nothing of it was run",
        "If you trust where it comes from, load it with the program that wrote it and save the tensors alone.",
    )


class _Reader(pickle.Unpickler):
    """Finds only what `BUILDERS`, STORAGES and INERT name."""

    def __init__(
        self, data: io.BytesIO, path: Path, members: dict[str, zipfile.ZipInfo], root: str, start: int
    ) -> None:
        super().__init__(data)
        self.path, self.members, self.root, self.start = path, members, root, start

    def find_class(self, module: str, name: str) -> Any:
        # torch writes protocol 2, which calls modules by their names of Python 2.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if full in BUILDERS:
            return BUILDERS[full]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if INERT.fullmatch(full):
            return Inert
        raise refused(self.path, full)

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, numel = pid
        if (
            not isinstance(key, str)
            or not isinstance(dtype, str)
            or dtype not in DTYPE_BITS
            or not isinstance(numel, int)
            or numel < 0
        ):
            raise TrainError(f"{self.path}: describes a storage as {reprlib.repr(pid)}")
        info = self.members.get(f"{self.root}data/{key}")
        if info is None:
            raise TrainError(f"{self.path}: has no storage {str(key)[:40]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < numel * DTYPE_BITS[dtype] // 8:
            raise TrainError(
                f"{self.path}: storage {key} has {info.file_size} bytes, {numel} elements of {dtype} were promised"
            )
        return _Storage(self.path, dtype, self._place(info), numel)

    def _place(self, info: zipfile.ZipInfo) -> int:
        """Where a stored member's bytes begin: behind its local header, whose name and extra field vary in length."""
        at = self.start + info.header_offset
        with open(self.path, "rb") as f:
            f.seek(at)
            header = f.read(30)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise TrainError(f"{self.path}: the archive is damaged at byte {at}")
        name, extra = struct.unpack("<HH", header[26:])
        return at + 30 + name + extra


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> ArchiveTensor:
    """torch._utils._rebuild_tensor_v2."""
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor without a storage of this file")
    numbers = (offset, *shape, *stride)
    if len(numbers) > 2 * MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in numbers):
        raise TypeError(f"a tensor of shape {reprlib.repr(shape)}")
    shape = tuple(shape)
    expected = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    contiguous = all(have == want or size == 1 for have, want, size in zip(stride, expected, shape, strict=True))
    if offset + (math.prod(shape) if contiguous else 0) > storage.numel:
        raise TrainError(f"{storage.path}: a tensor of shape {shape} does not fit into its storage")
    at = storage.at + offset * DTYPE_BITS[storage.dtype] // 8
    return ArchiveTensor(storage.path, storage.dtype, at, shape, contiguous or math.prod(shape) == 0)


def _size(values: Any) -> tuple[Any, ...]:
    """torch.Size."""
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMENSIONS:
        raise TypeError(f"a shape of {type(values).__name__}")
    return tuple(values)


def check_opcodes(data: bytes, path: Path) -> None:
    """Raises TrainError for a pickle of few bytes that would take no end of memory or time.

    Two things do: a place in the memo far behind the last one, and tuples of the same tuple, whose hash and text double with
    every level. So the stack of the pickle is followed with the number of elements of each tuple in place of the tuple.
    """
    sizes: list[int] = []
    memo: dict[int, int] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if name == "MEMOIZE" else int(argument)  # type: ignore[arg-type]  # a number there
            if place > number:
                raise TrainError(f"{path}: its pickle is damaged (place {place} of its memo)", "Copy or save it again.")
            memo[place] = sizes[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            sizes.append(memo[int(argument)])  # type: ignore[arg-type]
        elif name == "MARK":
            sizes.append(_MARK)
        else:
            taken = _taken(opcode, sizes)
            grows = name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "REDUCE", "NEWOBJ", "DUP")
            size = 1 + sum(taken) if grows else 1
            if size > MAX_TUPLE_SIZE:
                raise TrainError(f"{path}: its pickle nests tuples without end", "Copy or save it again.")
            sizes += [size] * len(opcode.stack_after)


def _taken(opcode: pickletools.OpcodeInfo, sizes: list[int]) -> list[int]:
    """What the opcode takes from the stack. Raises IndexError when that is not there."""
    taken: list[int] = []
    before = opcode.stack_before
    if pickletools.markobject in before:
        while (size := sizes.pop()) != _MARK:
            taken.append(size)
        before = before[: before.index(pickletools.markobject)]
    return taken + [sizes.pop() for _ in before]


def _first(tensor: Any, *rest: Any) -> Any:
    """torch._utils._rebuild_parameter."""
    return tensor


def _from_type(function: Callable[..., Any], kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: `function` is one of ours, or Inert."""
    return function(*args)


BUILDERS: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": _Builder(lambda *args: {}),
    "torch.Size": _Builder(_size),
    "torch._utils._rebuild_tensor": _Builder(_tensor),
    "torch._utils._rebuild_tensor_v2": _Builder(_tensor),
    "torch._utils._rebuild_parameter": _Builder(_first),
    "torch._utils._rebuild_parameter_with_state": _Builder(_first),
    "torch._tensor._rebuild_from_type_v2": _Builder(_from_type),
    "torch.Tensor": Inert,
    "torch.nn.parameter.Parameter": Inert,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
}
