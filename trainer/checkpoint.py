"""Saving and resuming training: each rank writes the fragments it owns, and a manifest makes them a checkpoint.

Nothing is pickled. A folder without a manifest does not exist for the reader; a crash at any instant leaves the
earlier checkpoints untouched. The format is documented in checkpoint_format.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checkpoint_format import (
    Manifest,
    ShardFile,
    list_checkpoints,
    newest_verified,
    read_manifest,
    sha256_file,
    write_manifest,
)
from .engine import (
    STATES,
    Fragment,
    Ranks,
    full_shape,
    local_fragments,
    loss_scaler_state,
    optimizer_step,
    set_loss_scaler_state,
    set_optimizer_step,
    weight_slice,
)
from .model import PackedLanguageModel
from .spec import TrainError, TrainSpec


def save(engine: Any, spec: TrainSpec, ranks: Ranks, progress: dict[str, int]) -> Path:
    """Write checkpoints/step_N and prune the old ones. Collective: every rank must call.

    `progress` is kept as the manifest's `state`. Raises TrainError (exit 2) when the disk refuses; what was saved
    before is not touched.
    """
    root = Path(spec.paths.checkpoints_dir)
    final = root / f"step_{progress['step']:06d}"
    partial = root / f"{final.name}.partial"
    try:
        if ranks.rank == 0:
            # Left by a kill; each may be as large as a checkpoint.
            for remains in root.glob("*.partial"):
                shutil.rmtree(remains)
            partial.mkdir(parents=True)
        dist.barrier()
        _write_shard(engine, partial, ranks)
        dist.barrier()
        if ranks.rank == 0:
            shards = [_take_row(partial, rank) for rank in range(ranks.world_size)]
            write_manifest(partial, _manifest(engine, spec, shards, progress))
            _publish(partial, final)
            _prune(root, progress["step"], spec.checkpoint.keep)
    except (OSError, SafetensorError) as e:
        # safetensors reports a full disk as an error of its own, with the system's words in it.
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise TrainError(
            f"cannot write the checkpoint {final}: {reason}",
            "The earlier checkpoints are whole. Free some space, then: launch runs resume " + spec.run_id,
        ) from e
    dist.barrier()
    return final


def _write_shard(engine: Any, folder: Path, ranks: Ranks) -> None:
    """The rank's shard, and beside it the row that describes it.

    The row goes to rank 0 as a file: gloo copies objects of this size in threads of its own, each of which starts an
    OpenMP team, and with more threads than cores every later parallel region of the process is half as fast.
    """
    tensors: dict[str, torch.Tensor] = {"rng|torch": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        tensors["rng|cuda"] = torch.cuda.get_rng_state(ranks.device)
    fragments: dict[str, tuple[int, int]] = {}
    # Under ZeRO-0 every rank holds the same whole tensors: one copy is enough.
    writes = ranks.rank == 0 or engine.zero_optimization_stage() > 0
    for fragment in local_fragments(engine) if writes else ():
        fragments[fragment.name] = (fragment.start, fragment.numel)
        tensors |= {f"{fragment.name}|{key}": fragment.tensors[key].cpu() for key in STATES}
    path = folder / f"rank_{ranks.rank:05d}.safetensors"
    save_file(tensors, str(path))
    _fsync(path)
    row = ShardFile(path.name, ranks.rank, path.stat().st_size, sha256_file(path), fragments)
    _row_file(folder, ranks.rank).write_text(json.dumps(dataclasses.asdict(row)), encoding="utf-8")


def _row_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def _take_row(folder: Path, rank: int) -> ShardFile:
    path = _row_file(folder, rank)
    row = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return ShardFile(**{**row, "fragments": {name: tuple(place) for name, place in row["fragments"].items()}})


def _manifest(engine: Any, spec: TrainSpec, shards: list[ShardFile], progress: dict[str, int]) -> Manifest:
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
        files=tuple(shards),
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


def _publish(partial: Path, final: Path) -> None:
    if final.exists():
        # The same step saved again after a resume: the old folder goes aside first, so that one of them always exists.
        aside = final.with_name(final.name + ".old.partial")
        os.replace(final, aside)
        os.replace(partial, final)
        shutil.rmtree(aside)
    else:
        os.replace(partial, final)
    _fsync(final.parent)


def _prune(root: Path, newest_step: int, keep: int) -> None:
    """Remove all but the newest `keep`. A later step than the one just saved was skipped on resume: it counts for nothing."""
    trusted = [path for step, path in list_checkpoints(root) if step <= newest_step]
    for path in trusted[keep:]:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        dying = path.with_name(path.name + ".old.partial")
        os.replace(path, dying)
        shutil.rmtree(dying)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def find(spec: TrainSpec, ranks: Ranks) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest verified checkpoint, and the newer ones that were skipped with the reason. None: start from the base.

    Collective: every rank must call. Rank 0 reads and hashes; the others take its word, so that all agree.
    """
    answer: list[Any] = [None]
    if ranks.rank == 0:
        root = Path(spec.paths.checkpoints_dir)
        answer[0] = newest_verified(root) if root.is_dir() else (None, [])
    dist.broadcast_object_list(answer)
    return answer[0]


def load_weights(model: PackedLanguageModel, folder: Path) -> None:
    """Put the saved master weights into the model, rounded to its dtype, before the engine is built.

    Works for any number of ranks and any ZeRO stage, since fragments name the parameter and the position they hold.
    """
    manifest = read_manifest(folder)
    trainable = model.trainable()
    _check_parameters(trainable, manifest, folder)
    with torch.no_grad():
        for shard in manifest.files:
            with safe_open(str(folder / shard.file), "pt") as tensors:
                for name, held in shard.fragments.items():
                    own, first = weight_slice(trainable[name])
                    low, high = _overlap(first, own.numel(), held)
                    if low < high:
                        saved = tensors.get_tensor(f"{name}|master")[low - held[0] : high - held[0]]
                        own[low - first : high - first] = saved.to(own.dtype)


def load_optimizer(engine: Any, folder: Path, ranks: Ranks) -> None:
    """Put exact fp32 masters, moments, the update count and this rank's random state back, after the engine is built."""
    manifest = read_manifest(folder)
    with torch.no_grad():
        fragments = local_fragments(engine)
        for shard in manifest.files:
            with safe_open(str(folder / shard.file), "pt") as tensors:
                for fragment in fragments:
                    if fragment.name in shard.fragments:
                        _copy_overlap(fragment, shard.fragments[fragment.name], tensors)
    set_optimizer_step(engine, manifest.state["optimizer_step"])
    set_loss_scaler_state(engine, manifest.state["loss_scaler"])
    own = next((s for s in manifest.files if s.rank == ranks.rank), None)
    if own is not None and manifest.world_size == ranks.world_size:
        with safe_open(str(folder / own.file), "pt") as tensors:
            torch.set_rng_state(tensors.get_tensor("rng|torch"))
            if ranks.device.type == "cuda" and "rng|cuda" in tensors.keys():  # noqa: SIM118  # not a mapping
                torch.cuda.set_rng_state(tensors.get_tensor("rng|cuda"), ranks.device)


def _copy_overlap(fragment: Fragment, held: tuple[int, int], tensors: Any) -> None:
    """Copy the part of the saved slice `held` (start, numel) that lies within the fragment."""
    low, high = _overlap(fragment.start, fragment.numel, held)
    if low >= high:
        return
    for key in STATES:
        piece = tensors.get_tensor(f"{fragment.name}|{key}")[low - held[0] : high - held[0]]
        fragment.tensors[key][low - fragment.start : high - fragment.start].copy_(piece)


def _overlap(start: int, numel: int, held: tuple[int, int]) -> tuple[int, int]:
    """First element, and the one after the last, that two slices of a parameter share; nothing when low >= high."""
    return max(start, held[0]), min(start + numel, held[0] + held[1])


def _check_parameters(trainable: dict[str, Any], manifest: Manifest, folder: Path) -> None:
    shapes = {name: full_shape(p) for name, p in trainable.items()}
    if shapes != manifest.parameters:
        different = [n for n in {*shapes, *manifest.parameters} if shapes.get(n) != manifest.parameters.get(n)]
        raise TrainError(
            f"{folder} holds other weights than this recipe trains ({len(different)} differ, such as {min(different)})",
            "Resume with the recipe that wrote it (model, method, rank and targets must be the same).",
        )
