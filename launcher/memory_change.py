"""The smallest change of one recipe key with which a run fits into memory. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .compatibility import works
from .compatibility_table import AXES
from .memory import MemoryInputs, estimate
from .sequence_parallel import allowed_sp

_LENGTH_STEP = 256
_DEFAULT_LORA_RANK = 16


@dataclass(frozen=True)
class Change:
    """One recipe key that makes the run fit."""

    key: str
    value: str
    reason: str
    total_gb: float


def smallest_change(
    inputs: MemoryInputs, budget_gb: float, host_gb: float = 0.0, max_zero_stage: int = 3
) -> Change | None:
    """The first single change, from harmless to costly, with which one device needs at most `budget_gb`.

    None when the run fits as it is, or when no single change is enough. `host_gb`: CPU memory of all processes
    together, 0 where it is unknown. `max_zero_stage` is the highest that the rest of the recipe allows.
    """
    if estimate(inputs).total_gb <= budget_gb:
        return None
    for key, value, reason, changed in _candidates(inputs, budget_gb, host_gb, max_zero_stage):
        total = estimate(changed).total_gb
        if total <= budget_gb:
            return Change(key, value, reason, total)
    return None


Candidate = tuple[str, str, str, MemoryInputs]


def _candidates(inputs: MemoryInputs, budget_gb: float, host_gb: float, max_zero_stage: int) -> Iterator[Candidate]:
    if inputs.copies_checkpoint and inputs.device == "cpu":
        yield (
            "checkpoint.async",
            "false",
            "training waits for each checkpoint",
            replace(inputs, copies_checkpoint=False),
        )
    if not inputs.gradient_checkpointing:
        changed = replace(inputs, gradient_checkpointing=True)
        yield "train.gradient_checkpointing", "true", "same result, about a third more time", changed
    if inputs.micro_batch > 1:
        reason = f"with train.accumulate {inputs.micro_batch} times larger the result is the same"
        yield "train.micro_batch", "1", reason, replace(inputs, micro_batch=1)
    yield from _of_layout(inputs, max_zero_stage)
    yield from _of_offload(inputs, host_gb)
    yield from _of_method(inputs)
    length = _longest_that_fits(inputs, budget_gb)
    if length:
        reason = "longer documents are cut or dropped (data.too_long)"
        yield "data.max_length", str(length), reason, replace(inputs, max_length=length)


def _of_layout(inputs: MemoryInputs, max_zero_stage: int) -> Iterator[Candidate]:
    world = inputs.shards
    if world > 1:
        for stage in range(inputs.zero_stage + 1, max_zero_stage + 1):
            changed = replace(inputs, zero_stage=stage)
            yield "parallel.zero", str(stage), f"same result, shards more over the {world} processes", changed
    for sp in allowed_sp(world, inputs.facts):
        if sp > inputs.sp:
            changed = replace(inputs, sp=sp, dp=world // sp)
            yield "parallel.sp", str(sp), f"{sp} processes share a row; the batch has fewer rows at a time", changed


def _of_offload(inputs: MemoryInputs, host_gb: float) -> Iterator[Candidate]:
    if inputs.offload == "none" and inputs.device == "cuda":
        for what in AXES["offload"].values[1:]:
            changed = replace(inputs, offload=what)
            needs = sum(t.gb for t in estimate(changed).host_terms) * inputs.shards
            choice = {"method": inputs.method, "zero": str(inputs.zero_stage), "offload": what, "device": inputs.device}
            if works(choice) and needs <= host_gb:
                yield "parallel.offload", what, f"same result, slower steps, {needs:.0f} GB of CPU memory", changed


def _of_method(inputs: MemoryInputs) -> Iterator[Candidate]:
    if inputs.method == "qlora":
        return
    rank = inputs.rank or _DEFAULT_LORA_RANK
    targets = inputs.targets or ("all-linear",)
    if inputs.method == "full":
        changed = replace(inputs, method="lora", rank=rank, targets=targets)
        yield "method", "lora", f"trains {changed.num_trainable / 1e6:.1f} M adapter weights only", changed
    changed = replace(inputs, method="qlora", rank=rank, targets=targets, double_quant=True)
    if inputs.device == "cuda":
        yield "method", "qlora", "holds the base model in 4 bits", changed


def _longest_that_fits(inputs: MemoryInputs, budget_gb: float) -> int:
    """Largest multiple of 256 tokens below max_length that fits, or 0."""
    low, high = 0, (inputs.max_length - 1) // _LENGTH_STEP
    while low < high:
        middle = (low + high + 1) // 2
        fits = estimate(replace(inputs, max_length=middle * _LENGTH_STEP)).total_gb <= budget_gb
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * _LENGTH_STEP
