"""Checkpoints of other programs, described alike: which weights there are, where their elements lie, what is known beside them.

Every reader (`deepspeed_folder`, `dcp_folder`, `state_file`) ends in a ForeignCheckpoint. No tensor has been read then.
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint_format import Manifest
from .disk import read_json
from .model_folder import ADAPTER_CONFIG, ADAPTER_PREFIX, BUFFERS, has_weights, is_head, stored_tensors
from .spec import TrainError
from .torch_archive import ArchiveTensor

PREFIXES = ("module.", "llm.", "_orig_mod.", "_fsdp_wrapped_module.")
"""Of wrappers around the language model: DeepSpeed's and DDP's, XTuner's, torch.compile's, FSDP's."""
MAX_PROGRAM_CHARACTERS = 2**20
RECIPE_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}

Slice = tuple[int, ArchiveTensor, int, int]
"""First element of the parameter, the tensor that holds it, where in that tensor, and how many elements."""


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another program, described; no tensor has been read."""

    manifest: Manifest
    """As of a checkpoint of ours; `files` is empty."""
    slices: dict[str, list[Slice]]
    """Parameter -> its elements in order."""
    frozen: tuple[str, ...]
    """Of a full model, the weights that were not trained and are not in the shards: the base must have them."""
    base: Path | None
    """Folder of the model that training began with, where one is known."""
    notes: tuple[str, ...]
    """What was inferred, and what was left out."""
    inferred: bool = False
    """The adapter's config follows from its weights: nobody says which layers it should have."""


@dataclass(frozen=True)
class Given:
    """What the command line says of a checkpoint."""

    alpha: float | None = None
    """lora_alpha, for an adapter whose config is nowhere."""
    base: Path | None = None
    """Folder of the model that training began with."""


@dataclass(frozen=True)
class Known:
    """What there is beside the weights."""

    given: Given
    home: Path | None = None
    """Folder with adapter_config.json or config.json."""
    program: str = ""
    """The training program's own config, as Python text (XTuner keeps it in each checkpoint)."""


def program_of(content: Any) -> str:
    """The training config that mmengine puts into each checkpoint (meta["cfg"]); "" where there is none."""
    meta = content.get("meta") if isinstance(content, dict) else None
    program = meta.get("cfg") if isinstance(meta, dict) else None
    return program if isinstance(program, str) else ""


def home_of(*folders: Path) -> Path | None:
    """The first of the folders that says what was trained."""
    names = (ADAPTER_CONFIG, "config.json")
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def describe(
    slices: dict[str, list[Slice]],
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    known: Known,
    *,
    step: int,
    stage: int = 0,
    world_size: int = 1,
    frozen: Sequence[str] = (),
) -> ForeignCheckpoint:
    """`shapes` and `slices` by the names that the program uses; `dtype` as a recipe says it. Raises TrainError when lora_alpha is nowhere."""
    home = known.home
    notes: tuple[str, ...] = ()
    config = None
    plain = plain_names([*shapes, *frozen])
    names = {name: plain[name] for name in shapes}
    _refuse_equal_names(names)
    is_adapter = any(".lora_A." in name for name in names.values())
    base = known.given.base or (home if home is not None and (home / "config.json").is_file() else None)
    settings = _program_settings(known.program)
    if base is None and (path := settings.get("base")) and os.path.isdir(str(path)):
        base = Path(str(path)).absolute()
    if is_adapter:
        names, others = _of_adapter(names)
        trained = {short: shapes[name] for name, short in names.items()}
        config, notes = _adapter_config(known, settings, trained)
        if others:
            if config.get("bias", "none") != "none":
                raise TrainError(
                    f"bias {config['bias']!r}: which biases were trained cannot be told from those of the base",
                    "Save the adapter with PEFT's save_pretrained().",
                )
            notes += (f"left out: {len(others)} weights of the base, such as {others[0]}",)
    elif base is not None:
        names = _names_in(base, names)
    manifest = Manifest(
        run_id="",
        step=step,
        world_size=world_size,
        dp=world_size,
        sp=1,
        zero_stage=stage,
        method="lora" if is_adapter else "full",
        dtype=dtype,
        base_model=str((config or {}).get("base_model_name_or_path") or base or ""),
        parameters={short: shapes[name] for name, short in names.items()},
        adapter_config=config,
        files=(),
        state={},
    )
    rest = () if is_adapter else tuple(plain[name] for name in frozen)
    pieces = {short: slices[name] for name, short in names.items()}
    return ForeignCheckpoint(manifest, pieces, rest, base, notes, inferred=is_adapter and not _config_lies_in(home))


def common_dtype(tensors: Iterable[ArchiveTensor]) -> str:
    """That of most tensors, as a recipe says it; fp32 when there is none."""
    found = Counter(tensor.dtype for tensor in tensors if tensor.dtype in RECIPE_DTYPES)
    return RECIPE_DTYPES[found.most_common(1)[0][0]] if found else "fp32"


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without the names of what was wrapped around the model."""
    plain = {name: name.replace("_checkpoint_wrapped_module.", "") for name in names}
    # An adapter's names say where they begin; what stands before is a wrapper, whatever it is called.
    marked = {name: short[at:] for name, short in plain.items() if (at := short.find(ADAPTER_PREFIX)) >= 0}
    if marked and any(".lora_A." in name for name in marked.values()):
        return plain | marked
    for _ in range(len(PREFIXES)):
        for prefix in PREFIXES:
            if all(short.startswith(prefix) for short in plain.values()):
                plain = {name: short.removeprefix(prefix) for name, short in plain.items()}
    return plain


def _refuse_equal_names(names: dict[str, str]) -> None:
    """Raises TrainError when two weights of the checkpoint would be one of the model."""
    seen: dict[str, str] = {}
    for name, short in names.items():
        if short in seen:
            raise TrainError(
                f"{seen[short]} and {name} are both called {short} in the model: which of them is meant is not known",
                "Save the model alone.",
            )
        seen[short] = name


def _of_adapter(names: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """(The adapter's weights, those of the base). Where the checkpoint holds the whole PeftModel, it holds base layers too.

    Otherwise all that is there was trained, and nothing is left out.
    """
    if not any(".base_layer." in short for short in names.values()):
        return names, []
    own = {n: s for n, s in names.items() if ".lora_" in s or ".modules_to_save." in s}
    return own, [short for name, short in names.items() if name not in own]


def _names_in(base: Path, names: dict[str, str]) -> dict[str, str]:
    """The names as the base has them. Left out: a head that is the embedding under a second name, and rotary buffers."""
    if not has_weights(base):
        return names
    held = stored_tensors(base).keys()
    for prefix in ("", "model."):
        short = {name: plain.removeprefix(prefix) for name, plain in names.items()}
        left_out = {n for n, s in short.items() if s not in held and (is_head(s) or s.endswith(BUFFERS))}
        if all(s in held for n, s in short.items() if n not in left_out):
            return {name: s for name, s in short.items() if name not in left_out}
    return names


def _config_lies_in(home: Path | None) -> bool:
    return home is not None and (home / ADAPTER_CONFIG).is_file()


def _adapter_config(
    known: Known, settings: dict[str, Any], parameters: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(adapter_config, what was inferred). Raises TrainError when lora_alpha is nowhere."""
    if known.home is not None and _config_lies_in(known.home):
        config = read_json(known.home / ADAPTER_CONFIG)
        _check_alpha(known.given.alpha, config.get("lora_alpha"), str(known.home / ADAPTER_CONFIG))
        return config, ()
    layers = {n.partition(".lora_A.")[0]: s[0] for n, s in parameters.items() if ".lora_A." in n and s}
    if not layers or not all(name.startswith(ADAPTER_PREFIX) for name in layers):
        raise TrainError(f"{next(iter(parameters))}: is not named as PEFT names the weights of an adapter")
    rank = Counter(layers.values()).most_common(1)[0][0]
    others = {layer.removeprefix(ADAPTER_PREFIX): r for layer, r in layers.items() if r != rank}
    targets = sorted({layer.rpartition(".")[2] for layer in layers})
    if "lora_alpha" in settings:
        _check_alpha(known.given.alpha, settings["lora_alpha"], "the training program's config")
    alpha = known.given.alpha if known.given.alpha is not None else settings.get("lora_alpha")
    if alpha is None:
        raise TrainError(
            f"there is no {ADAPTER_CONFIG} beside the shards; rank {rank} and targets {', '.join(targets)} follow from the "
            "weights, lora_alpha does not",
            f"Give it as it was in training: --lora-alpha {2 * rank}. Or copy the run's {ADAPTER_CONFIG} there.",
        )
    saved = sorted({n.partition(".modules_to_save.")[0].rpartition(".")[2] for n in parameters if ".modules_to_" in n})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.get("base"),
        "r": rank,
        "rank_pattern": others,
        "lora_alpha": alpha,
        "target_modules": targets,
        "bias": "none",
        "modules_to_save": saved or None,
    }
    source = "given" if known.given.alpha is not None else "from the training program's config"
    return config, (
        f"no {ADAPTER_CONFIG}: rank {rank} and targets {', '.join(targets)} inferred, lora_alpha {alpha:g} {source}",
    )


def _check_alpha(given: float | None, known: Any, where: str) -> None:
    """Raises TrainError when the command line says another lora_alpha than was trained with."""
    if given not in (None, known):
        raise TrainError(f"{where} says lora_alpha {known}, --lora-alpha {given:g}", "Leave --lora-alpha out.")


def _program_settings(text: str) -> dict[str, Any]:
    """lora_alpha and base model that an XTuner config names; read as text, never run. Nothing for other text."""
    found: dict[str, set[Any]] = {"lora_alpha": set(), "base": set()}
    try:
        tree = ast.parse(text if len(text) < MAX_PROGRAM_CHARACTERS else "")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("lora_alpha", "pretrained_model_name_or_path"):
            name, value = str(node.arg), node.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
        else:
            continue
        if not isinstance(value, ast.Constant):
            continue
        if name == "lora_alpha" and isinstance(value.value, int | float) and 0 < value.value < math.inf:
            found["lora_alpha"].add(value.value)
        if name == "pretrained_model_name_or_path" and isinstance(value.value, str):
            found["base"].add(value.value)
    # Two values mean two adapters, or two models: then somebody has to say which is meant.
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def step_in_name(path: Path) -> int:
    """`iter_500.pth`, `checkpoint-200`, `global_step7` -> the number; 0 when there is none."""
    match = re.search(r"(?:iter_|epoch_|checkpoint-|global_step|step[-_]?)(\d+)", path.name)
    return int(match[1]) if match else 0
