"""Folders of torch.distributed.checkpoint, as FSDP writes them (accelerate's `pytorch_model_fsdp_0`, torchtitan, XTuner 1).

    .metadata         a pickle: for each tensor its shape and chunks, for each chunk the file and place of its bytes
    __R_N.distcp      of rank R: archives of torch.save end to end, one for each chunk

Layout: torch/distributed/checkpoint/metadata.py and filesystem.py (torch 2.13). Read like any pickle here: nothing is run.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .disk import regular_size
from .foreign import ForeignCheckpoint, Given, Known, Slice, common_dtype, describe, home_of, step_in_name
from .spec import TrainError
from .tensor_header import FLOAT_DTYPES, is_printable_name
from .torch_archive import (
    BUILDERS,
    DAMAGE,
    MAX_PICKLE_BYTES,
    ArchiveTensor,
    Inert,
    check_opcodes,
    read_archive,
    refused,
)

METADATA = ".metadata"
MAX_RUNS = 2**18
"""Runs of contiguous elements that one chunk may consist of: more rows than any vocabulary has."""
NOT_WEIGHTS = ("optim", "optimizer", "optimizers", "lr_scheduler", "scheduler", "train_state", "dataloader", "state")
"""Parts of a checkpoint beside the model."""


class Record:
    """What a pickle says of an object of a known kind: its class's name and its fields. Nothing of the class is run."""

    kind = ""

    def __init__(self, *args: Any) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.fields = dict(state) if isinstance(state, dict) else {}


RECORDS = {
    name: type(name, (Record,), {"kind": name, "fields": {}})
    for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
                 "StorageMeta", "_StorageInfo")
}  # fmt: skip
"""Of torch.distributed.checkpoint (metadata.py, filesystem.py)."""
INERT_RECORDS = re.compile(
    r"torch\.distributed\.checkpoint\.(metadata|filesystem)\.\w+|torch\.serialization\._get_layout|torch\.\w+"
    r"|pathlib\.(_local\.)?(PosixPath|Path|PurePosixPath)|datetime\.\w+"
)


class _RecordReader(pickle.Unpickler):
    """Of the pickle beside sharded checkpoints, which holds no tensors."""

    def __init__(self, data: Any, path: Path) -> None:
        super().__init__(data)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch.distributed.checkpoint.") and name in RECORDS:
            return RECORDS[name]
        if (module, name) in (("torch", "Size"), ("collections", "OrderedDict")):
            return BUILDERS[f"{module}.{name}"]
        if INERT_RECORDS.fullmatch(f"{module}.{name}"):
            return Inert
        raise refused(self.path, f"{module}.{name}")


def _read_records(path: Path) -> Record:
    """The description in the `.metadata` of torch.distributed.checkpoint. Raises TrainError, naming what it asked for."""
    try:
        if regular_size(path) > MAX_PICKLE_BYTES:
            raise TrainError(f"{path}: more than {MAX_PICKLE_BYTES} bytes of description")
        content = path.read_bytes()
        check_opcodes(content, path)
        found = _RecordReader(io.BytesIO(content), path).load()
    except OSError as e:
        raise TrainError(f"{path}: cannot be read: {e.strerror or e}") from e
    except TrainError:
        raise
    except DAMAGE as e:
        raise TrainError(f"{path}: its pickle is damaged ({type(e).__name__}: {e})", "Copy or save it again.") from e
    if not isinstance(found, Record):
        raise TrainError(f"{path}: holds a {type(found).__name__}, not the description of a checkpoint")
    return found


def read(folder: Path, given: Given) -> ForeignCheckpoint:
    """Describe the model in the folder. Raises TrainError when a file is missing, or the layout is another one."""
    path = folder / METADATA
    metadata = _read_records(path)
    kinds = _mapping(metadata, "state_dict_metadata", path)
    places = _places(_mapping(metadata, "storage_data", path), folder)
    paths = metadata.fields.get("planner_data")
    slices: dict[str, list[Slice]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, kind in kinds.items():
        name = _weight_name(key, paths)
        if name is None or not isinstance(kind, Record) or kind.kind != "TensorStorageMetadata":
            continue
        shape = _sizes(kind.fields.get("size"), path)
        if name in shapes:
            raise TrainError(f"{path}: two parts of the checkpoint hold {name}", "Save the model alone.")
        if math.prod(shape):
            shapes[name], slices[name] = shape, _chunks(key, kind, shape, places, path)
    tensors = {name: pieces[0][1] for name, pieces in slices.items()}
    floats = [name for name, tensor in tensors.items() if tensor.dtype in FLOAT_DTYPES]
    if not floats:
        raise TrainError(f"{path}: describes no weights of a model")
    return describe(
        {name: slices[name] for name in floats},
        {name: shapes[name] for name in floats},
        common_dtype(tensors[name] for name in floats),
        Known(given, home_of(folder, folder.parent)),
        step=step_in_name(folder) or step_in_name(folder.parent),
        world_size=len({tensor.path for pieces in slices.values() for _, tensor, _, _ in pieces}),
    )


def _mapping(metadata: Record, key: str, path: Path) -> dict[Any, Any]:
    value = metadata.fields.get(key)
    if metadata.kind != "Metadata" or not isinstance(value, dict):
        raise TrainError(f"{path}: has no {key}: not written by torch.distributed.checkpoint")
    return value


def _weight_name(key: Any, paths: Any) -> str | None:
    """The parameter's own name, without the parts of the checkpoint that it lies in; None for what is no weight."""
    parts = paths.get(key) if isinstance(paths, dict) else None
    if not isinstance(parts, tuple) or not all(isinstance(part, str) for part in parts):
        parts = (key,)
    name = parts[-1]
    inside = parts[:-1] or (str(name).partition(".")[0],)
    if not isinstance(name, str) or not is_printable_name(name) or any(part in NOT_WEIGHTS for part in inside):
        return None
    return name


def _places(storage: dict[Any, Any], folder: Path) -> dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]]:
    """(Tensor, offsets of the chunk) -> (file, first byte, bytes)."""
    places = {}
    for index, info in storage.items():
        if not isinstance(index, Record) or not isinstance(info, Record):
            raise TrainError(f"{folder / METADATA}: storage_data is not a map of places")
        name, at, length = (info.fields.get(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or Path(name).name != name or not is_printable_name(name):
            raise TrainError(f"{folder / METADATA}: names {reprlib.repr(name)}, which is no file beside it")
        if type(at) is not int or type(length) is not int or at < 0 or length < 0:
            raise TrainError(f"{folder / METADATA}: place {reprlib.repr((at, length))} in {name}")
        if info.fields.get("transform_descriptors"):
            raise TrainError(f"{folder / name}: is compressed or encrypted", "Save it again without extensions.")
        key, offset = index.fields.get("fqn"), index.fields.get("offset")
        if not isinstance(key, str) or not isinstance(offset, tuple | None):
            raise TrainError(f"{folder / METADATA}: storage_data is not a map of places")
        places[key, _sizes(offset or (), folder / METADATA)] = (folder / name, at, length)
    return places


def _sizes(value: Any, path: Path) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 64 or not all(type(n) is int and n >= 0 for n in value):
        raise TrainError(f"{path}: shape {reprlib.repr(value)}")
    return value


def _chunks(
    key: str,
    kind: Record,
    shape: tuple[int, ...],
    places: dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]],
    path: Path,
) -> list[Slice]:
    """Where the elements of one tensor lie. Raises TrainError when chunks do not make up the whole of it."""
    pieces: list[Slice] = []
    chunks = kind.fields.get("chunks")
    for chunk in chunks if isinstance(chunks, list) else ():
        if not isinstance(chunk, Record):
            raise TrainError(f"{path}: chunks of {key}")
        offsets, sizes = (_sizes(chunk.fields.get(name), path) for name in ("offsets", "sizes"))
        if not math.prod(sizes):
            continue
        place = places.get((key, offsets)) or (places.get((key, ())) if not any(offsets) else None)
        if place is None:
            raise TrainError(f"{path}: says nothing of where {key} from {list(offsets)} is")
        tensor = read_archive(*place)
        if not isinstance(tensor, ArchiveTensor) or tensor.shape != sizes or not tensor.is_contiguous:
            raise TrainError(f"{place[0]}: at byte {place[1]} there is not {key} {list(sizes)}")
        pieces += _runs(tensor, offsets, sizes, shape)
    pieces.sort(key=lambda piece: piece[0])
    at = 0
    for start, _, _, numel in pieces:
        if start != at:
            at = -1
            break
        at += numel
    if at != math.prod(shape):
        raise TrainError(f"{path}: the chunks of {key} do not make up its shape {list(shape)}")
    return pieces


def _runs(tensor: ArchiveTensor, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> list[Slice]:
    """The parts of a chunk that are contiguous in the whole tensor too: one where only the first dimension is cut."""
    inner = len(shape)
    while inner > 0 and (inner == len(shape) or sizes[inner] == shape[inner]):
        inner -= 1
    # Dimensions behind `inner` are whole; those before it are walked through.
    length = math.prod(sizes[inner:])
    if math.prod(sizes[:inner]) > MAX_RUNS:
        raise TrainError(
            f"{tensor.path}: a tensor {list(shape)} is cut across its rows, into more than {MAX_RUNS} runs",
            "Save it sharded along the first dimension, as FSDP does.",
        )
    runs: list[Slice] = []
    for number in range(math.prod(sizes[:inner])):
        start, left = 0, number
        for dimension in reversed(range(len(shape))):
            stride = math.prod(shape[dimension + 1 :])
            index = 0
            if dimension < inner:
                left, index = divmod(left, sizes[dimension])
            start += (offsets[dimension] + index) * stride
        runs.append((start, tensor, number * length, length))
    return runs
