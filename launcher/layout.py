"""How ranks are laid out over devices: dp, sp, ZeRO stage and batch arithmetic, each with its reason. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.inventory import Selection

from .errors import Problem
from .model_facts import ModelFacts
from .recipe_schema import Recipe


@dataclass(frozen=True)
class Layout:
    world_size: int
    dp: int
    sp: int
    zero_stage: int
    accumulate: int
    reasons: tuple[tuple[str, str], ...]
    """(name, arithmetic) in the order in which the plan shows them."""
    problems: tuple[Problem, ...]
    """Conflicts; `where` is the recipe key."""
    refusals: tuple[Problem, ...]
    """Combinations that are planned but that this version does not train yet."""


def decide_layout(recipe: Recipe, selection: Selection, facts: ModelFacts | None) -> Layout:
    """Lay the run out over the selected devices. Never raises: conflicts are in `problems`."""
    world = selection.num_processes
    problems: list[Problem] = []
    sp, sp_reason = _sequence_parallel(recipe, world, facts, problems)
    dp = world // sp
    zero, zero_reason = _zero(recipe)
    accumulate, batch_reason = _batch(recipe, dp, problems)
    reasons = (
        ("processes", f"{world} = dp {dp} x sp {sp}" + (f" ({sp_reason})" if sp_reason else "")),
        ("ZeRO", f"stage {zero} ({zero_reason})"),
        ("global batch", batch_reason),
    )
    refusals = (*_without_model_code(facts), *_not_yet(recipe, sp, zero))
    return Layout(world, dp, sp, zero, accumulate, reasons, tuple(problems), refusals)


def allowed_sp(world: int, facts: ModelFacts | None) -> list[int]:
    """Sizes that Ulysses can do: they divide the world and the heads, and they and the kv heads divide one another.

    Source: deepspeed/runtime/sequence_parallel/ulysses_sp.py.
    """
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    if facts is None:
        return sizes
    kv = facts.num_kv_heads
    return [n for n in sizes if facts.num_heads % n == 0 and (kv % n == 0 or n % kv == 0)]


def _sequence_parallel(
    recipe: Recipe, world: int, facts: ModelFacts | None, problems: list[Problem]
) -> tuple[int, str]:
    wanted = recipe.parallel.sp
    if wanted == "auto":
        return 1, "sp auto: one device holds a row"
    allowed = allowed_sp(world, facts)
    if wanted in allowed:
        return wanted, "" if wanted == 1 else f"sp {wanted}: that many devices share one row"
    heads = f" and {facts.num_heads} heads ({facts.num_kv_heads} kv)" if facts else ""
    problems.append(
        Problem(
            "parallel.sp",
            f"sp {wanted} does not fit {world} process{'es' if world > 1 else ''}{heads}",
            f"Allowed: {', '.join(map(str, allowed))}.",
        )
    )
    return 1, ""


def _zero(recipe: Recipe) -> tuple[int, str]:
    if recipe.parallel.zero == 3:
        return 3, "parallel.zero: weights are sharded too, once each process has loaded them"
    if recipe.parallel.zero != "auto":
        return recipe.parallel.zero, "parallel.zero"
    return 2, "auto: optimizer states and gradients are sharded, weights are whole"


def _batch(recipe: Recipe, dp: int, problems: list[Problem]) -> tuple[int, str]:
    train = recipe.train
    micro = train.micro_batch
    accumulate = train.accumulate
    if train.global_batch is not None:
        per_step = micro * dp * (accumulate or 1)
        if train.global_batch % per_step or (accumulate and train.global_batch != per_step):
            parts = f"micro_batch {micro} x dp {dp}" + (f" x accumulate {accumulate}" if accumulate else "")
            fits = sorted({max(1, round(train.global_batch / per_step)) * per_step, per_step})
            problems.append(
                Problem(
                    "train.global_batch",
                    f"global_batch {train.global_batch} is not a multiple of {parts}",
                    f"Allowed here: {', '.join(map(str, fits))} or another multiple of {micro * dp}.",
                )
            )
        accumulate = accumulate or max(1, train.global_batch // per_step)
    accumulate = accumulate or 1
    total = micro * accumulate * dp
    return accumulate, f"{total} rows = micro {micro} x accumulate {accumulate} x dp {dp}"


def _without_model_code(facts: ModelFacts | None) -> list[Problem]:
    """Families whose only code comes with the weights and was written for transformers 4."""
    if facts is None or facts.model_type != "internlm2":
        return []
    hint = (
        "InternLM's own tools/convert2llama.py (github.com/InternLM/InternLM) writes the same weights in Llama's format:\n"
        "run it once and give its output folder as model.source; the rest of the recipe stays as it is."
    )
    return [
        Problem("model.source", "transformers has no InternLM2, and the code beside its weights fits version 4", hint)
    ]


def _not_yet(recipe: Recipe, sp: int, zero: int) -> list[Problem]:
    """Combinations that this version plans but cannot train."""
    problems = []
    if zero == 3 and recipe.method.name == "qlora":
        hint = "Use parallel.zero: 2, or method: lora."
        problems.append(Problem("parallel.zero", "QLoRA under ZeRO stage 3 cannot be trained by this version", hint))
    if zero == 3 and recipe.evaluate.samples_every_steps:
        hint = "Use evaluate.samples_every_steps: 0, or parallel.zero: 2."
        problems.append(Problem("evaluate.samples_every_steps", "no rank holds the whole model under ZeRO-3", hint))
    if zero == 0:
        problems.append(Problem("parallel.zero", "ZeRO stage 0 cannot be trained by this version", "Use 1 or 2."))
    if sp > 1:
        hint = "Use parallel.sp: 1 with a shorter data.max_length."
        problems.append(Problem("parallel.sp", "sequence parallelism cannot be trained by this version", hint))
    if recipe.parallel.offload != "none":
        hint = "Use parallel.offload: none."
        problems.append(Problem("parallel.offload", "offloading cannot be trained by this version", hint))
    return problems
