"""`launch recipes new`: a short recipe for a model, a method and data, sized for a GPU's memory.

Nothing is downloaded: sizes come from the tables and headers that a plan reads.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .combinations import joins_experts
from .errors import LaunchError, RecipeError
from .known_models import find_known, nearest_models
from .memory import MemoryInputs, estimate
from .model_facts import read_facts
from .model_families import FAMILIES, Family, recipe_targets, refusals_of
from .model_layers import ModelFacts
from .model_source import SourceRef, resolve_source
from .recipe_yaml import shown
from .run_dir import file_of_the_user

METHODS = ("full", "lora", "qlora")
DEFAULT_MEMORY_GB = 24.0
MAX_LINES = 30

_LEARNING_RATES = {"full": "1e-5", "lora": "1e-4", "qlora": "2e-4"}
_RANK = 16
_LENGTHS = (2048, 1024, 512)
_MICRO_BATCHES = (8, 4, 2, 1)
_GLOBAL_BATCH = 16
_GPU_COUNTS = (1, 2, 4, 8)
_USABLE = 0.95
"""Of a card's memory: the driver and other programs keep the rest."""
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz", ".zst")
_TYPICAL_POSITIONS = 2048


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    model: str
    method: str
    data: tuple[str, ...]
    memory_gb: float
    """Of one GPU, in 2**30 bytes."""
    out: Path | None


@dataclass(frozen=True)
class Size:
    """How much a step takes at a time, and what it needs of each GPU."""

    max_length: int
    micro_batch: int
    num_gpus: int
    needs_gb: float
    """0: the model's sizes are unknown."""


@dataclass(frozen=True)
class Written:
    """The recipe that was written, and what to say of it."""

    path: Path
    text: str
    size: Size
    notes: tuple[str, ...]


def memory_here() -> float:
    """Memory of this machine's smallest GPU or slice, in 2**30 bytes; 24 where there is none."""
    from cluster.nvml import read_inventory

    return min((d.memory_total_gb for d in read_inventory().devices), default=DEFAULT_MEMORY_GB)


def write_new(wanted: Wanted) -> Written:
    """Write the recipe; it has passed every check that `launch recipes check` makes.

    Raises LaunchError for a model that is not trained or fits no GPU of this size, for data that is not there, and for a
    file that is in the way.
    """
    if wanted.method not in METHODS:
        raise LaunchError(f"--method {wanted.method}: there is no such method", f"Allowed: {', '.join(METHODS)}.")
    try:
        source = resolve_source(wanted.model, Path.cwd())
    except LaunchError as e:
        raise LaunchError(e.message.replace("model.source", "--model", 1), e.hint) from None
    facts = read_facts(source)
    if facts is not None:
        for refusal in refusals_of(facts):
            raise LaunchError(f"--model {wanted.model}: {refusal.reason}", refusal.instead)
        if facts.has_vision and wanted.method == "full":
            message = f"--method full: {wanted.model} has a vision tower, which text does not train"
            raise LaunchError(message, "Take --method lora or qlora, which adapt the decoder alone.")
    for path in wanted.data:
        _require_data(path)
    target = wanted.out or Path(f"{_slug(source)}_{wanted.method}.yaml")
    if os.path.lexists(target):
        raise LaunchError(f"already there: {shown(target)}", "Give another name with --out.")
    family = _family(source, facts)
    size = choose_size(facts, wanted, recipe_targets(family))
    text = _text(wanted, source, family, size, target)
    return Written(target, _checked(target, text), size, tuple(_notes(source, facts, size)))


def _require_data(path: str) -> None:
    if Path(path).exists() or re.search(r"[*?\[]", path) or not path.endswith(_DATA_SUFFIXES):
        return
    raise LaunchError(f"--data {path}: there is no such file", "A path in a flag starts at the current folder.")


def _slug(source: SourceRef) -> str:
    name = Path(source.location).stem if source.kind == "gguf" else source.location.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "recipe"


def _family(source: SourceRef, facts: ModelFacts | None) -> Family | None:
    known = find_known(source.location) if source.kind in ("hub", "modelscope") else None
    if known or facts is None:
        return known.family if known else None
    return next((f for f in FAMILIES.values() if f.model_type == facts.model_type), None)


def choose_size(facts: ModelFacts | None, wanted: Wanted, targets: tuple[str, ...]) -> Size:
    """The fewest GPUs, then the longest rows, then the most rows at a time that fit. Raises LaunchError when nothing does."""
    if facts is None:
        return Size(_LENGTHS[0], 1, 1, 0.0)
    budget, least = wanted.memory_gb * _USABLE, 0.0
    for inputs in _candidates(_inputs(facts, wanted.method, targets)):
        rows = inputs.max_length * inputs.micro_batch
        if 0 < facts.stretches_beyond < rows:
            continue
        needs = estimate(inputs).total_gb
        if needs <= budget:
            return Size(inputs.max_length, inputs.micro_batch, inputs.dp, needs)
        least = min(least or needs, needs)
    other = {"full": "--method lora or qlora", "lora": "--method qlora"}.get(wanted.method, "a smaller model")
    raise LaunchError(
        f"{wanted.method} does not fit GPUs with {wanted.memory_gb:g} GB, not even {_GPU_COUNTS[-1]} of them: "
        f"each needs {least:.1f} GB, and {budget:.1f} GB are for it",
        f"Take {other}, or larger GPUs: --gpu-memory {math.ceil(least / _USABLE)}.",
    )


def _candidates(base: MemoryInputs) -> Iterator[MemoryInputs]:
    longest = base.facts.max_positions or _TYPICAL_POSITIONS
    lengths = [n for n in _LENGTHS if n <= longest] or [longest]
    for gpus in _GPU_COUNTS:
        for length in lengths if gpus == 1 else lengths[:1]:
            for micro in (n for n in _MICRO_BATCHES if n * gpus <= _GLOBAL_BATCH):
                for stage in (2, 3) if gpus > 1 and not joins_experts(base.facts) else (2,):
                    yield replace(base, dp=gpus, max_length=length, micro_batch=micro, zero_stage=stage)


def _inputs(facts: ModelFacts, method: str, targets: tuple[str, ...]) -> MemoryInputs:
    full = method == "full"
    return MemoryInputs(
        facts=facts,
        kind="hub",
        method=method,
        rank=0 if full else _RANK,
        targets=() if full else targets,
        dropout=0.0,
        double_quant=method == "qlora",
        dtype="bf16",
        micro_batch=1,
        max_length=_LENGTHS[0],
        gradient_checkpointing=True,
        device="cuda",
        dp=1,
        sp=1,
        zero_stage=2,
        offload="none",
        keep=2,
        copies_checkpoint=False,
    )


def _notes(source: SourceRef, facts: ModelFacts | None, size: Size) -> Iterator[str]:
    if facts is None:
        yield f"{source.display} is not known here: sizes are a guess until it is downloaded"
        near = nearest_models(source.location)
        if near:
            yield f"known models of nearly this name: {', '.join(near)}"
    elif facts.stretches_beyond:
        yield f"rows stay within {facts.stretches_beyond} tokens: this model's rotary positions change beyond them"


def _text(wanted: Wanted, source: SourceRef, family: Family | None, size: Size, target: Path) -> str:
    name, gpus = source.location.rstrip("/").rpartition("/")[2], size.num_gpus
    devices = "0" if gpus == 1 else f"0-{gpus - 1}"
    hardware = f"{gpus} GPU{'s' * (gpus > 1)} with {wanted.memory_gb:g} GB"
    needs = f" (about {size.needs_gb:.1f} GB are needed{' on each' * (gpus > 1)})" if size.needs_gb else ""
    lines = [
        f"# {name}, {wanted.method}.",
        f"# Run:      launch {shown(target)} --gpus {devices}",
        f"# Hardware: {hardware}{needs}",
        f"model: {_quoted(_moved(wanted.model, target))}",
        *_method_lines(wanted.method, family),
        *_data_lines(wanted, source, family, size, target),
        "train:",
        "  epochs: 3",
        f"  micro_batch: {size.micro_batch}",
        f"  global_batch: {_GLOBAL_BATCH}",
        f"  learning_rate: {_LEARNING_RATES[wanted.method]}",
        "checkpoint:",
        "  every_steps: 100",
        "evaluate:",
        "  prompts:                 # asked before and after: put questions here that your data answers",
        "    - Who are you, and what can you do?",
        '    - {user: "用三句话介绍一下长城。", language: zh}',
    ]
    return "\n".join(lines) + "\n"


def _method_lines(method: str, family: Family | None) -> list[str]:
    if method == "full":
        return ["method: full"]
    targets = recipe_targets(family)
    named = [] if targets == ("all-linear",) else [f"  targets: [{', '.join(targets)}]"]
    return ["method:", f"  name: {method}", f"  rank: {_RANK}", *named]


def _data_lines(wanted: Wanted, source: SourceRef, family: Family | None, size: Size, target: Path) -> list[str]:
    paths = [_quoted(_moved(path, target)) for path in wanted.data]
    files = f"  files: {paths[0]}" if len(paths) == 1 else f"  files: [{', '.join(paths)}]"
    known = find_known(source.location) if source.kind in ("hub", "modelscope") else None
    lines = ["data:", files, f"  max_length: {size.max_length}"]
    if known and family and family.template and family.own_template == "chat" and not known.is_chat:
        lines.append(
            f"  # template: {family.template}    # a base model may bring no chat format: chat rows then need one"
        )
    return lines


def _moved(text: str, target: Path) -> str:
    """A path of the command line as the recipe at `target` writes it; what is no file stays as it is."""
    scheme, colon, rest = text.partition(":")
    prefix = "random:" if colon and scheme == "random" else ""
    path = Path(rest if prefix else text).expanduser()
    if not path.exists() or path.is_absolute():
        return text
    moved = os.path.relpath(path, target.parent)
    return f"{prefix}{moved if '/' in moved or path.is_file() else f'./{moved}'}"


def _quoted(text: str) -> str:
    return (
        text
        if re.fullmatch(r"[\w./~-][\w./:~@+-]*", text) and not text.endswith(":")
        else f"'{text.replace(chr(39), chr(39) * 2)}'"
    )


def _checked(target: Path, text: str) -> str:
    """Write `text` to `target` unless the checks of a recipe find something, which would be a mistake of ours or of the data."""
    from .recipe import load_recipe  # here: it costs pydantic
    from .recipe_model import check_model

    assert text.count("\n") <= MAX_LINES
    with file_of_the_user(target) as f:
        f.write(text)
    try:
        problems = check_model(load_recipe(target)).problems
        if problems:
            raise RecipeError(list(problems))
    except LaunchError:
        target.unlink()
        raise
    return text
