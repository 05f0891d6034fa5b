"""Which checkpoint a path means, among all that other programs leave behind; and the reader for it.

| what | where the weights are |
|---|---|
| HF Trainer, LLaMA-Factory, Axolotl on DeepSpeed | `checkpoint-N/global_stepN/*_optim_states.pt` |
| XTuner on DeepSpeed, without it | `iter_N.pth/*_optim_states.pt`, the file `iter_N.pth` |
| FSDP by accelerate | `checkpoint-N/pytorch_model_fsdp_0/.metadata`, `checkpoint-N/pytorch_model_fsdp.bin` |
| torch.distributed.checkpoint | `.metadata` in the folder, or in `step-N` of it |
| Ray Train | any of these in `checkpoint_*/`, or in `checkpoint_*/checkpoint/` |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from . import dcp_folder, deepspeed_folder, state_file
from .checkpoint_format import MANIFEST, list_checkpoints
from .deepspeed_folder import find_shards
from .foreign import ForeignCheckpoint, Given, step_in_name
from .model_folder import ADAPTER_WEIGHTS
from .spec import TrainError
from .tensor_files import INDEX, WEIGHTS

RAY_FOLDER = re.compile(r"checkpoint_[\w.-]+")
"""Ray Train 2.60 names them by time; versions before by number."""
FSDP_FOLDER = "pytorch_model_fsdp_0"
STATE_FILES = ("pytorch_model_fsdp.bin", "pytorch_model.bin")
STEP_FOLDER = re.compile(r"(checkpoint-|iter_|epoch_|step-|step_)\d+(\.pth)?")
FINISHED = {ADAPTER_WEIGHTS: "an adapter", WEIGHTS: "a model", INDEX: "a model"}

Reader = Callable[[Path, Given], ForeignCheckpoint]


def inside_ray(source: Path, step: int | None) -> Path:
    """What Ray Train stored, for the folder of a Ray run or one of its checkpoints; any other path as it is.

    The newest, or the newest that holds `step`. Raises TrainError when none does.
    """
    if not source.is_dir() or _is_checkpoint(source):
        return source
    stored = [path for path in source.iterdir() if RAY_FOLDER.fullmatch(path.name) and path.is_dir()]
    stored = sorted((_unpacked(path) for path in stored), key=str, reverse=True)
    if not stored:
        return _unpacked(source)
    if step is None:
        return stored[0]
    steps = {number: path for path in reversed(stored) for number in _steps_of(path)}
    if step not in steps:
        raise TrainError(f"{source} holds no step {step}", f"Steps: {', '.join(map(str, sorted(steps)))}")
    return steps[step]


def _unpacked(folder: Path) -> Path:
    """RayTrainReportCallback of Ray copies HF Trainer's folder into one named `checkpoint`."""
    inner = folder / "checkpoint"
    return inner if inner.is_dir() and not _is_checkpoint(folder) else folder


def _is_checkpoint(folder: Path) -> bool:
    is_ours = (folder / MANIFEST).is_file() or bool(list_checkpoints(folder))
    return is_ours or find_shards(folder, None) is not None or next(_candidates(folder), None) is not None


def _steps_of(folder: Path) -> list[int]:
    ours = [step for step, _ in list_checkpoints(folder)]
    theirs = [step_in_name(path) for path in (folder, *folder.iterdir())]
    return ours or [step for step in theirs if step]


def find(source: Path, step: int | None) -> tuple[Path, Reader] | None:
    """The folder or file of the weights, and what reads it; None when nothing that is known lies there.

    Raises TrainError when `step` is not there, or the source is finished already.
    """
    if source.is_file():
        if source.suffix in state_file.SUFFIXES:
            return source, state_file.read
        raise TrainError(
            f"{source} is a file", f"Give a folder, or a file of torch.save: {', '.join(state_file.SUFFIXES)}."
        )
    if not source.is_dir():
        return None
    if shards := find_shards(source, step):
        return shards, deepspeed_folder.read
    found = next(_candidates(source), None)
    if found is None:
        steps = {step_in_name(path): path for path in source.iterdir() if STEP_FOLDER.fullmatch(path.name)}
        steps = {number: path for number, path in steps.items() if path.is_file() or next(_candidates(path), None)}
        if not steps:
            finished = [path for path in source.iterdir() if STEP_FOLDER.fullmatch(path.name)]
            for folder in (source, *sorted(finished, key=step_in_name, reverse=True)):
                _refuse_finished(folder)
            return None
        if step is not None and step not in steps:
            raise TrainError(f"{source} holds no step {step}", f"Steps: {', '.join(map(str, sorted(steps)))}")
        chosen = steps[max(steps) if step is None else step]
        return (chosen, state_file.read) if chosen.is_file() else next(_candidates(chosen))
    return found


def _candidates(folder: Path) -> Iterator[tuple[Path, Reader]]:
    """Weights that lie in this folder itself, in other forms than DeepSpeed's shards, the best first."""
    for inner in (folder, folder / FSDP_FOLDER):
        if (inner / dcp_folder.METADATA).is_file():
            yield inner, dcp_folder.read
    for name in STATE_FILES:
        if (folder / name).is_file():
            yield folder / name, state_file.read


def _refuse_finished(source: Path) -> None:
    for name, what in FINISHED.items():
        if (source / name).is_file():
            raise TrainError(
                f"{source} holds {what} already ({name})",
                "There is nothing to consolidate"
                + (f": launch merge {source}" if what == "an adapter" else "; it loads as it is")
                + ".",
            )
