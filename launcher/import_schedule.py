"""How long, how fast, how often saved: the training settings of another program, in our words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .import_draft import Draft, shown_value, word
from .recipe_yaml import Node

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_NEAREST_SCHEDULE = {"polynomial": "linear", "inverse_sqrt": "cosine"}
_A_DAY_S = 86_400


def map_training(d: Draft) -> None:
    """`train`, in the order of its keys."""
    _map_duration(d)
    _map_batch(d)
    rate = d.number("train.learning_rate")
    if rate is not None:
        d.write("train.learning_rate", rate)
    else:
        default = d.table.defaults.get("train.learning_rate")
        if d.table.name == "swift":
            default = 1e-5 if d.values["method.name"] == "full" else 1e-4
        d.write_default("train.learning_rate", default)
    if d.table.name == "xtuner":
        _map_mmengine_schedule(d)
    else:
        _map_schedule(d)
    decay = d.number("train.weight_decay")
    if decay is not None:
        d.write("train.weight_decay", decay)
        d.facts |= {"weight_decay"} if decay else set()
    elif "train.weight_decay" in d.table.defaults:
        d.facts.add("default_weight_decay")
        d.write_default("train.weight_decay", d.table.defaults["train.weight_decay"])
    _map_betas(d)
    norm = d.number("train.max_grad_norm")
    if norm is not None:
        d.write("train.max_grad_norm", norm)
    _map_recompute(d)
    if d.one("train.compile") is not None:
        d.write("train.compile", d.is_on("train.compile"))
    seed = d.number("train.seed", whole=True)
    if seed is not None:
        d.write("train.seed", int(seed))
    elif d.table.name == "xtuner":
        d.facts.add("seed")


def _map_duration(d: Draft) -> None:
    steps, epochs = d.number("train.max_steps", whole=True), d.number("train.epochs")
    older = d.number("train.epochs:old")
    if steps and steps > 0:
        if d.table.name == "xtuner":
            steps = max(1, round(steps / _accumulate(d)))
        d.write("train.max_steps", int(steps))
        d.leave_all(("train.epochs", "train.epochs:old"), "the number of steps ends the training", matters=False)
        return
    d.leave_all(("train.max_steps",), "epochs end the training", matters=False)
    if older:
        d.write("train.epochs", older, "train.epochs:old")
        d.leave_all(("train.epochs",), "max_epochs goes before it", matters=False)
    elif epochs:
        d.write("train.epochs", epochs)
    else:
        d.write_default("train.epochs", d.table.defaults.get("train.epochs", 3))


def _accumulate(d: Draft) -> int:
    return max(1, int(d.number("train.accumulate", whole=True) or 1))


def _map_batch(d: Draft) -> None:
    micro = d.number("train.micro_batch", whole=True)
    older = d.number("train.micro_batch:old", whole=True)
    if micro:
        d.write("train.micro_batch", int(micro))
        d.leave_all(("train.micro_batch:old",), "per_device_train_batch_size goes before it", matters=False)
    elif older:
        d.write("train.micro_batch", int(older), "train.micro_batch:old")
    else:
        d.write_default("train.micro_batch", d.table.defaults.get("train.micro_batch"))
    micro = d.values.get("train.micro_batch", 1)
    accumulate, total = d.number("train.accumulate", whole=True), d.number("train.accumulate:batch", whole=True)
    if accumulate:
        d.write("train.accumulate", int(accumulate))
        d.leave_all(("train.accumulate:batch",), "gradient_accumulation_steps goes before it", matters=False)
    elif total and total % micro == 0:
        d.write(
            "train.accumulate", int(total) // micro, "train.accumulate:batch", "rows of one device's step / micro batch"
        )
    elif total:
        d.leave_all(
            ("train.accumulate:batch",), f"{total} rows are not a multiple of the micro batch {micro}", matters=True
        )
    elif d.table.name == "swift" and micro <= 16 and 16 % micro == 0:
        d.facts.add("default_batch")
        d.write_default("train.global_batch", 16)


def _map_schedule(d: Draft) -> None:
    found = d.one("train.schedule")
    given = word(found[1]).lower().removeprefix("schedulertype.") if found else ""
    if found is None:
        d.write_default("train.schedule", d.table.defaults.get("train.schedule"))
    elif given in _SCHEDULES:
        d.write("train.schedule", _SCHEDULES[given])
    else:
        near = _NEAREST_SCHEDULE.get(given, "cosine")
        d.values["train.schedule"] = near
        d.leave(*found, f"a schedule is cosine, linear or constant: {near} is the nearest", matters=True)
    ratio, steps = d.number("train.warmup_ratio"), d.number("train.warmup_ratio:steps")
    total = d.values.get("train.max_steps")
    if given == "constant":
        d.values["train.warmup_ratio"] = 0.0
        d.leave_all(
            ("train.warmup_ratio", "train.warmup_ratio:steps"), "`constant` has no warm-up there", matters=False
        )
    elif steps and 0 < steps < 1:
        d.write("train.warmup_ratio", steps, "train.warmup_ratio:steps")
    elif steps and total:
        d.write("train.warmup_ratio", round(steps / total, 6), "train.warmup_ratio:steps", f"{steps} of {total} steps")
    elif steps:
        why = f"the warm-up is a share of all steps; {steps} of how many is known once the rows are counted: `launch plan`"
        d.leave_all(("train.warmup_ratio:steps",), f"{why}; 0.03 is used", matters=True)
    elif ratio is not None:
        d.write("train.warmup_ratio", ratio)
    else:
        d.facts.add("default_warmup")
        if steps == 0:
            d.write("train.warmup_ratio", 0.0, "train.warmup_ratio:steps")
        else:
            d.write_default("train.warmup_ratio", d.table.defaults.get("train.warmup_ratio"))
    if steps and ratio is not None:
        d.leave_all(("train.warmup_ratio",), "warmup_steps goes before it", matters=False)
    elif not steps and ratio is not None:
        d.leave_all(("train.warmup_ratio:steps",), "0 steps: the ratio holds", matters=False)
    if d.values.get("train.warmup_ratio", 0.03):
        d.facts.add("warmup")


def _map_mmengine_schedule(d: Draft) -> None:
    """LinearLR up to `end`, then CosineAnnealingLR or ConstantLR; both in epochs, or in iterations."""
    cosine, constant = d.one("train.schedule:cosine"), d.one("train.schedule:constant")
    if cosine is not None:
        d.write("train.schedule", "cosine", "train.schedule:cosine")
    elif constant is not None:
        d.write("train.schedule", "constant", "train.schedule:constant")
    else:
        d.values["train.schedule"] = "constant"
    end, by_epoch = d.number("train.warmup_ratio:end"), d.one("train.warmup_ratio:by_epoch")
    whole = d.number("train.epochs") if by_epoch is None or by_epoch[1].value else d.number("train.max_steps")
    if end and whole:
        d.write("train.warmup_ratio", round(end / whole, 6), "train.warmup_ratio:end", f"{end:g} of {whole:g}")
    elif end:
        d.leave_all(
            ("train.warmup_ratio:end",),
            "the warm-up is a share of all steps, which is not known here; 0.03 is used",
            True,
        )
    else:
        d.values["train.warmup_ratio"] = 0.0
    for role in ("train.warmup_ratio:begin", "train.warmup_ratio:by_epoch"):
        for key, node in d.all_of(role):
            if role.endswith("begin") and node.value:
                d.leave(key, node, "a warm-up begins at the first step", matters=True)
            else:
                d.note(key, node, "train.warmup_ratio", d.values.get("train.warmup_ratio", 0.03))


def _map_betas(d: Draft) -> None:
    pair = d.one("train.betas")
    if pair is not None:
        items = [item.value for item in pair[1].value] if isinstance(pair[1].value, list) else []
        if len(items) == 2 and all(isinstance(item, int | float) for item in items):
            d.write("train.betas", [float(item) for item in items])
        else:
            d.problem(pair[1], f"{pair[0]}: {shown_value(pair[1])}; expected two numbers", "")
        return
    first, second = d.number("train.betas:1"), d.number("train.betas:2")
    default = d.table.defaults.get("train.betas", [0.9, 0.999])
    betas = [first if first is not None else default[0], second if second is not None else default[1]]
    for role, given in (("train.betas:1", first), ("train.betas:2", second)):
        if given is not None:
            d.write("train.betas", betas, role)
    d.write_default("train.betas", betas)


def _map_recompute(d: Draft) -> None:
    off = d.one("train.gradient_checkpointing:off")
    if off is not None:
        d.write(
            "train.gradient_checkpointing",
            not d.is_on("train.gradient_checkpointing:off"),
            "train.gradient_checkpointing:off",
        )
        d.leave_all(("train.gradient_checkpointing",), "disable_gradient_checkpointing decides there", matters=False)
        return
    for role in ("train.gradient_checkpointing", "train.gradient_checkpointing:new"):
        if d.one(role) is not None:
            d.write("train.gradient_checkpointing", d.is_on(role), role)


def map_parallel(d: Draft) -> None:
    """`parallel`: the ZeRO stage and offload of a DeepSpeed file or name, FSDP, sequence parallelism."""
    found = d.one("parallel.zero")
    if found is not None and found[1].value not in ("", False):
        _map_deepspeed(d, *found)
    fsdp = d.one("parallel.zero:fsdp")
    if fsdp is not None and fsdp[1].value:
        stage = 2 if "shard_grad_op" in str(fsdp[1].plain()) else 3
        d.write("parallel.zero", stage, "parallel.zero:fsdp", "ZeRO does what FSDP does")
    config = d.one("parallel.offload:fsdp")
    settings = config[1].plain() if config is not None and isinstance(config[1].value, dict) else {}
    if (
        settings.get("fsdp_offload_params")
        or settings.get("offload_params")
        or (fsdp and "offload" in str(fsdp[1].plain()))
    ):
        d.values["parallel.offload"] = "parameters"
        if d.values.setdefault("parallel.zero", 3) != 3:
            d.values["parallel.offload"] = "optimizer"
    for key, node in d.all_of("parallel.offload:fsdp"):
        d.note(key, node, "parallel.offload", d.values.get("parallel.offload", "none"))
    for key, node in d.all_of("parallel.zero:accelerate"):
        named = re.search(r"zero[_-]?([0-3])", str(node.value).lower())
        if named:
            d.values["parallel.zero"] = int(named[1])
            d.note(key, node, "parallel.zero", int(named[1]), "by its name")
        else:
            d.leave(
                key,
                node,
                "processes are started by `launch` itself: --gpus, --hosts; ZeRO is parallel.zero",
                matters=False,
            )
    degree = d.number("parallel.sp", whole=True)
    if degree is not None:
        d.write("parallel.sp", max(1, int(degree)))
        d.facts |= {"sp"} if degree > 1 else set()


def _map_deepspeed(d: Draft, key: str, node: Node) -> None:
    config: Any = node.plain() if isinstance(node.value, dict) else None
    text = str(node.value) if config is None else ""
    if config is None and text.lstrip().startswith("{"):
        config = _json(text)
    path = next((p for p in (d.start.folder / text, Path.cwd() / text) if text.endswith(".json") and p.is_file()), None)
    if config is None and path is not None:
        config = _json(path.read_text(encoding="utf-8-sig"))
    if isinstance(config, dict):
        zero = config.get("zero_optimization") or {}
        stage, on_cpu = zero.get("stage", 0), _devices(zero)
        note = f"read from {path.name}" if path else ""
    else:
        named = re.search(r"(?:zero|z)[_-]?([0-3])", Path(text).name.lower())
        stage = int(named[1]) if named else None
        on_cpu = {"param", "optimizer"} if "offload" in text.lower() else set()
        note = "by its name: there is no such file here"
    if stage not in (0, 1, 2, 3):
        d.choose(
            node,
            f"{key}: which ZeRO stage is meant cannot be told from {text or 'it'}",
            "Write parallel.zero: 2, or 3.",
        )
        return
    d.write("parallel.zero", stage, note=note)
    if stage == 3 and "param" in on_cpu:
        d.note(key, node, "parallel.offload", "parameters", note)
        d.values["parallel.offload"] = "parameters"
    elif stage and on_cpu:
        d.note(key, node, "parallel.offload", "optimizer", note)
        d.values["parallel.offload"] = "optimizer"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _devices(zero: dict[str, Any]) -> set[str]:
    """What is kept in CPU memory, of param and optimizer."""
    on_cpu = {
        name for name in ("param", "optimizer") if (zero.get(f"offload_{name}") or {}).get("device") in ("cpu", "nvme")
    }
    return on_cpu | ({"optimizer"} if zero.get("cpu_offload") else set())


def map_saving(d: Draft, holds_out: bool) -> None:
    """`checkpoint`, `run`, and how often the loss of held-out rows is taken."""
    every, found = d.number("checkpoint.every_steps"), d.one("checkpoint.every_steps")
    strategy = d.one("checkpoint.every_steps:strategy")
    named = (
        word(strategy[1])
        if strategy
        else d.table.defaults.get("checkpoint.every_steps", "steps")
        if every is None
        else "steps"
    )
    if d.table.name == "xtuner" and every is not None:
        _map_iterations(d, int(every))
    elif named in ("no", "False"):
        d.write("checkpoint.every_steps", 0, "checkpoint.every_steps:strategy", "only at the end")
        d.leave_all(("checkpoint.every_steps",), "nothing is saved before the end", matters=False)
    elif named in ("epoch", "best") or (every is not None and 0 < every < 1):
        d.facts.add("epoch_saves")
        why = "checkpoints are saved every N optimizer steps (checkpoint.every_steps: 200)"
        d.leave_all(("checkpoint.every_steps", "checkpoint.every_steps:strategy"), why, matters=False)
    elif found is not None and every:
        d.write("checkpoint.every_steps", int(every))
    if strategy is not None and not any(m.key == strategy[0] for m in d.mapped) and "epoch_saves" not in d.facts:
        d.note(*strategy, "checkpoint.every_steps", d.values.get("checkpoint.every_steps", 200))
    d.leave_all(
        ("checkpoint.every_steps:epoch",),
        "checkpoints are saved every N optimizer steps (checkpoint.every_steps)",
        matters=False,
    )
    keep = d.number("checkpoint.keep", whole=True)
    if keep and keep > 0:
        d.write("checkpoint.keep", int(keep))
    else:
        d.leave_all(
            ("checkpoint.keep",), "some number of newest checkpoints is kept (checkpoint.keep: 2)", matters=False
        )
        d.facts.add("keep_all")
    _map_held_out_loss(d, holds_out)
    _map_run(d)


def _map_iterations(d: Draft, every: int) -> None:
    by_epoch = d.one("checkpoint.every_steps:by_epoch")
    if (by_epoch is None or by_epoch[1].value) or every <= 0:
        d.write("checkpoint.every_steps", 0, note="only at the end")
    else:
        accumulate = _accumulate(d)
        d.write("checkpoint.every_steps", max(1, round(every / accumulate)), note=f"{every} iterations / {accumulate}")
    for key, node in d.all_of("checkpoint.every_steps:by_epoch"):
        d.note(key, node, "checkpoint.every_steps", d.values["checkpoint.every_steps"])


def _map_held_out_loss(d: Draft, holds_out: bool) -> None:
    roles = tuple(f"evaluate.loss_every_steps{part}" for part in ("", ":strategy", ":epoch"))
    every, strategy = d.number(roles[0]), d.one(roles[1])
    if not holds_out:
        d.leave_all(roles, "no rows are held out", matters=False)
    elif every and every >= 1:
        d.write("evaluate.loss_every_steps", int(every))
        for key, node in d.all_of(roles[1]):
            d.note(key, node, "evaluate.loss_every_steps", int(every))
    elif strategy is not None and word(strategy[1]) in ("no", "False"):
        d.write("evaluate.loss_every_steps", 0, roles[1], "before and after training")
    else:
        d.leave_all(roles, "the loss of held-out rows is taken every checkpoint.every_steps", matters=False)


def _map_run(d: Draft) -> None:
    folder, name = d.one("run.dir"), d.one("run.name")
    if folder is not None:
        d.write("run.dir", str(folder[1].value).rstrip("/") or "/", note="a folder of run folders")
    if name is not None and re.fullmatch(r"[^/\\\s]+", str(name[1].value)):
        d.write("run.name", str(name[1].value))
    elif name is not None:
        d.leave(*name, "a run's name has no spaces or slashes", matters=False)
    timeout = d.number("run.timeout_s", whole=True)
    if timeout and 0 < timeout <= _A_DAY_S:
        d.write("run.timeout_s", int(timeout))
    else:
        d.leave_all(
            ("run.timeout_s",),
            "rows are tokenised before the processes meet: no wait is without a limit (1800 s)",
            matters=False,
        )
