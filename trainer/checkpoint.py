"""Resuming training from a checkpoint: finding the newest whole one, and reading it into any layout of ranks.

Nothing is unpickled. A folder without a manifest does not exist for the reader. `saver` writes what is read here; the
format is documented in checkpoint_format.py.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from .checkpoint_format import Manifest, newest_verified, read_manifest
from .engine import (
    STATES,
    Fragment,
    Ranks,
    full_shape,
    local_fragments,
    set_loss_scaler_state,
    set_optimizer_step,
    weight_slice,
)
from .model import PackedLanguageModel
from .spec import TrainError, TrainSpec


def find(spec: TrainSpec, ranks: Ranks) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest verified checkpoint, and the newer ones that were skipped with the reason. None: start from the base.

    Collective: every rank must call. Rank 0 reads and hashes; the others take its word, so that all agree.
    """
    answer: list[Any] = [None]
    if ranks.rank == 0:
        root = Path(spec.paths.checkpoints_dir)
        answer[0] = newest_verified(root) if root.is_dir() else (None, [])
        for damaged, _ in answer[0][1]:
            # Out of the way of `checkpoint.keep`: it must not take the place of a whole one.
            with contextlib.suppress(OSError):
                os.rename(damaged, damaged.with_name(f"{damaged.name}.damaged"))
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
