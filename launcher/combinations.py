"""What the table of combinations says of one recipe on its devices: refusals with their remedies, and cautions. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .compatibility import Choice, applied, broken, holds, nearest, remedies, works
from .compatibility_table import AXES, CAUTIONS, JOINED_WHILE_LOADING, MANY, RULES, Rule
from .errors import Problem
from .model_families import refusals_of
from .model_layers import ModelFacts
from .recipe_schema import Recipe

OFFLOAD_STAGES = {
    offload: tuple(int(stage) for stage in AXES["zero"].values if works({"offload": offload, "zero": stage}))
    for offload in AXES["offload"].values
}
"""parallel.offload -> the ZeRO stages that do it."""
_BY_NAME = {rule.name: rule for rule in RULES}


@dataclass(frozen=True)
class Combination:
    """The keys that depend on one another. Field values are those of `trainer.spec`."""

    method: str
    zero_stage: int
    dtype: str
    offload: str
    device: str
    accumulate: int
    sp: int = 1
    processes: int = 1


def choice_of(combination: Combination, recipe: Recipe) -> dict[str, str]:
    """The same as the table's choice. Attention is left out: a model may have several kinds."""
    return {
        "method": combination.method,
        "quantisation": quantisation_of(combination.method, recipe.method.double_quant),
        "zero": str(combination.zero_stage),
        "offload": combination.offload,
        "dtype": combination.dtype,
        "sp": one_or_many(combination.sp),
        "packing": on_or_off(recipe.data.packing),
        "device": combination.device,
        "processes": one_or_many(combination.processes),
        "generation": on_or_off(recipe.evaluate.samples_every_steps),
        "compile": on_or_off(recipe.train.compile),
    }


def quantisation_of(method: str, double_quant: bool) -> str:
    """How a method holds the base."""
    if method != "qlora":
        return "none"
    return "nf4-double" if double_quant else "nf4"


def one_or_many(number: int) -> str:
    """The table's word for how many processes there are."""
    return "1" if number == 1 else MANY


def on_or_off(value: object) -> str:
    """The table's word for a switch, or for a number of steps that is not 0."""
    return "on" if value else "off"


def refusals(combination: Combination, recipe: Recipe, facts: ModelFacts | None) -> list[Problem]:
    """Why this plan may be looked at but not started; each names the nearest combination that works.

    `compile_refusals` and `sequence_parallel.size_problem` have the rest: they depend on the machine and on numbers.
    """
    choice = choice_of(combination, recipe)
    found = model_refusals(recipe, facts)
    if joins_experts(facts) and combination.zero_stage == 3:
        found.append(refusal(_BY_NAME["experts-under-stage-3"], choice))
    # The sizes of sp that devices and heads allow are a matter of numbers, told where those are known.
    rules = [rule for rule in broken(choice) if rule.key not in ("parallel.sp", "train.compile")]
    return [*found, *(refusal(rule, choice) for rule in rules)]


def refusals_anywhere(recipe: Recipe) -> list[Problem]:
    """What no device could train, of the keys that leave nothing to decide."""
    parallel = recipe.parallel
    stage = 0 if parallel.zero == "auto" else parallel.zero
    sp = 1 if parallel.sp == "auto" else parallel.sp
    combination = Combination(recipe.method.name, stage, recipe.model.dtype, parallel.offload, "", 1, sp)
    open_axes = ["device", "processes", *["zero"] * (parallel.zero == "auto"), *["sp"] * (parallel.sp == "auto")]
    choice = {axis: value for axis, value in choice_of(combination, recipe).items() if axis not in open_axes}
    return [refusal(rule, choice) for rule in broken(choice)]


def refusal(rule: Rule, choice: Choice, whole: Choice | None = None, **numbers: Any) -> Problem:
    """A rule that holds for `choice`, ready to be printed. `whole`: where more is known, for the nearest that works."""
    values, rules = {**choice, **numbers}, applied(rule)
    hint = rule.hint.format(**values) if rule.hint else _remedies_text(rule, choice, rules)
    found = nearest(whole or choice, rules) if not rule.hint else []
    return Problem(rule.key, rule.reason.format(**values), hint, change_lines(found[0]) if found else "", sources(rule))


def sources(rule: Rule) -> str:
    """All sources of a rule on one line."""
    return "; ".join(source.where for source in rule.sources)


def source_of(name: str) -> str:
    """The sources of the rule of that name, for refusals that are made where the numbers are."""
    return sources(_BY_NAME[name])


def _remedies_text(rule: Rule, choice: Choice, rules: Sequence[Rule]) -> str:
    """ "Write parallel.zero: 1 (or 2, 3), or model.dtype: bf16.", or "" where no single key is enough."""
    by_axis: dict[str, list[str]] = {}
    for axis, value in remedies(rule, choice, rules):
        by_axis.setdefault(axis, []).append(_written(axis, value)[1])
    parts = []
    for axis, (first, *others) in by_axis.items():
        key = "method" if axis == "method" else _written(axis, first)[0]
        parts.append(f"{key}: {first}" + (f" (or {', '.join(others)})" if others else ""))
    return f"Write {', or '.join(parts)}." if parts else ""


def change_lines(change: Mapping[str, str]) -> str:
    """A change as lines of a recipe."""
    sections: dict[str, list[str]] = {}
    for axis, value in change.items():
        key, written = _written(axis, value)
        if not written:
            continue
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"  {name}: {written}")
    return "\n".join(line for section, lines in sections.items() for line in (f"{section}:", *lines))


def _written(axis: str, value: str) -> tuple[str, str]:
    """(recipe key, value) for a value of an axis; ("", "") for what no key says by itself."""
    key = AXES[axis].key
    if axis == "generation":
        return key, "0"
    if axis in ("packing", "compile"):
        return key, "true" if value == "on" else "false"
    if axis == "quantisation":
        return (key, "true" if value == "nf4-double" else "false") if value.startswith("nf4") else ("", "")
    return (key, value) if key else ("", "")


def joins_experts(facts: ModelFacts | None) -> bool:
    """Whether the experts of this model are joined while it is loaded, which ZeRO-3 cannot do."""
    return facts is not None and facts.num_experts > 0 and facts.model_type in JOINED_WHILE_LOADING


def model_refusals(recipe: Recipe, facts: ModelFacts | None) -> list[Problem]:
    """What the model itself does not allow, whatever it trains on."""
    return [*_of_model(facts), *_stretched(recipe, facts), *_vision(recipe, facts)]


def _of_model(facts: ModelFacts | None) -> list[Problem]:
    """Families whose attention packed rows do not allow, and those whose code fits no current transformers."""
    if facts is None:
        return []
    rules = [rule for kind in facts.attention for rule in broken({"attention": kind})]
    if facts.model_type == "internlm2":
        rules = [_BY_NAME["internlm2-code"]]
    told = "; ".join(dict.fromkeys(sources(rule) for rule in rules))
    return [Problem("model.source", refused.reason, refused.instead, source=told) for refused in refusals_of(facts)]


def _vision(recipe: Recipe, facts: ModelFacts | None) -> list[Problem]:
    """Text gives a vision tower no gradient, and its weights have other names in memory than in the model's folder."""
    if facts is None or not facts.has_vision or recipe.method.name != "full":
        return []
    message = "full is not for a model with a vision tower, which text does not train"
    return [Problem("method.name", message, "Write method: lora or qlora, which adapt the decoder alone.")]


def stored_refusals(method: str) -> list[Problem]:
    """A base whose own files are quantised. `method`: "gptq", "awq" ...; "" where they are not."""
    if not method:
        return []
    found = refusal(_BY_NAME["stored-quantisation"], {"quantisation": "stored"})
    return [replace(found, message=f"{found.message} ({method})")]


def _stretched(recipe: Recipe, facts: ModelFacts | None) -> list[Problem]:
    """Rotary frequencies that follow the longest position of a forward pass: not one document's affair, nor one slice's."""
    length = recipe.data.max_length * recipe.train.micro_batch
    if facts is None or not 0 < facts.stretches_beyond < length:
        return []
    return [refusal(_BY_NAME["stretched-positions"], {}, length=length, limit=facts.stretches_beyond)]


def compile_refusals(
    wanted: bool, zero_stage: int, compiler: str, hint: str, whole: Choice | None = None
) -> list[Problem]:
    """torch.compile where it cannot help, or without a compiler (`compiler`: its path, or ""; `hint`: how to get one).

    `whole`: the run's whole choice, where it is known.
    """
    choice = {"compile": on_or_off(wanted), "zero": str(zero_stage)}
    found = [refusal(rule, choice, whole) for rule in broken(choice)]
    missing = _BY_NAME["compile-without-compiler"]
    if found or compiler or not holds(missing, choice):
        return found
    return [Problem(missing.key, missing.reason, hint, change_lines({"compile": "off"}), sources(missing))]


def cautions(combination: Combination) -> list[str]:
    """What works but is worth a line."""
    choice = {
        "zero": str(combination.zero_stage),
        "dtype": combination.dtype,
        "offload": combination.offload,
        "device": combination.device,
    }
    held = [rule for rule in CAUTIONS if holds(rule, choice)]
    several = combination.accumulate > 1
    return [
        rule.reason.format(**choice, accumulate=combination.accumulate)
        for rule in held
        if several or not rule.condition
    ]


def offload_reason(combination: Combination) -> str:
    """What is moved and who updates it; "" for no offload."""
    update = "updated there by torch's fused AdamW: no compiler needed"
    if combination.offload == "none":
        return ""
    if combination.offload == "optimizer":
        return f"optimizer states in CPU memory, {update}"
    return f"weights and optimizer states in CPU memory; weights gathered layer by layer, states {update}"
