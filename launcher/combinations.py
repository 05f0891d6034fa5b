"""Which of method x ZeRO stage x dtype x offload can be trained on a device, and the nearest that can. Pure.

Stage by stage from DeepSpeed's engine (runtime/engine.py, `_configure_optimizer` and what it calls).
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import Problem
from .model_families import refusals_of
from .model_layers import ModelFacts
from .recipe_schema import Recipe

OFFLOAD_STAGES = {"none": (0, 1, 2, 3), "optimizer": (1, 2, 3), "parameters": (3,)}
"""parallel.offload -> the ZeRO stages that do it."""


@dataclass(frozen=True)
class Combination:
    """The keys that depend on one another. Field values are those of `trainer.spec`."""

    method: str
    zero_stage: int
    dtype: str
    offload: str
    device: str
    accumulate: int


def refusals(combination: Combination, recipe: Recipe, facts: ModelFacts | None) -> list[Problem]:
    """Why this plan may be looked at but not started; each hint names the nearest combination that works."""
    return [
        *model_refusals(recipe, facts),
        *_scaled(combination),
        *_offload(combination),
        *_samples(combination, recipe),
    ]


def model_refusals(recipe: Recipe, facts: ModelFacts | None) -> list[Problem]:
    """What the model itself does not allow, whatever it trains on."""
    return [*_model(facts), *_stretched(recipe, facts), *_vision(recipe, facts)]


def _model(facts: ModelFacts | None) -> list[Problem]:
    """Families whose attention packed rows do not allow, and those whose code fits no current transformers."""
    if facts is None:
        return []
    return [Problem("model.source", refusal.reason, refusal.instead) for refusal in refusals_of(facts)]


def _vision(recipe: Recipe, facts: ModelFacts | None) -> list[Problem]:
    """Text gives a vision tower no gradient, and its weights have other names in memory than in the model's folder."""
    if facts is None or not facts.has_vision or recipe.method.name != "full":
        return []
    message = "full is not for a model with a vision tower, which text does not train"
    return [Problem("method.name", message, "Write method: lora or qlora, which adapt the decoder alone.")]


def _stretched(recipe: Recipe, facts: ModelFacts | None) -> list[Problem]:
    """Rotary frequencies that follow the longest position of a forward pass: not one document's affair, nor one slice's."""
    length = recipe.data.max_length * recipe.train.micro_batch
    if facts is None or not 0 < facts.stretches_beyond < length:
        return []
    limit = facts.stretches_beyond
    message = (
        f"rows of {length} tokens (max_length x micro_batch) are longer than {limit}, where this model's rotary positions "
        "change for all documents of a row at once: packed rows would not equal single ones"
    )
    return [Problem("data.max_length", message, f"Keep data.max_length x train.micro_batch at or below {limit}.")]


def _scaled(combination: Combination) -> list[Problem]:
    """DeepSpeed 0.19.8 scales the loss for ZeRO's optimizers only, and divides by the scale for stage 0 as well."""
    if combination.dtype != "fp16" or combination.zero_stage != 0:
        return []
    message = "stage 0 does not scale the loss for fp16, so its gradients would be wrong"
    return [Problem("parallel.zero", message, "Write parallel.zero: 1 (or 2, 3), or model.dtype: bf16.")]


def _offload(combination: Combination) -> list[Problem]:
    offload, stage = combination.offload, combination.zero_stage
    # DeepSpeed moves parameters, and the constants of 4-bit weights are none.
    packed = combination.method == "qlora" and combination.device == "cuda"
    if stage not in OFFLOAD_STAGES[offload]:
        if offload == "optimizer":
            message = "optimizer needs ZeRO stage 1, 2 or 3: stage 0 has no shards to move"
            hint = "Write parallel.zero: 1 (or 2, 3), or parallel.offload: none."
        else:
            message = f"parameters needs ZeRO stage 3: stage {stage} keeps the weights whole on the device"
            other = f"parallel.offload: {'optimizer' if stage else 'none'}"
            hint = f"Write {other}." if packed else f"Write parallel.zero: 3, or {other}."
        return [Problem("parallel.offload", message, hint)]
    if packed and offload == "parameters":
        message = "parameters is not for 4-bit weights on a GPU: their constants are no parameters, and are not moved"
        return [Problem("parallel.offload", message, "Write parallel.offload: optimizer, or method: lora.")]
    return []


def _samples(combination: Combination, recipe: Recipe) -> list[Problem]:
    if combination.zero_stage != 3 or not recipe.evaluate.samples_every_steps:
        return []
    where = "evaluate.samples_every_steps"
    message = "no rank holds the whole model under ZeRO-3, so it cannot answer while it trains"
    other = "" if combination.offload == "parameters" else ", or parallel.zero: 2"
    return [Problem(where, message, f"Write {where}: 0{other}; the report has the answers before and after.")]


def compile_refusals(wanted: bool, zero_stage: int, compiler: str, hint: str) -> list[Problem]:
    """torch.compile where it cannot help, or without a compiler (`compiler`: its path, or ""; `hint`: how to get one)."""
    if wanted and zero_stage == 3:
        message = "ZeRO-3 gathers weights between the parts of a layer, which breaks it into pieces that compile anew"
        return [Problem("train.compile", message, "Write train.compile: false, or parallel.zero: 2.")]
    if not wanted or compiler:
        return []
    return [Problem("train.compile", "torch.compile needs a compiler, and this machine has none on its PATH", hint)]


def cautions(combination: Combination) -> list[str]:
    """What works but is worth a line."""
    found = []
    dtype = combination.dtype
    if dtype == "fp16" and combination.device == "cpu":
        text = "model.dtype fp16 on a CPU: slower than bf16 (7 times where there are bf16 units)"
        found.append(f"{text}, which needs no loss scale either")
    if combination.zero_stage == 0 and dtype == "bf16" and combination.accumulate > 1:
        text = f"ZeRO stage 0 adds up the gradients of {combination.accumulate} micro batches in bf16"
        found.append(f"{text}, where small ones are lost; parallel.zero: 1 adds them up in fp32")
    if combination.offload != "none" and combination.device == "cpu":
        found.append(
            f"parallel.offload {combination.offload}: this run computes on the CPU, so it costs copies and saves nothing"
        )
    return found


def offload_reason(combination: Combination) -> str:
    """What is moved and who updates it; "" for no offload."""
    update = "updated there by torch's fused AdamW: no compiler needed"
    if combination.offload == "none":
        return ""
    if combination.offload == "optimizer":
        return f"optimizer states in CPU memory, {update}"
    return f"weights and optimizer states in CPU memory; weights gathered layer by layer, states {update}"
