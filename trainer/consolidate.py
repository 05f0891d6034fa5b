"""Stage `consolidate`: a training checkpoint -> a PEFT adapter folder, or a full Hugging Face model folder.

The checkpoint may be ours, or one that DeepSpeed wrote for another program (`deepspeed_folder`). Only the fp32 masters
are read, piece by piece, rounded once and written. No torch: importing it alone would take longer than the work.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import re
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
from .disk import new_folder, refuse_existing, require_space, write_json, write_text
from .foreign import ForeignCheckpoint, Given, Slice
from .foreign_sources import find, inside_ray
from .model_folder import OWN_TEMPLATE, copy_companions, read_config, stored_tensors, write_config
from .spec import TrainError
from .tensor_files import (
    CHUNK,
    INDEX,
    STORED_DTYPES,
    WEIGHTS,
    SafetensorsWriter,
    Shard,
    StoredTensor,
    TensorFile,
    all_finite,
    from_float32,
    in_order,
    parse_size,
    plan_shards,
    read_as,
    to_float32,
    write_index,
)
from .tensor_header import TensorSpec
from .torch_archive import ArchiveTensor

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
REPORT = "consolidation.json"
HEADS = ("lm_head.weight", "embed_out.weight")


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
        for note in foreign.notes:
            print(note, flush=True)
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


@dataclass(frozen=True)
class Plan:
    """What will be written, all checked."""

    step_dir: Path
    manifest: Manifest
    dtype: str
    """As stored: BF16, F16 or F32."""
    shards: list[Shard]
    parameters: dict[str, str]
    """Written name -> trained parameter."""
    untrained: dict[str, StoredTensor]
    """Written name -> tensor of the base, for what a full model has and training did not touch."""
    base: Path | None
    config: dict[str, Any]
    """config.json of the base, or adapter_config.json."""
    slices: dict[str, list[Slice]] | None = None
    """Where a foreign checkpoint keeps the trained parameters; None: in our own shards."""


def make_plan(
    step_dir: Path, dtype: str | None, base: Path | None, max_bytes: int, foreign: ForeignCheckpoint | None = None
) -> Plan:
    """Names, shapes and files of the result. Raises TrainError when they do not fit together."""
    if foreign is not None:
        plan = _make_plan(step_dir, foreign.manifest, dtype, foreign.base, max_bytes)
        lost = [name for name in foreign.frozen if name not in plan.untrained]
        # A tied head counts among the frozen where the embedding is.
        if any(not name.endswith(HEADS) for name in lost):
            raise TrainError(
                f"{len(lost)} weights were not trained and are not in the shards, such as {lost[0]}",
                "Give the folder of the model that training began with: --base FOLDER.",
            )
        return dataclasses.replace(plan, slices=foreign.slices)
    return _make_plan(step_dir, read_manifest(step_dir), dtype, base, max_bytes)


def _make_plan(step_dir: Path, manifest: Manifest, dtype: str | None, base: Path | None, max_bytes: int) -> Plan:
    stored = STORED_DTYPES[dtype or manifest.dtype]
    if not manifest.parameters:
        raise TrainError(f"{step_dir / MANIFEST}: lists no parameters")
    if manifest.method == "full":
        return _plan_model(step_dir, manifest, stored, base, max_bytes)
    config = dict(manifest.adapter_config or {})
    if config.get("peft_type") != "LORA":
        raise TrainError(
            f"{step_dir / MANIFEST}: adapter_config.peft_type is {config.get('peft_type')!r}, expected 'LORA'"
        )
    config["inference_mode"] = True
    if base is not None and not config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = str(base)
    parameters = {adapter_name(name): name for name in manifest.parameters}
    if len(parameters) != len(manifest.parameters):
        raise TrainError(f"{step_dir / MANIFEST}: two parameters have the same name in an adapter file")
    _check_pairs(step_dir, {name: manifest.parameters[p] for name, p in parameters.items()})
    # Sorted, as the safetensors library writes them: the file is then byte for byte what save_pretrained() gives.
    tensors = tuple(TensorSpec(name, stored, manifest.parameters[parameters[name]]) for name in sorted(parameters))
    return Plan(step_dir, manifest, stored, [Shard(ADAPTER_WEIGHTS, tensors)], parameters, {}, base, config)


def adapter_name(parameter: str) -> str:
    """The name in an adapter file of a parameter of a PeftModel (peft: get_peft_model_state_dict). Raises TrainError."""
    for pattern in (
        r"(base_model\.model\..+\.lora_[AB])(?:\.default)?(\.weight)",
        r"(base_model\.model\..+\.lora_embedding_[AB])(?:\.default)?()",
        r"(base_model\.model\..+\.lora_magnitude_vector)(?:\.default)?(?:\.weight)?()",
        r"(base_model\.model\..+)\.modules_to_save(?:\.default)?(\..+)",
    ):
        if match := re.fullmatch(pattern, parameter):
            return match[1] + match[2]
    raise TrainError(
        f"{parameter!r} is trained, but no adapter file can hold it", "Train LoRA matrices only, or use method: full."
    )


def _check_pairs(step_dir: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    problems = []
    for name, shape in shapes.items():
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other == name:
            continue
        if other not in shapes:
            problems.append(f"{name} has no {other}")
        elif ".lora_A." in name and not (len(shape) == 2 == len(shapes[other]) and shape[0] == shapes[other][1]):
            problems.append(f"{name} {list(shape)} and lora_B {list(shapes[other])} have no common rank")
    if problems:
        raise TrainError(f"{step_dir / MANIFEST}: " + "\n".join(problems))


def _plan_model(step_dir: Path, manifest: Manifest, stored: str, base: Path | None, max_bytes: int) -> Plan:
    if base is None and Path(manifest.base_model).is_dir():
        base = Path(manifest.base_model).absolute()
    if base is None:
        raise TrainError(
            "the base model folder is not known", "A full model needs its config and tokenizer: give --base FOLDER."
        )
    config = read_config(base)
    held = stored_tensors(base) if (base / WEIGHTS).is_file() or (base / INDEX).is_file() else {}
    _check_same_model(manifest, held, base)
    untrained = {name: tensor for name, tensor in held.items() if name not in manifest.parameters}
    for head in [name for name in untrained if name.endswith(HEADS)]:
        # Full training trains every weight, so a head that was not trained is the input embedding under a second name.
        if config.get("tie_word_embeddings") is False:
            raise TrainError(f"{head} was not trained, but {base / 'config.json'} says it is a weight of its own")
        del untrained[head]
    tensors = [TensorSpec(name, stored, shape) for name, shape in manifest.parameters.items()]
    tensors += [TensorSpec(n, stored if t.is_float else t.entry.dtype, t.entry.shape) for n, t in untrained.items()]
    parameters = {name: name for name in manifest.parameters}
    return Plan(step_dir, manifest, stored, plan_shards(tensors, max_bytes), parameters, untrained, base, config)


def _check_same_model(manifest: Manifest, held: dict[str, StoredTensor], base: Path) -> None:
    """`held` is empty for a base without weights (trained from random ones): then there is nothing to compare."""
    if not held:
        return
    problems = [f"{name} is not in the base" for name in manifest.parameters if name not in held]
    for name, shape in manifest.parameters.items():
        if name in held and held[name].entry.shape != shape:
            problems.append(f"{name} is {list(shape)}, in the base {list(held[name].entry.shape)}")
    if problems:
        shown = "\n".join(problems[:10]) + (f"\nand {len(problems) - 10} more" if len(problems) > 10 else "")
        raise TrainError(f"{base} is not the model that was trained\n{shown}", "Give its folder by --base.")


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
