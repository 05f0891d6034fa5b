"""A LoRA adapter folder, as PEFT saves it: what it does to which weight of the base. No torch.

The update of one weight is scaling * B @ A (https://arxiv.org/abs/2106.09685, section 4.1); with DoRA each output is then
scaled to a learnt length (https://arxiv.org/abs/2402.09353, equation 5). Weights that were trained whole stand in the file
as they are. Whatever else PEFT can put into an adapter changes these formulas, and is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .disk import read_json
from .expert_layers import adapted_parameter, expert_places
from .model_folder import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS, is_embedding, is_head
from .spec import TrainError
from .tensor_header import TensorEntry, read_header

MERGEABLE_DTYPES = ("BF16", "F16", "F32")

CONV1D_MODELS = ("gpt2", "openai-gpt")
"""model_type of the language models of transformers whose layers are Conv1D."""
UNDERSTOOD = (
    "alpha_pattern", "bias", "ensure_weight_tying", "fan_in_fan_out", "lora_alpha", "modules_to_save", "peft_type", "r",
    "rank_pattern", "target_parameters", "use_dora", "use_rslora",
)  # fmt: skip
WITHOUT_EFFECT = (
    "alora_name", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
"""Keys that say where adapters sit or how they were trained; their result stands in the weights."""
UNCHANGED_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is; PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA subtract from it."""

SIMPLE_PATTERN = re.compile(r"(?:\\d\+?|\\\.|\.\*|\[[\w-]+\]\+?|[\w\-.|^$()])+")
"""What a key of rank_pattern or alpha_pattern may consist of. Nothing that is repeated can hold a repetition."""
MAX_WILDCARDS = 3
MAX_CHOICES = 12
"""Of wildcards, and of `|` and `(`, in one key: with more, an expression could take for ever to match."""
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(?P<suffix>\.weight)?")
MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")


@dataclass(frozen=True)
class Update:
    """What is added to one matrix of the base: scaling * lora_b @ lora_a, transposed where the base stores (in, out)."""

    file: Path
    """adapter_model.safetensors."""
    lora_a: str
    lora_b: str
    rank: int
    scaling: float
    transposed: bool = False
    magnitude: str | None = None
    """DoRA: the tensor with the length of each output."""
    matrix: int = 0
    """Which matrix of a weight of three dimensions."""
    expert: int = 0
    num_experts: int = 1
    """How many pairs lora_a (experts x rank, in) and lora_b (out, rank x experts) hold."""
    rows: tuple[int, int] | None = None
    """Rows of this expert's lora_b that belong to the matrix, when it is a part of what was adapted."""


@dataclass(frozen=True)
class Adapter:
    path: Path
    """adapter_model.safetensors."""
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    weight: float = 1.0
    """Factor of all its updates."""


@dataclass
class Changes:
    """All that one adapter does to a base."""

    updates: dict[str, list[Update]] = field(default_factory=dict)
    """Weight of the base -> what is added."""
    replaced: dict[str, str] = field(default_factory=dict)
    """Weight of the base -> the tensor of the adapter file that takes its place."""


def read_adapter(folder: Path, weight: float = 1.0) -> Adapter:
    """Config and tensor list. Raises TrainError for a folder that is not a LoRA adapter, naming every reason."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise TrainError(
            f"{folder} holds no {ADAPTER_CONFIG}", "Give an adapter folder, as `launch consolidate` or PEFT writes it."
        )
    config = read_json(folder / ADAPTER_CONFIG)
    _refuse_other_formulas(config, folder / ADAPTER_CONFIG)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise TrainError(
            f"{folder} holds no {ADAPTER_WEIGHTS}", "Pickled adapters (.bin) are not loaded: save it as safetensors."
        )
    entries = read_header(folder / ADAPTER_WEIGHTS).entries
    if not entries:
        raise TrainError(f"{folder / ADAPTER_WEIGHTS} holds no tensors")
    return Adapter(folder / ADAPTER_WEIGHTS, config, entries, weight)


def _refuse_other_formulas(config: dict[str, Any], path: Path) -> None:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type {config.get('peft_type')!r}: only LORA")
    if config.get("init_lora_weights", True) not in UNCHANGED_BASE:
        problems.append(f"init_lora_weights {config['init_lora_weights']!r}: it changed the base when training began")
    for key, value in sorted(config.items()):
        if key not in (*UNDERSTOOD, *WITHOUT_EFFECT, "init_lora_weights") and value not in (
            None,
            False,
            "none",
            [],
            {},
        ):
            problems.append(f"{key} {str(value)[:80]!r}: not supported")
    for key, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < 1e9:
            problems.append(f"{key} {str(value)[:80]!r}: expected a number above 0")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            problems.append(f"{key}: expected an object")
    for key in ("modules_to_save", "target_parameters"):
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            problems.append(f"{key} {str(names)[:80]!r}: expected a list of names")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.append(f"bias {str(config['bias'])[:80]!r}: expected none, all or lora_only")
    if problems:
        raise TrainError(
            f"{path}: this adapter is not plain LoRA\n" + "\n".join(problems),
            "Merge it with PEFT's merge_and_unload().",
        )


def changes_of(adapter: Adapter, base: Mapping[str, TensorEntry], model_type: str = "") -> Changes:
    """What the adapter does to the weights of `base`. `model_type`: of its config. Raises TrainError listing every tensor that has no place, and every misfit."""
    problems: list[str] = []
    changes = Changes()
    factors: dict[str, dict[str, str]] = {}
    for name in adapter.entries:
        rest = name.removeprefix(ADAPTER_PREFIX)
        if match := FACTOR.fullmatch(rest):
            # PEFT names embeddings' factors without ".weight" and all others with it.
            if (match["embedding"] is None) == (match["suffix"] is not None):
                factors.setdefault(match["module"], {})[match["half"]] = name
                factors[match["module"]]["embedding"] = match["embedding"] or ""
                continue
        elif match := MAGNITUDE.fullmatch(rest):
            factors.setdefault(match["module"], {})["magnitude"] = name
            continue
        problems += _replace(adapter, name, base, changes)
    for module, names in factors.items():
        problems += _add(adapter, module, names, base, changes, model_type)
    if problems:
        shown = "\n".join(problems[:50]) + (f"\nand {len(problems) - 50} more" if len(problems) > 50 else "")
        raise TrainError(
            f"{adapter.path} does not fit the base\n{shown}", "Give the base that it was trained on by --base."
        )
    return changes


def _replace(adapter: Adapter, name: str, base: Mapping[str, TensorEntry], changes: Changes) -> list[str]:
    """Plan a tensor that was trained or saved whole. Returns what is wrong with it."""
    target = re.sub(r"\.(base_layer|modules_to_save|original_module)(?=\.)", "", name.removeprefix(ADAPTER_PREFIX))
    module = target.rpartition(".")[0]
    config = adapter.config
    # PEFT compares the ends of module names, and saves what is inside such a module too.
    saved = any(re.search(rf"{re.escape(m)}(\.|$)", module) for m in config.get("modules_to_save") or [])
    bias = config.get("bias", "none") != "none" and target.endswith(".bias")
    is_vocabulary = is_head(target) or is_embedding(target)
    if not saved and not bias and not is_vocabulary:
        return [f"{name}: neither a LoRA matrix nor a weight of modules_to_save"]
    if target not in base:
        return [f"{name}: the base has no {target}"]
    found, wanted = adapter.entries[name], base[target]
    if found.dtype not in MERGEABLE_DTYPES or wanted.dtype not in MERGEABLE_DTYPES:
        return [f"{name}: dtypes {found.dtype}, {wanted.dtype}: expected {', '.join(MERGEABLE_DTYPES)}"]
    # A vocabulary may have grown for the adapter, which then brings the embeddings whole.
    if found.shape[1:] != wanted.shape[1:] or (found.shape != wanted.shape and not is_vocabulary) or 0 in found.shape:
        return [f"{name}: is {list(found.shape)}, {target} of the base {list(wanted.shape)}"]
    changes.replaced[target] = name
    return []


def _add(
    adapter: Adapter,
    module: str,
    names: dict[str, str],
    base: Mapping[str, TensorEntry],
    changes: Changes,
    model_type: str,
) -> list[str]:
    """Plan the factors of one module. Returns what is wrong with them."""
    halves = [names[half] for half in ("A", "B") if half in names]
    if len(halves) < 2:
        return [f"{(halves or [names['magnitude']])[0]}: its other half is missing"]
    if bool(adapter.config.get("use_dora")) != ("magnitude" in names):
        # PEFT adapts some layers of a DoRA adapter without it only when they are parameters.
        return [
            f"{names['A']}: use_dora is {bool(adapter.config.get('use_dora'))}, a magnitude is{' not' * ('magnitude' not in names)} there"
        ]
    try:
        problems = []
        for target, update in _updates(adapter, module, names, base, model_type):
            if problem := _misfit(adapter, update, target, base, changes):
                problems.append(f"{names['A']}: {problem}")
            else:
                changes.updates.setdefault(target, []).append(update)
        return problems
    except TrainError as e:
        return [f"{names['A']}: {e.message}"]


def _updates(
    adapter: Adapter, raw: str, names: dict[str, str], base: Mapping[str, TensorEntry], model_type: str
) -> list[tuple[str, Update]]:
    """(Weight of the base, what is added) of one module's factors: one, or one for each expert."""
    module = raw.replace(".base_layer", "")
    config = adapter.config
    parameters = config.get("target_parameters") or []
    parameter = ""
    stored = _stored_name(f"{module}.weight", base)
    if parameters and stored not in base:
        parameter = adapted_parameter(module, raw.count(".base_layer"), parameters)
    adapted = f"{module}.{parameter}".rstrip(".")
    rank = _pattern_value(config.get("rank_pattern"), adapted, config["r"])
    if rank != int(rank):
        raise TrainError(f"rank_pattern gives {rank}, expected a whole number")
    alpha = _pattern_value(config.get("alpha_pattern"), adapted, config["lora_alpha"])
    update = Update(
        file=adapter.path,
        lora_a=names["A"],
        lora_b=names["B"],
        rank=int(rank),
        scaling=adapter.weight * (alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank),
        transposed=bool(names["embedding"]) or _stores_in_out(config, f"{module}.weight", model_type),
        magnitude=names.get("magnitude"),
    )
    if not parameter:
        return [(stored, update)]
    a, b = adapter.entries[names["A"]].shape, adapter.entries[names["B"]].shape
    return [
        (
            place.weight,
            dataclasses.replace(
                update,
                transposed=place.transposed,
                matrix=place.matrix,
                expert=place.expert,
                num_experts=place.num_experts,
                rows=place.rows,
            ),
        )
        for place in expert_places(module, parameter, a, b, update.rank, base, model_type)
    ]


def _stores_in_out(config: dict[str, Any], weight: str, model_type: str) -> bool:
    """Whether the base stores this weight as (in, out).

    Heads are linear layers even where all others are Conv1D. PEFT decides for each layer by its class, and leaves in the
    config only what it decided last.
    """
    return not is_head(weight) and (bool(config.get("fan_in_fan_out")) or model_type in CONV1D_MODELS)


def _pattern_value(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches the end of the module's name (peft: get_pattern_key)."""
    for pattern, value in (patterns or {}).items():
        if not _ends_soon(pattern):
            raise TrainError(
                f"pattern {reprlib.repr(pattern)}: understood are names, `\\.`, `\\d+`, `[0-9]+`, `(a|b)` and up to {MAX_WILDCARDS} `.*`"
            )
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as e:
            raise TrainError(f"pattern {pattern!r} is not a regular expression: {e}") from e
        if found:
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
                raise TrainError(f"pattern {pattern!r} gives {value!r}, expected a number above 0")
            return value
    return default


def _ends_soon(pattern: str) -> bool:
    """Whether matching this expression against a module's name takes no time to speak of."""
    wildcards = pattern.count("*") + pattern.count("]+")
    choices = pattern.count("|") + pattern.count("(")
    few = wildcards <= MAX_WILDCARDS and choices <= MAX_CHOICES and len(pattern) <= 500
    return few and SIMPLE_PATTERN.fullmatch(pattern) is not None


def _stored_name(name: str, base: Mapping[str, TensorEntry]) -> str:
    """`name` as the folder has it. Some are others in memory (transformers: conversion_mapping.py): a decoder beside a vision
    tower is model.language_model there and mostly language_model.model in files, Mixtral's router mlp.gate."""
    others = (
        re.sub(r"^model\.language_model\.", "language_model.model.", name),
        name.replace(".mlp.gate.", ".block_sparse_moe.gate."),
    )
    return next((other for other in (name, *others) if other in base), name)


def _misfit(
    adapter: Adapter, update: Update, target: str, base: Mapping[str, TensorEntry], changes: Changes
) -> str | None:
    """Why the update cannot be added to the weight; None when it can."""
    a, b = adapter.entries[update.lora_a], adapter.entries[update.lora_b]
    if target not in base:
        return f"the base has no {target}"
    # An embedding that grew for the adapter stands in its file.
    weight = adapter.entries[changes.replaced[target]] if target in changes.replaced else base[target]
    if {weight.dtype, a.dtype, b.dtype} - set(MERGEABLE_DTYPES):
        return f"dtypes {weight.dtype}, {a.dtype}, {b.dtype}: expected {', '.join(MERGEABLE_DTYPES)}"
    held = update.rank * update.num_experts
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != held or b.shape[1] != held:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} are not of rank {update.rank}, as the config says"
    low, high = update.rows or (0, b.shape[0])
    added = (a.shape[1], high - low) if update.transposed else (high - low, a.shape[1])
    if weight.shape[-2:] != added or 0 in added:
        return f"the update is {list(added)}, {target} of the base {list(weight.shape)}"
    if update.magnitude is not None:
        lengths = adapter.entries[update.magnitude]
        if lengths.dtype not in MERGEABLE_DTYPES or math.prod(lengths.shape) != b.shape[0]:
            return f"its magnitude is {lengths.dtype} {list(lengths.shape)}, there are {b.shape[0]} outputs"
    return None
