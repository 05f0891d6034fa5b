"""What a consolidated adapter or model consists of: names, shapes and files, all checked. Reads headers only."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint_format import MANIFEST, Manifest, read_manifest
from .foreign import ForeignCheckpoint, Slice
from .model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_PREFIX,
    ADAPTER_WEIGHTS,
    BUFFERS,
    has_weights,
    is_head,
    read_config,
    stored_tensors,
)
from .spec import TrainError
from .tensor_files import STORED_DTYPES, Shard, StoredTensor, plan_shards
from .tensor_header import TensorSpec


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
        plan = _make_plan(step_dir, foreign.manifest, dtype, foreign.base, max_bytes, foreign.frozen)
        absent = [n for n in plan.untrained if n not in foreign.frozen and not n.endswith(BUFFERS)]
        if absent:
            raise TrainError(
                f"{step_dir}: {len(absent)} weights of {foreign.base} are not in the checkpoint, such as {absent[0]}",
                "Is it a part of a model, one file of several, or another model's? Give the whole of it.",
            )
        lost = [name for name in foreign.frozen if name not in plan.untrained]
        # A tied head counts among the frozen where the embedding is.
        if any(not is_head(name) for name in lost):
            raise TrainError(
                f"{len(lost)} weights were not trained and are not in the shards, such as {lost[0]}",
                "Give the folder of the model that training began with: --base FOLDER.",
            )
        plan = dataclasses.replace(plan, slices=foreign.slices)
    else:
        plan = _make_plan(step_dir, read_manifest(step_dir), dtype, base, max_bytes)
    if plan.manifest.method != "full" and not (foreign is not None and foreign.inferred):
        _check_complete(plan)
    return plan


def _make_plan(
    step_dir: Path,
    manifest: Manifest,
    dtype: str | None,
    base: Path | None,
    max_bytes: int,
    frozen: tuple[str, ...] = (),
) -> Plan:
    stored = STORED_DTYPES[dtype or manifest.dtype]
    if not manifest.parameters:
        raise TrainError(f"{step_dir / MANIFEST}: lists no parameters")
    if manifest.method == "full":
        return _plan_model(manifest, stored, base, max_bytes, step_dir, frozen)
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


def _check_complete(plan: Plan) -> None:
    """Raises TrainError when a layer of the base has no adapter although layers of its kind have, and the config wants all.

    Nothing is known of a base without weights here, nor where the config picks layers in a way of its own.
    """
    config, base = plan.config, plan.base
    adapted = {n.removeprefix(ADAPTER_PREFIX).partition(".lora_A.")[0] for n in plan.parameters if ".lora_A." in n}
    targets = config.get("target_modules")
    picks = ("layers_to_transform", "exclude_modules", "target_parameters")
    if base is None or not has_weights(base) or any(config.get(key) for key in picks):
        return
    if not isinstance(targets, list) and targets != "all-linear":
        return
    kinds = {re.sub(r"\d+", "#", module) for module in adapted}
    of_kind = [n.removesuffix(".weight") for n in stored_tensors(base) if n.endswith(".weight")]
    of_kind = [module for module in of_kind if re.sub(r"\d+", "#", module) in kinds]
    if isinstance(targets, list):
        of_kind = [m for m in of_kind if any(f".{m}".endswith(f".{target}") for target in targets)]
    missing = [module for module in of_kind if module not in adapted]
    if missing:
        raise TrainError(
            f"{plan.step_dir}: {len(missing)} of the layers that {ADAPTER_CONFIG} names have no adapter, such as {missing[0]}",
            "The checkpoint is not whole: take another step, or restore its files.",
        )


def _plan_model(
    manifest: Manifest, stored: str, base: Path | None, max_bytes: int, step_dir: Path, frozen: tuple[str, ...]
) -> Plan:
    if base is None and os.path.isdir(manifest.base_model):
        base = Path(manifest.base_model).absolute()
    if base is None:
        raise TrainError(
            "the base model folder is not known", "A full model needs its config and tokenizer: give --base FOLDER."
        )
    config = read_config(base)
    held = stored_tensors(base) if has_weights(base) else {}
    _check_same_model(manifest, held, base)
    untrained = {name: tensor for name, tensor in held.items() if name not in manifest.parameters}
    for head in [name for name in untrained if is_head(name) and name not in frozen]:
        # Full training trains every weight that is not frozen, so a head that was not trained is the input embedding under a second name.
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
