"""The format of a training checkpoint, and the checks that make one trustworthy. Standard library only.

    checkpoints/step_000200/
        rank_00000.safetensors     one file for each rank: what that rank owns
        manifest.json              written last; without it the folder is not a checkpoint

A rank file holds, for each parameter of which the rank owns a slice, three one-dimensional F32 tensors
"<parameter>|master", "<parameter>|exp_avg" and "<parameter>|exp_avg_sq" (a contiguous slice of the flattened
parameter; where it starts stands in the manifest), and the random states "rng|torch" and "rng|cuda" (U8).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .disk import read_json, regular_size, write_json
from .spec import TrainError
from .tensor_header import is_printable_name, read_header

FORMAT = "tunelaunch-checkpoint-1"
MANIFEST = "manifest.json"
STATES = ("master", "exp_avg", "exp_avg_sq")
METHODS = ("full", "lora", "qlora")
DTYPES = ("bf16", "fp16", "fp32")
STEP_FOLDER = re.compile(r"step_([0-9]{6,18})")
HASH_BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class ShardFile:
    """One rank's file. `fragments`: parameter -> (first element, number of elements) of the flattened parameter."""

    file: str
    rank: int
    bytes: int
    sha256: str
    fragments: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    run_id: str
    step: int
    world_size: int
    dp: int
    sp: int
    zero_stage: int
    method: str
    """full | lora | qlora."""
    dtype: str
    """bf16 | fp16 | fp32: what the masters were rounded to in the forward pass."""
    base_model: str
    """The base as the recipe named it."""
    parameters: dict[str, tuple[int, ...]]
    """Every trained parameter and its shape, in model order."""
    adapter_config: dict[str, Any] | None
    """Content of PEFT's adapter_config.json; None for full training."""
    files: tuple[ShardFile, ...]
    state: dict[str, Any]
    """Progress: step, rows_consumed, tokens, supervised_tokens, skipped_steps, optimizer_step."""


def shard_file_name(rank: int) -> str:
    """rank_00000.safetensors for rank 0."""
    return f"rank_{rank:05d}.safetensors"


def step_folder_name(step: int) -> str:
    """step_000200 for step 200."""
    return f"step_{step:06d}"


def step_of(name: str) -> int | None:
    """200 for step_000200; None for the name of anything else."""
    match = STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def write_manifest(step_dir: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically and flush it to the disk. Raises TrainError when the disk refuses."""
    data = {"format": FORMAT} | vars(manifest)
    data["files"] = [vars(shard) for shard in manifest.files]
    write_json(
        step_dir / MANIFEST, data, "This checkpoint is not complete and will be ignored; earlier ones are whole."
    )


def read_manifest(step_dir: Path) -> Manifest:
    """Raises TrainError, naming the file and the key, when it is absent or not what `write_manifest` writes."""
    path = step_dir / MANIFEST
    if not path.is_file():
        raise TrainError(f"{path} is missing", "The folder is not a complete checkpoint; use another step.")
    read = _Reader(path, read_json(path))
    if read.data.get("format") != FORMAT:
        raise TrainError(f"{path}: format is {read.data.get('format')!r}, this version reads {FORMAT!r}")
    adapter_config = read.data.get("adapter_config")
    if adapter_config is not None:
        adapter_config = read.mapping("adapter_config")
    return Manifest(
        run_id=read.text("run_id"),
        step=read.count("step"),
        world_size=read.count("world_size", low=1),
        dp=read.count("dp", low=1),
        sp=read.count("sp", low=1),
        zero_stage=read.count("zero_stage"),
        method=read.choice("method", METHODS),
        dtype=read.choice("dtype", DTYPES),
        base_model=read.text("base_model"),
        parameters={name: read.counts(f"parameters[{name!r}]", shape) for name, shape in read.named("parameters")},
        adapter_config=adapter_config,
        files=tuple(_read_shard(path, item) for item in read.items("files")),
        state=read.mapping("state"),
    )


def _read_shard(path: Path, item: Any) -> ShardFile:
    if not isinstance(item, dict):
        raise TrainError(f"{path}: files holds a {type(item).__name__}, expected objects")
    read = _Reader(path, item)
    fragments: dict[str, tuple[int, int]] = {}
    for name, value in read.named("fragments"):
        pair = read.counts(f"fragments[{name!r}]", value)
        if len(pair) != 2:
            raise TrainError(f"{path}: fragments[{name!r}] is {value!r}, expected [start, number of elements]")
        fragments[name] = (pair[0], pair[1])
    rank = read.count("rank")
    # The name is derived, not believed: a manifest must not be able to point outside its own folder.
    if read.text("file") != shard_file_name(rank):
        raise TrainError(f"{path}: file {item['file']!r} is listed for rank {rank}, expected {shard_file_name(rank)!r}")
    sha256 = read.text("sha256")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise TrainError(f"{path}: sha256 of {item['file']} is {sha256[:80]!r}")
    return ShardFile(shard_file_name(rank), rank, read.count("bytes"), sha256, fragments)


class _Reader:
    """Typed access to the keys of one JSON object; every error names the file and the key."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data

    def text(self, key: str) -> str:
        return self._expect(key, self.data.get(key), str, "text")

    def count(self, key: str, low: int = 0) -> int:
        value = self._expect(key, self.data.get(key), int, "a whole number")
        if isinstance(value, bool) or not low <= value < 2**63:
            raise TrainError(f"{self.path}: {key} is {str(value)[:80]}, expected a whole number from {low}")
        return value

    def counts(self, key: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
            raise TrainError(f"{self.path}: {key} is {str(value)[:80]}, expected a list of whole numbers from 0")
        return tuple(value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in allowed:
            raise TrainError(f"{self.path}: {key} is {value[:80]!r}, allowed: {', '.join(allowed)}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        return self._expect(key, self.data.get(key), dict, "an object")

    def items(self, key: str) -> list[Any]:
        return self._expect(key, self.data.get(key), list, "a list")

    def named(self, key: str) -> list[tuple[str, Any]]:
        pairs = list(self.mapping(key).items())
        bad = [name for name, _ in pairs if not is_printable_name(name)]
        if bad:
            raise TrainError(f"{self.path}: {key} holds the name {bad[0][:80]!r}")
        return pairs

    def _expect(self, key: str, value: Any, kind: type, words: str) -> Any:
        if not isinstance(value, kind):
            raise TrainError(f"{self.path}: {key} is {str(value)[:80]!r}, expected {words}")
        return value


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each step_N folder, newest first. Unfinished ones (`.partial`) and other names do not count."""
    if not folder.is_dir():
        return []
    found = [(step_of(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted(((step, path) for step, path in found if step is not None), reverse=True)


def newest_verified(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that passes `verify`, and the newer ones that did not, each with the reason.

    (None, ...) when there is none. Reads every byte of the checkpoints it looks at.
    """
    skipped: list[tuple[Path, str]] = []
    for _, path in list_checkpoints(folder):
        problems = verify(path)
        if not problems:
            return path, skipped
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        skipped.append((path, "; ".join(problems[:3]) + more))
    return None, skipped


def sha256_file(path: Path, from_disk: bool = False) -> str:
    """Hex digest, read in blocks; `from_disk` lets the kernel forget its copy first. Raises OSError."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(HASH_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as f:
        if from_disk:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while size := f.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def num_threads(num_tasks: int = 16) -> int:
    """Threads for work on files: one for each task and each processor of ours, 16 at most."""
    return max(1, min(num_tasks, len(os.sched_getaffinity(0)), 16))


def verify(step_dir: Path, hashes: bool = True) -> list[str]:
    """Everything that is wrong with a checkpoint, each sentence naming its file; [] when it can be trusted.

    With `hashes` every byte is read (in parallel, one thread a file); without, only names, sizes and headers.
    """
    try:
        manifest = read_manifest(step_dir)
    except TrainError as e:
        return [e.message]
    problems = _rank_problems(step_dir, manifest)
    broken = {shard.file: _shard_problems(step_dir / shard.file, shard, manifest) for shard in manifest.files}
    if hashes:
        whole = [shard for shard in manifest.files if not broken[shard.file]]
        with ThreadPoolExecutor(num_threads(len(whole))) as threads:
            found = threads.map(lambda shard: _hash_problem(step_dir, shard, manifest), whole)
            for shard, problem in zip(whole, found, strict=True):
                broken[shard.file] = [problem] if problem else []
    problems += [problem for each in broken.values() for problem in each]
    return problems + _coverage_problems(step_dir, manifest)


def _rank_problems(step_dir: Path, manifest: Manifest) -> list[str]:
    path = step_dir / MANIFEST
    problems = []
    ranks = [shard.rank for shard in manifest.files]
    if sorted(ranks) != list(range(manifest.world_size)):
        problems.append(
            f"{path}: files are listed for ranks {ranks[:20]}, expected each of 0 to {manifest.world_size - 1}"
        )
    if step_of(step_dir.name) not in (None, manifest.step):
        problems.append(f"{path}: is of step {manifest.step}, its folder is named {step_dir.name}")
    return problems


def _shard_problems(path: Path, shard: ShardFile, manifest: Manifest) -> list[str]:
    try:
        size = regular_size(path)
    except OSError:
        return [f"{path}: is missing"]
    except TrainError as e:
        return [e.message]
    if size != shard.bytes:
        return [f"{path}: {size} bytes, the manifest says {shard.bytes} ({_looks_like(size, shard, manifest)})"]
    try:
        entries = read_header(path).entries
    except TrainError as e:
        return [e.message]
    expected = {f"{name}|{state}": numel for name, (_, numel) in shard.fragments.items() for state in STATES}
    held = {name: entry for name, entry in entries.items() if not name.startswith("rng|")}
    wrong = [n for n, e in held.items() if e.dtype != "F32" or e.shape != (expected.get(n, -1),)]
    wrong += [name for name in expected if name not in held]
    if wrong:
        return [
            f"{path}: holds other tensors than the manifest says ({len(wrong)}, such as {min(wrong)!r}): a swapped file?"
        ]
    return []


def _looks_like(size: int, shard: ShardFile, manifest: Manifest) -> str:
    other = [s.file for s in manifest.files if s.bytes == size and s.file != shard.file]
    return f"the size of {other[0]}: swapped?" if other else "cut short" if size < shard.bytes else "too long"


def _hash_problem(step_dir: Path, shard: ShardFile, manifest: Manifest) -> str:
    path = step_dir / shard.file
    try:
        digest = sha256_file(path)
    except OSError as e:
        return f"{path}: cannot be read: {e.strerror}"
    if digest == shard.sha256:
        return ""
    other = [s for s in manifest.files if s.sha256 == digest]
    if other:
        return f"{path}: is the file of rank {other[0].rank} ({other[0].file}): swapped"
    return f"{path}: sha256 {digest[:16]}... is not {shard.sha256[:16]}... as in the manifest (damaged)"


def _coverage_problems(step_dir: Path, manifest: Manifest) -> list[str]:
    """Every element of every parameter must be held exactly once."""
    path = step_dir / MANIFEST
    pieces: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for shard in manifest.files:
        for name, (start, numel) in shard.fragments.items():
            pieces[name].append((start, numel, shard.file))
    problems = [
        f"{path}: fragment of {name!r}, which is not a parameter" for name in pieces.keys() - manifest.parameters
    ]
    for name, shape in manifest.parameters.items():
        at, total = 0, math.prod(shape)
        if total == 0:
            problems.append(f"{path}: parameter {name!r} is empty (shape {list(shape)})")
        for start, numel, file in sorted(pieces[name]):
            if start != at or numel == 0:
                problems.append(f"{path}: {file} holds {name!r} from element {start}, expected {at}")
                break
            at = start + numel
        else:
            if at != total:
                problems.append(f"{path}: {name!r} has {total} elements, its fragments hold {at}")
    return problems
