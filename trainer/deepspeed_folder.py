"""Checkpoints that DeepSpeed wrote for other programs: HF Trainer, LLaMA-Factory, Axolotl, XTuner.

    checkpoint-200/                            of HF Trainer and what rides on it; `iter_200.pth/` of XTuner has the
        latest                                 files of global_step200 in itself
        adapter_config.json | config.json
        global_step200/
            [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt      fp32 masters of rank R, flat, with the optimizer's state
            mp_rank_00_model_states.pt         stages 1 and 2; for stage 3 zero_pp_rank_R_mp_rank_00_model_states.pt:
                                               names and shapes in the order of the flat masters

What lies where in the flat masters is that of deepspeed/utils/zero_to_fp32.py. Only the masters are read.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .foreign import ForeignCheckpoint, Given, Known, Slice, common_dtype, describe, home_of, program_of
from .spec import TrainError
from .torch_archive import ArchiveTensor, read_archive

OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILE = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_00_model_states\.pt")
TRAINER_FOLDER = re.compile(r"(?:checkpoint-|iter_|epoch_)(\d+)(?:\.pth)?")


def find_shards(source: Path, step: int | None) -> Path | None:
    """The folder of shards in `source`, a checkpoint or a folder of checkpoints; None when DeepSpeed wrote nothing here.

    Raises TrainError when `step` is not there.
    """
    if not source.is_dir():
        return None
    if shards := _shards_of(source, step):
        return shards
    found = {
        int(m[1]): path for path in source.iterdir() if (m := TRAINER_FOLDER.fullmatch(path.name)) and path.is_dir()
    }
    steps = {number: shards for number, path in sorted(found.items()) if (shards := _shards_of(path, None))}
    if not steps:
        return None
    if step is not None and step not in steps:
        raise TrainError(f"{source} holds no step {step}", f"Steps: {', '.join(map(str, steps))}")
    return steps[max(steps) if step is None else step]


def _shards_of(folder: Path, step: int | None) -> Path | None:
    tags = {path.name: path for path in folder.glob("global_step*") if _has_shards(path)}
    if step is not None and tags:
        if f"global_step{step}" not in tags:
            raise TrainError(f"{folder} holds no step {step}", f"There are: {', '.join(sorted(tags))}")
        return tags[f"global_step{step}"]
    latest = folder / "latest"
    candidates = [folder]
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()[:200]
        if Path(tag).name != tag or tag == "..":
            raise TrainError(f"{latest}: names {tag!r}, which is no folder beside it")
        candidates.append(folder / tag)
    candidates += sorted(tags.values(), key=lambda p: int("0" + re.sub(r"\D", "", p.name)), reverse=True)
    return next((candidate for candidate in candidates if _has_shards(candidate)), None)


def _has_shards(folder: Path) -> bool:
    return folder.is_dir() and any(OPTIMIZER_FILE.fullmatch(path.name) for path in folder.iterdir())


def read(shards: Path, given: Given) -> ForeignCheckpoint:
    """Describe the checkpoint in `shards`.

    Raises TrainError when a rank's file is missing, holds something else, or another layout than ZeRO-1, 2 or 3.
    """
    files = _optimizer_files(shards)
    states = [_dictionary(read_archive(path), path) for path in files]
    optimizers = [
        _dictionary(state.get("optimizer_state_dict"), path) for state, path in zip(states, files, strict=True)
    ]
    model_file = _model_file(shards)
    model = _dictionary(read_archive(model_file), model_file)
    groups = _parameter_groups(model, model_file)
    stage = _stage(optimizers, files)
    _check_count(optimizers, files)
    slices = _sharded_whole(groups, optimizers, files) if stage == 3 else _grouped(groups, optimizers, files)
    frozen = model.get("frozen_param_shapes")
    return describe(
        slices,
        {name: shape for group in groups for name, shape in group.items()},
        _dtype(model, groups),
        Known(given, home_of(shards, shards.parent), program_of(model)),
        step=_number(model.get("global_steps")),
        stage=stage,
        world_size=len(files),
        frozen=[str(name) for name in frozen] if isinstance(frozen, dict) else [],
    )


def _dictionary(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TrainError(f"{path}: holds a {type(value).__name__} where DeepSpeed keeps a dictionary")
    return value


def _optimizer_files(shards: Path) -> list[Path]:
    found = {}
    for path in shards.iterdir():
        if match := OPTIMIZER_FILE.fullmatch(path.name):
            if int(match[2]) > 0:
                raise TrainError(f"{path}: tensor or pipeline parallel checkpoints are not read", "Merge them first.")
            found[int(match[1])] = path
        elif "expp_rank" in path.name or path.name.startswith("layer_"):
            raise TrainError(f"{path}: expert and pipeline parallel checkpoints are not read")
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise TrainError(
            f"{shards}: the file of rank {missing[0]} is missing (*zero_pp_rank_{missing[0]}_*_optim_states.pt)"
        )
    return [found[rank] for rank in sorted(found)]


def _model_file(shards: Path) -> Path:
    found = sorted(p for p in shards.iterdir() if MODEL_FILE.fullmatch(p.name))
    if not found:
        raise TrainError(f"{shards}: *mp_rank_00_model_states.pt is missing: it has the names of the weights")
    return found[0]


def _parameter_groups(model: dict[str, Any], path: Path) -> list[dict[str, tuple[int, ...]]]:
    groups = model.get("param_shapes")
    groups = [groups] if isinstance(groups, dict) else groups
    if not isinstance(groups, list) or not groups or not all(isinstance(g, dict) for g in groups):
        raise TrainError(f"{path}: has no param_shapes: a file of another program, or of ZeRO stage 0")
    if not all(isinstance(s, tuple) and all(type(n) is int for n in s) for group in groups for s in group.values()):
        raise TrainError(f"{path}: param_shapes are not shapes")
    shapes = [{str(name): shape for name, shape in group.items()} for group in groups]
    empty = [name for group in shapes for name, shape in group.items() if math.prod(shape) == 0]
    if empty:
        raise TrainError(f"{path}: {empty[0]} has no elements")
    return shapes


def _stage(optimizers: Sequence[dict[str, Any]], files: Sequence[Path]) -> int:
    for optimizer, path in zip(optimizers, files, strict=True):
        if ("fp32_flat_groups" in optimizer) == ("single_partition_of_fp32_groups" in optimizer):
            raise TrainError(f"{path}: has no fp32 masters of ZeRO-1, 2 or 3")
    return 3 if "fp32_flat_groups" in optimizers[0] else _number(optimizers[0].get("zero_stage")) or 2


def _number(value: Any) -> int:
    """A count, 0 where there is none."""
    return value if type(value) is int and value > 0 else 0


def _check_count(optimizers: Sequence[dict[str, Any]], files: Sequence[Path]) -> None:
    count = optimizers[0].get("partition_count")
    count = count[0] if isinstance(count, list) and count else count
    if _number(count) not in (0, len(files)):
        raise TrainError(f"{files[0].parent}: was written by {count} ranks, the files of {len(files)} are here")


def _flat(optimizer: dict[str, Any], key: str, path: Path) -> list[ArchiveTensor]:
    value = optimizer[key]
    tensors = list(value) if isinstance(value, list | tuple) else [value]
    for tensor in tensors:
        if not isinstance(tensor, ArchiveTensor) or tensor.dtype != "F32" or not tensor.is_contiguous:
            raise TrainError(f"{path}: {key} are not flat fp32 tensors")
    return tensors


def _grouped(
    groups: Sequence[dict[str, tuple[int, ...]]], optimizers: Sequence[dict[str, Any]], files: Sequence[Path]
) -> dict[str, list[Slice]]:
    """Stages 1 and 2: the parameters of a group end to end, cut into as many pieces as there are ranks."""
    key = "single_partition_of_fp32_groups"
    flats = [_flat(optimizer, key, path) for optimizer, path in zip(optimizers, files, strict=True)]
    slices: dict[str, list[Slice]] = {}
    for number, group in enumerate(groups):
        if any(len(flat) <= number for flat in flats):
            raise TrainError(f"{files[0].parent}: has fewer groups of masters than of parameters")
        parts = [flat[number] for flat in flats]
        # zero_optimization.parameter_alignment: room behind each parameter.
        paddings = optimizers[0].get("param_alignment_paddings")
        room = paddings[number] if isinstance(paddings, list) and number < len(paddings) else [0] * len(group)
        if not isinstance(room, list) or len(room) != len(group) or not all(type(n) is int and n >= 0 for n in room):
            raise TrainError(f"{files[0]}: param_alignment_paddings {reprlib.repr(room)}")
        at = 0
        for (name, shape), padding in zip(group.items(), room, strict=True):
            slices[name] = _cut(parts, at, math.prod(shape), name, files[0].parent)
            at += math.prod(shape) + padding
        _check_used(at, sum(part.numel for part in parts), len(parts), files[0].parent)
    return slices


def _check_used(at: int, held: int, num_ranks: int, folder: Path) -> None:
    """Both rounded up as DeepSpeed does (2 x ranks): what is left over would mean another layout."""
    align = 2 * num_ranks
    if -(-at // align) != -(-held // align):
        raise TrainError(
            f"{folder}: the masters hold {held} elements, the parameters {at}: another layout than is known"
        )


def _sharded_whole(
    groups: Sequence[dict[str, tuple[int, ...]]], optimizers: Sequence[dict[str, Any]], files: Sequence[Path]
) -> dict[str, list[Slice]]:
    """Stage 3: every parameter cut into one piece a rank, the last ones padded; a rank's pieces end to end."""
    flats = [_flat(optimizer, "fp32_flat_groups", path) for optimizer, path in zip(optimizers, files, strict=True)]
    slices: dict[str, list[Slice]] = {}
    at = 0
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        numel = math.prod(shape)
        share = -(-numel // len(flats))
        pieces: list[Slice] = []
        for rank, parts in enumerate(flats):
            held = min(share, numel - rank * share)
            if held > 0:
                pieces += [(rank * share + f, t, a, n) for f, t, a, n in _cut(parts, at, held, name, files[0].parent)]
        slices[name] = pieces
        at += share
    for parts in flats:
        _check_used(at, sum(part.numel for part in parts), len(flats), files[0].parent)
    return slices


def _cut(parts: Sequence[ArchiveTensor], at: int, numel: int, name: str, folder: Path) -> list[Slice]:
    """`numel` elements from element `at` of `parts` laid end to end."""
    pieces: list[Slice] = []
    done = begin = 0
    for part in parts:
        low, high = max(at + done - begin, 0), min(at + numel - begin, part.numel)
        if low < high:
            pieces.append((done, part, low, high - low))
            done += high - low
        begin += part.numel
    if done != numel:
        raise TrainError(f"{folder}: {name} has {numel} elements, the masters hold {done} of them")
    return pieces


def _dtype(model: dict[str, Any], groups: Sequence[dict[str, tuple[int, ...]]]) -> str:
    """What the masters were rounded to in the forward pass."""
    module = model.get("module")
    tensors = module if isinstance(module, dict) else {}
    return common_dtype(t for name in groups[0] if isinstance(t := tensors.get(name), ArchiveTensor))
