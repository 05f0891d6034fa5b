"""A plain LoRA adapter folder, as PEFT saves it: what it adds to which weight of the base. No torch.

The update of one weight is scaling * B @ A (https://arxiv.org/abs/2106.09685, section 4.1). Whatever else PEFT can put
into an adapter changes that formula, and is refused by name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .disk import read_json
from .spec import TrainError
from .tensor_files import StoredTensor
from .tensor_header import TensorEntry, read_header

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
MERGEABLE_DTYPES = ("BF16", "F16", "F32")
EMBEDDINGS = ("lm_head", "embed_out", "embed_tokens", "wte", "embed_in", "word_embeddings")

UNDERSTOOD = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
WITHOUT_EFFECT = (
    "alora_name", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
"""Keys that say where adapters sit or how they were trained; their result stands in the weights."""
UNCHANGED_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is; PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA subtract from it."""


@dataclass(frozen=True)
class LoraPair:
    """What is added to one weight: scaling * lora_b @ lora_a, transposed where the base stores (in, out)."""

    target: str
    """Name of the weight in the base."""
    lora_a: str
    lora_b: str
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    path: Path
    """adapter_model.safetensors."""
    config: dict[str, Any]
    entries: dict[str, TensorEntry]


def read_adapter(folder: Path) -> Adapter:
    """Config and tensor list. Raises TrainError for a folder that is not a plain LoRA adapter, naming every reason."""
    if not (folder / CONFIG).is_file():
        raise TrainError(
            f"{folder} holds no {CONFIG}", "Give an adapter folder, as `launch consolidate` or PEFT writes it."
        )
    config = read_json(folder / CONFIG)
    _refuse_other_formulas(config, folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise TrainError(
            f"{folder} holds no {WEIGHTS}", "Pickled adapters (.bin) are not loaded: save it as safetensors."
        )
    entries = read_header(folder / WEIGHTS).entries
    if not entries:
        raise TrainError(f"{folder / WEIGHTS} holds no tensors")
    return Adapter(folder / WEIGHTS, config, entries)


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
    if problems:
        raise TrainError(
            f"{path}: this adapter is not plain LoRA\n" + "\n".join(problems),
            "Merge it with PEFT's merge_and_unload().",
        )


def plan_pairs(adapter: Adapter, base: dict[str, StoredTensor], tied: bool) -> dict[str, LoraPair]:
    """Weight of the base -> what is added. Raises TrainError listing every tensor that has no place, and every misfit.

    `tied`: input and output embedding are one weight in the base.
    """
    problems: list[str] = []
    pairs: dict[str, LoraPair] = {}
    for name in adapter.entries:
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight", name)
        if not match:
            problems.append(f"{name}: not a LoRA matrix of a linear layer")
            continue
        module = match[1]
        if match[2] == "B" and f"{PREFIX}{module}.lora_A.weight" in adapter.entries:
            continue
        if match[2] == "B" or f"{PREFIX}{module}.lora_B.weight" not in adapter.entries:
            problems.append(f"{name}: its other half is missing")
            continue
        try:
            pair = _pair(adapter, module)
            _check_fit(adapter, pair, base, tied)
            pairs[pair.target] = pair
        except TrainError as e:
            problems.append(f"{name}: {e.message}")
    if problems:
        shown = "\n".join(problems[:50]) + (f"\nand {len(problems) - 50} more" if len(problems) > 50 else "")
        raise TrainError(
            f"{adapter.path} does not fit the base\n{shown}", "Give the base that it was trained on by --base."
        )
    return pairs


def _pair(adapter: Adapter, module: str) -> LoraPair:
    config = adapter.config
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    return LoraPair(
        target=f"{module}.weight",
        lora_a=f"{PREFIX}{module}.lora_A.weight",
        lora_b=f"{PREFIX}{module}.lora_B.weight",
        scaling=alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank,
        transposed=bool(config.get("fan_in_fan_out")),
    )


def _pattern_value(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches the end of the module's name (peft: get_pattern_key)."""
    for pattern, value in (patterns or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as e:
            raise TrainError(f"pattern {pattern!r} is not a regular expression: {e}") from e
        if found:
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise TrainError(f"pattern {pattern!r} gives {value!r}, expected a number above 0")
            return value
    return default


def _check_fit(adapter: Adapter, pair: LoraPair, base: dict[str, StoredTensor], tied: bool) -> None:
    a, b = adapter.entries[pair.lora_a], adapter.entries[pair.lora_b]
    module = pair.target.removesuffix(".weight")
    if tied and module.rpartition(".")[2] in EMBEDDINGS:
        raise TrainError("input and output embedding are one weight in this base; merging would change both")
    if pair.target not in base:
        raise TrainError(f"the base has no {pair.target}")
    weight = base[pair.target].entry
    if weight.dtype not in MERGEABLE_DTYPES or a.dtype not in MERGEABLE_DTYPES or b.dtype not in MERGEABLE_DTYPES:
        raise TrainError(f"dtypes {weight.dtype}, {a.dtype}, {b.dtype}: expected {', '.join(MERGEABLE_DTYPES)}")
    rank = _pattern_value(adapter.config.get("rank_pattern"), module, adapter.config["r"])
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise TrainError(
            f"lora_A {list(a.shape)} and lora_B {list(b.shape)} are not of rank {rank}, as the config says"
        )
    update = (a.shape[1], b.shape[0]) if pair.transposed else (b.shape[0], a.shape[1])
    if weight.shape != update or 0 in update:
        raise TrainError(f"the update is {list(update)}, {pair.target} of the base {list(weight.shape)}")
