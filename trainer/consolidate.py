"""Stage `consolidate`: a training checkpoint -> a PEFT adapter folder, or a full Hugging Face model folder.

The checkpoint may be ours, or one that DeepSpeed wrote for another program (`deepspeed_folder`). Only the fp32 masters
are read, piece by piece, rounded once and written. No torch: importing it alone would take longer than the work.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint_format import (
    DTYPES,
    MANIFEST,
    Manifest,
    list_checkpoints,
    newest_verified,
    num_threads,
    read_manifest,
    verify,
)
from .consolidate_plan import Plan, make_plan
from .disk import new_folder, refuse_existing, require_space, write_json, write_text
from .foreign import Given, step_in_name
from .foreign_sources import find, inside_ray
from .model_folder import ADAPTER_CONFIG, OWN_TEMPLATE, copy_companions, write_config
from .spec import TrainError
from .tensor_files import (
    CHUNK,
    NUMPY_DTYPES,
    SafetensorsWriter,
    Shard,
    TensorFile,
    all_finite,
    from_float32,
    in_order,
    parse_size,
    read_as,
    to_float32,
    write_index,
)
from .tensor_header import TensorSpec
from .torch_archive import ArchiveTensor

REPORT = "consolidation.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker consolidate`."""
    parser.add_argument("--source", required=True, help="folder of checkpoints, or one of them")
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the result; default: as trained")
    parser.add_argument("--step", type=int, help="take this step; default: the newest whole checkpoint")
    parser.add_argument("--base", help="base model folder; needed after full training, for config and tokenizer")
    parser.add_argument("--template", default=OWN_TEMPLATE, help="Jinja chat template to put in place of the base's")
    parser.add_argument("--lora-alpha", type=float, help="of a foreign adapter without adapter_config.json")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of a full model, such as 5GB or 2GiB")


def run(args: argparse.Namespace) -> None:
    """Raises TrainError; then nothing was published."""
    started = time.perf_counter()
    if args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
        raise TrainError(f"--lora-alpha {args.lora_alpha}: expected a number above 0")
    out = Path(args.out).absolute()
    refuse_existing(out)
    max_bytes = parse_size(args.max_shard_size)
    source, base = Path(args.source).absolute(), Path(args.base).absolute() if args.base else None
    foreign = None
    source = inside_ray(source, args.step)
    if not (source / MANIFEST).is_file() and not list_checkpoints(source):
        found = find(source, args.step)
        if found is None:
            raise TrainError(
                f"{source} holds no checkpoint",
                "Give the checkpoints folder of a run that saved at least once, or what DeepSpeed, FSDP, XTuner or Ray left.",
            )
        step_dir, read = found
        foreign = read(step_dir, Given(args.lora_alpha, base))
        # XTuner names its folders by iterations, of which an optimizer step may take several.
        named = (step_in_name(step_dir), step_in_name(step_dir.parent))
        if args.step not in (None, foreign.manifest.step, *named):
            raise TrainError(f"{step_dir} is of step {foreign.manifest.step}, not {args.step}", "Leave --step out.")
        for note in foreign.notes:
            print(note, flush=True)
    elif args.lora_alpha is not None:
        raise TrainError(
            "--lora-alpha is for adapters of other programs; this checkpoint says its own", "Leave --lora-alpha out."
        )
    else:
        step_dir, skipped = choose_checkpoint(source, args.step)
        for path, reason in skipped:
            print(f"skipped {path}: {reason}", flush=True)
    plan = make_plan(step_dir, args.dtype, base, max_bytes, foreign)
    report = write(plan, out, args.template)
    seconds = time.perf_counter() - started
    print(
        f"consolidated step {report['step']} ({report['method']}) -> {out}: {report['tensors']} tensors, "
        f"{report['bytes'] / 1e6:.1f} MB {report['dtype']}, {seconds:.2f} s",
        flush=True,
    )


def choose_checkpoint(source: Path, step: int | None) -> tuple[Path, list[tuple[Path, str]]]:
    """The verified checkpoint to use, and the newer ones that were skipped, each with the reason. Raises TrainError."""
    if (source / MANIFEST).is_file():
        if step is not None and read_manifest(source).step != step:
            raise TrainError(f"{source} is of step {read_manifest(source).step}, not {step}", "Give its parent folder.")
        return _trusted(source), []
    steps = dict(list_checkpoints(source))
    if step is not None:
        if step not in steps:
            raise TrainError(f"{source} holds no step {step}", f"Steps: {', '.join(map(str, sorted(steps)))}")
        return _trusted(steps[step]), []
    chosen, skipped = newest_verified(source)
    if chosen is None:
        reasons = "\n".join(f"{path.name}: {reason}" for path, reason in skipped)
        raise TrainError(f"no checkpoint of {source} is whole\n{reasons}", "Train again, or restore the files.")
    return chosen, skipped


def _trusted(step_dir: Path) -> Path:
    problems = verify(step_dir)
    if problems:
        raise TrainError("\n".join(problems), "Use another step, or restore the files.")
    return step_dir


def write(plan: Plan, out: Path, template: str = OWN_TEMPLATE) -> dict[str, Any]:
    """Write the folder, checking every value on its way. Returns the content of consolidation.json. Raises TrainError."""
    learned: dict[str, bool] = {}
    hashes: dict[str, str] = {}
    require_space(out, sum(tensor.nbytes for shard in plan.shards for tensor in shard.tensors))
    with new_folder(out) as folder:
        with contextlib.ExitStack() as stack:
            pieces = _pieces(plan, stack)
            kept = {tensor.path for tensor in plan.untrained.values()}
            files = {path: stack.enter_context(TensorFile(path)) for path in kept}
            pool = stack.enter_context(ThreadPoolExecutor(num_threads()))
            for shard in plan.shards:
                with SafetensorsWriter(folder / shard.file, shard.tensors, hashed=True) as writer:
                    # Over all tensors at once: a pause at the end of each would leave the processor idle.
                    for name, values, moved in in_order(pool, _Work.done, _work(plan, shard, pieces, files)):
                        writer.write(name, values)
                        if ".lora_B." in name:
                            learned[name] = learned.get(name, False) or moved
                hashes[shard.file] = writer.sha256()
        _check_learned(plan.manifest, learned)
        if plan.manifest.method == "full":
            assert plan.base is not None
            write_index(folder, plan.shards)
            write_config(plan.config, folder, plan.dtype)
            copy_companions(plan.base, folder, template)
        else:
            write_text(folder / ADAPTER_CONFIG, json.dumps(plan.config, indent=2, sort_keys=True, ensure_ascii=False))
        report = _report(plan, hashes)
        write_json(folder / REPORT, report)
    return report


Piece = tuple[int, int, Callable[[int, int], np.ndarray]]
"""First element of the parameter, number of elements, and how to read (from, how many) of these."""


def _pieces(plan: Plan, stack: contextlib.ExitStack) -> dict[str, list[Piece]]:
    """Where each parameter's elements are, in order."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for name, slices in (plan.slices or {}).items():
        for start, tensor, at, numel in slices:
            pieces[name].append((start, numel, functools.partial(_read_from, tensor, at)))
    for shard in plan.manifest.files:
        file = stack.enter_context(TensorFile(plan.step_dir / shard.file))
        for name, (start, numel) in shard.fragments.items():
            pieces[name].append((start, numel, functools.partial(file.read, f"{name}|master")))
    return {name: sorted(each, key=lambda piece: piece[0]) for name, each in pieces.items()}


def _read_from(tensor: ArchiveTensor, at: int, start: int, numel: int) -> np.ndarray:
    return to_float32(tensor.read(at + start, numel), tensor.dtype)


@dataclass(frozen=True)
class _Work:
    """Some elements of one tensor, from where they lie to how they are written."""

    tensor: TensorSpec
    read: Callable[[int, int], np.ndarray]
    start: int
    numel: int
    parameter: str | None
    """Name of the trained parameter, whose values are fp32; None for a tensor of the base, which is copied as it is stored."""
    plan: Plan

    def done(self) -> tuple[str, np.ndarray, bool]:
        """(Tensor, its elements as stored, whether one of them is not zero)."""
        values = self.read(self.start, self.numel)
        if self.parameter is None:
            return self.tensor.name, values, False
        rounded = from_float32(values, self.tensor.dtype)
        if not all_finite(rounded, self.tensor.dtype):
            raise _not_finite(self.parameter, values, self.plan)
        return self.tensor.name, rounded, ".lora_B." in self.tensor.name and bool(values.any())


def _work(plan: Plan, shard: Shard, pieces: dict[str, list[Piece]], files: dict[Path, TensorFile]) -> Iterator[_Work]:
    """All of a file, in order."""
    for tensor in shard.tensors:
        parameter = plan.parameters.get(tensor.name)
        if parameter is not None:
            places = pieces[parameter]
        else:
            kept = plan.untrained[tensor.name]
            read: Callable[[int, int], np.ndarray] = functools.partial(files[kept.path].read, tensor.name)
            if kept.entry.dtype not in NUMPY_DTYPES:
                raise TrainError(
                    f"{kept.path}: {tensor.name} is {kept.entry.dtype}", "Give a base in bf16, fp16 or fp32."
                )
            if kept.entry.dtype != tensor.dtype:
                read = functools.partial(read_as, files[kept.path], tensor.name, tensor.dtype)
            places = [(0, kept.entry.numel, read)]
        for _, numel, read in places:
            for start in range(0, numel, CHUNK):
                yield _Work(tensor, read, start, min(CHUNK, numel - start), parameter, plan)


def _not_finite(parameter: str, master: np.ndarray, plan: Plan) -> TrainError:
    if np.isfinite(master).all():
        return TrainError(
            f"{parameter} holds {np.abs(master).max():g}, which {plan.dtype} cannot hold", "Use --dtype bf16 or fp32."
        )
    return TrainError(
        f"{plan.step_dir}: {parameter} holds NaN or infinity: training diverged",
        "Take an earlier checkpoint by --step N, and train with a lower learning rate.",
    )


def _check_learned(manifest: Manifest, learned: dict[str, bool]) -> None:
    """A LoRA update starts at zero and the first optimizer step moves it, so zero after a step is a failure."""
    if learned and not any(learned.values()) and manifest.step > 0:
        raise TrainError(
            f"nothing was learned: every lora_B is zero after {manifest.step} steps",
            "Check that the learning rate is not 0, that rows have supervised tokens, and that gradients reach the adapters.",
        )


def _report(plan: Plan, hashes: dict[str, str]) -> dict[str, Any]:
    manifest = plan.manifest
    return {
        "format": "tunelaunch-consolidation-1",
        "run_id": manifest.run_id,
        "step": manifest.step,
        "method": manifest.method,
        "base_model": manifest.base_model,
        "checkpoint": str(plan.step_dir),
        "dtype": plan.dtype,
        "tensors": sum(len(shard.tensors) for shard in plan.shards),
        "parameters": sum(math.prod(tensor.shape) for shard in plan.shards for tensor in shard.tensors),
        "bytes": sum(tensor.nbytes for shard in plan.shards for tensor in shard.tensors),
        "sha256": hashes,
    }
