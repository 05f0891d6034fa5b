"""Saving checkpoints: every rank writes and reads back the fragments it owns, and rank 0 makes them a checkpoint.

One save goes through three phases, of which the last two are done by a thread, beside the step loop where
`checkpoint.async` says so:

    begin     all ranks   room on the disk, an empty step_N.partial, the fragments (copied when training goes on)
    write     each rank   its shard, flushed, read back from the disk, and a row that describes it
    publish   rank 0      manifest, check, rename to step_N; only then the oldest checkpoints go

A crash at any instant leaves the earlier checkpoints untouched, and at most one folder that no reader looks at. The
format is documented in checkpoint_format.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .checkpoint_format import (
    Manifest,
    ShardFile,
    list_checkpoints,
    sha256_file,
    shard_file_name,
    step_folder_name,
    verify,
    write_manifest,
)
from .disk import fsync_path, require_space, storage_error, write_json
from .engine import STATES, Ranks, full_shape, local_fragments, loss_scaler_state, optimizer_step
from .model import PackedLanguageModel
from .spec import TrainError, TrainSpec
from .tensor_files import SafetensorsWriter
from .tensor_header import TensorSpec

PARTIAL = ".partial"
MANIFEST_BYTES = 2**20
"""Room for the manifest and the headers, beside the tensors."""
PROBLEM_BYTES = 8192
"""Room for the words of a rank's problem, of which JSON may make six bytes a character."""
DTYPES = {torch.float32: "F32", torch.uint8: "U8"}


@dataclass(frozen=True)
class Saved:
    """How one save ended."""

    name: str
    """step_000200."""
    seconds: float
    """From its begin to its end."""
    stalled_s: float
    """How much of it the step loop stood still."""
    problem: TrainError | None = None
    """Why there is no such checkpoint."""
    remark: str = ""
    """What went wrong beside it; on rank 0."""


class Saver:
    """Saves one checkpoint at a time. Every method that talks to other ranks says so: "Collective"."""

    def __init__(
        self, engine: Any, spec: TrainSpec, ranks: Ranks, spared: Callable[[], Path | None] = lambda: None
    ) -> None:
        """`spared` is a checkpoint that must stay for the moment, whatever its age: it is being copied."""
        self._engine, self._spec, self._ranks, self._spared = engine, spec, ranks, spared
        self._root = Path(spec.paths.checkpoints_dir)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._work: Future[str] | None = None
        """What this rank does for the save under way; None between saves. All ranks agree on whether there is one.
        Its result is a remark for the log, or empty."""
        self._remark = ""
        self._is_publishing = False
        self._name, self._manifest = "", None
        self._began = self._stalled_s = 0.0
        self._problem: TrainError | None = None

    def save(self, progress: dict[str, int], last: bool = False) -> list[Saved]:
        """Save step `progress["step"]`; `progress` is kept as the manifest's `state`. Collective: every rank must call.

        Returns the saves that ended meanwhile: this one too, unless it goes on in the background. `last` waits for it
        in any case. Raises TrainError when a save failed and either it was the last one or `checkpoint.on_error` is stop.
        """
        ended = self.finish()
        with self._standing_still():
            self._begin(progress)
        if last or not self._spec.checkpoint.asynchronous:
            ended += self.finish()
        if last and (problem := ended[-1].problem):
            raise problem
        return ended

    def poll(self) -> list[Saved]:
        """Move the save under way on, without waiting; to be called after each step. Collective: every rank must call."""
        if self._work is None:
            return []
        with self._standing_still():
            self._look()
        return self._judged([] if self._work else [self._saved()])

    def finish(self) -> list[Saved]:
        """Wait for the save under way. Collective: every rank must call."""
        if self._work is None:
            return []
        with self._standing_still():
            while self._work is not None:
                wait([self._work])
                self._look()
        return self._judged([self._saved()])

    @contextlib.contextmanager
    def _standing_still(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._stalled_s += time.perf_counter() - began

    def _judged(self, ended: list[Saved]) -> list[Saved]:
        for saved in ended:
            if saved.problem is not None and self._spec.checkpoint.on_error == "stop":
                raise saved.problem
        return ended

    @property
    def _partial(self) -> Path:
        return self._root / (self._name + PARTIAL)

    def _begin(self, progress: dict[str, int]) -> None:
        self._name, self._began, self._stalled_s = step_folder_name(progress["step"]), time.perf_counter(), 0.0
        self._is_publishing, self._problem, self._remark = False, None, ""
        self._manifest = _manifest(self._engine, self._spec, progress)
        refused: TrainError | None = None
        if self._ranks.rank == 0:
            try:
                _prepare(self._root, self._partial, self._manifest)
            except TrainError as e:
                refused = e
        shard = _Shard(self._engine, self._ranks, copied=self._spec.checkpoint.asynchronous)
        dist.barrier()
        self._work = (
            self._thread.submit(_refuse, refused) if refused else self._thread.submit(shard.write, self._partial)
        )

    def _saved(self) -> Saved:
        seconds = time.perf_counter() - self._began
        return Saved(self._name, seconds, self._stalled_s, self._problem, self._remark)

    def _look(self) -> None:
        """Begin the next phase, or end the save, when all ranks are ready for it."""
        assert self._work is not None
        done = self._work.done()
        failed = done and self._work.exception() is not None
        published = done and self._is_publishing and self._ranks.rank == 0
        flags = torch.tensor([done and not failed, failed, published], dtype=torch.float32, device=self._ranks.device)
        dist.all_reduce(flags)
        num_done, num_failed, num_published = (int(n) for n in flags.tolist())
        if num_failed:
            self._problem = self._given_up()
        elif published:
            self._remark = self._work.result()
        if num_failed or num_published:
            self._work = None
        elif num_done == self._ranks.world_size and not self._is_publishing:
            self._is_publishing = True
            if self._ranks.rank == 0:
                assert self._manifest is not None
                self._work = self._thread.submit(
                    _publish,
                    self._partial,
                    self._manifest,
                    self._ranks.world_size,
                    self._spec.checkpoint.keep,
                    self._spared,
                )

    def _given_up(self) -> TrainError:
        """The problem of the lowest rank that has one. What was written is removed."""
        assert self._work is not None
        own = self._work.exception()
        words = torch.zeros(self._ranks.world_size, PROBLEM_BYTES, dtype=torch.uint8, device=self._ranks.device)
        if own is not None:
            said = (own.message, own.hint) if isinstance(own, TrainError) else (f"{type(own).__name__}: {own}", "")
            text = json.dumps([said[0][:400], said[1][:250]]).encode()
            words[self._ranks.rank, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        dist.all_reduce(words)
        texts = [bytes(row.tolist()).rstrip(b"\0").decode() for row in words.cpu()]
        if own is not None and not isinstance(own, TrainError):
            # A bug: its traceback says more, and every rank has been told.
            raise own
        message, hint = json.loads(next(text for text in texts if text))
        if self._ranks.rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        resume = f"The earlier checkpoints are whole. Then: launch runs resume {self._spec.run_id}"
        return TrainError(f"cannot save the checkpoint {self._name}: {message}", f"{hint}\n{resume}".strip())


def _refuse(problem: TrainError) -> str:
    raise problem


def _prepare(root: Path, partial: Path, manifest: Manifest) -> None:
    """An empty folder to write into, on a disk with room. Raises TrainError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Left by a kill; each may be as large as a checkpoint.
        for remains in root.glob("*" + PARTIAL):
            shutil.rmtree(remains)
        elements = sum(torch.Size(shape).numel() for shape in manifest.parameters.values())
        require_space(root, 4 * len(STATES) * elements + MANIFEST_BYTES)
        partial.mkdir()
        fsync_path(root.parent)
    except OSError as e:
        raise storage_error(e, partial) from e


class _Shard:
    """What one rank has to write."""

    def __init__(self, engine: Any, ranks: Ranks, copied: bool) -> None:
        self._rank = ranks.rank
        self._tensors: dict[str, torch.Tensor] = {}
        self._fragments: dict[str, tuple[int, int]] = {}
        # Under ZeRO-0 every rank holds the same whole tensors: one copy is enough.
        writes = ranks.rank == 0 or engine.zero_optimization_stage() > 0
        for fragment in local_fragments(engine) if writes else ():
            self._fragments[fragment.name] = (fragment.start, fragment.numel)
            for key in STATES:
                live = fragment.tensors[key]
                self._tensors[f"{fragment.name}|{key}"] = live.to("cpu", copy=True) if copied else live
        self._tensors["rng|torch"] = torch.get_rng_state()
        if ranks.device.type == "cuda":
            self._tensors["rng|cuda"] = torch.cuda.get_rng_state(ranks.device)

    def write(self, folder: Path) -> str:
        try:
            self._write(folder)
        except OSError as e:
            raise storage_error(e, folder) from e
        return ""

    def _write(self, folder: Path) -> None:
        """The shard, and beside it the row that describes it. Raises TrainError, also when the disk gives back other bytes.

        The row goes to rank 0 as a file: gloo copies objects of this size in threads of its own, each of which starts
        an OpenMP team, and with more threads than cores every later parallel region of the process is half as fast.
        """
        path = folder / shard_file_name(self._rank)
        specs = [TensorSpec(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in self._tensors.items()]
        with SafetensorsWriter(path, specs, hashed=True) as writer:
            for name, tensor in self._tensors.items():
                writer.write(name, tensor.cpu().numpy())
        self._tensors.clear()
        row = ShardFile(path.name, self._rank, path.stat().st_size, writer.sha256(), self._fragments)
        read_back = sha256_file(path, from_disk=True)
        if read_back != row.sha256:
            raise TrainError(f"{path}: the disk gives back other bytes than were written", "Check the disk (dmesg).")
        write_json(_row_file(folder, self._rank), dataclasses.asdict(row))


def _row_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def _publish(partial: Path, manifest: Manifest, num_ranks: int, keep: int, spared: Callable[[], Path | None]) -> str:
    """Make the shards a checkpoint, and prune. Raises TrainError; then nothing is published. Returns what pruning ran into."""
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    try:
        shards = tuple(_take_row(partial, rank) for rank in range(num_ranks))
        write_manifest(partial, dataclasses.replace(manifest, files=shards))
        # Their bytes were compared when they were written.
        problems = verify(partial, hashes=False)
        if problems:
            raise TrainError("\n".join(problems), "The disk gives back something else than was written.")
        _rename(partial, final)
    except OSError as e:
        raise storage_error(e, final) from e
    try:
        prune(final.parent, manifest.step, keep, spared())
    except OSError as e:
        return f"{final.name} is saved, but an older one cannot be removed: {e.strerror}"
    return ""


def _take_row(folder: Path, rank: int) -> ShardFile:
    path = _row_file(folder, rank)
    row = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return ShardFile(**{**row, "fragments": {name: tuple(place) for name, place in row["fragments"].items()}})


def _rename(partial: Path, final: Path) -> None:
    if final.exists():
        # A checkpoint of this step that the resume has skipped as damaged, and could not set aside.
        aside = final.with_name(final.name + ".old" + PARTIAL)
        os.replace(final, aside)
        os.replace(partial, final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(partial, final)
    fsync_path(final.parent)


def prune(root: Path, newest_step: int, keep: int, spared: Path | None = None) -> None:
    """Remove all but the newest `keep`, and `spared`. A later step than the one just saved was skipped on resume: it
    counts for nothing. Raises OSError."""
    trusted = [path for step, path in list_checkpoints(root) if step <= newest_step]
    for path in trusted[keep:]:
        if path == spared:
            continue
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        dying = path.with_name(path.name + ".old" + PARTIAL)
        os.replace(path, dying)
        shutil.rmtree(dying)


def _manifest(engine: Any, spec: TrainSpec, progress: dict[str, int]) -> Manifest:
    """All but the files."""
    model: PackedLanguageModel = engine.module
    peft_config = getattr(model.model, "peft_config", None)
    return Manifest(
        run_id=spec.run_id,
        step=progress["step"],
        world_size=spec.parallel.world_size,
        dp=spec.parallel.dp,
        sp=spec.parallel.sp,
        zero_stage=spec.parallel.zero_stage,
        method=spec.method.name,
        dtype=spec.model.dtype,
        base_model=spec.model.source,
        parameters={name: full_shape(p) for name, p in model.trainable().items()},
        adapter_config=_adapter_config(peft_config["default"], spec) if peft_config else None,
        files=(),
        state={**progress, "optimizer_step": optimizer_step(engine), "loss_scaler": loss_scaler_state(engine)},
    )


def _adapter_config(peft_config: Any, spec: TrainSpec) -> dict[str, Any]:
    """adapter_config.json as PEFT would save it, with the base named so that PEFT can find it."""
    config = peft_config.to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config["inference_mode"] = True
    if spec.model.kind == "hub":
        config["base_model_name_or_path"] = spec.model.location
    return config
