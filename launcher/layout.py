"""How ranks are laid out over devices: dp, sp, ZeRO stage and batch arithmetic, each with its reason. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cluster.inventory import Selection

from .combinations import (
    OFFLOAD_STAGES,
    Combination,
    cautions,
    choice_of,
    joins_experts,
    offload_reason,
    on_or_off,
    refusals,
)
from .compatibility import works
from .errors import Problem
from .memory import MemoryInputs, estimate
from .model_facts import ModelFacts
from .recipe_schema import Recipe
from .sequence_parallel import Candidate, allowed_sp, row_notes, size_problem, smallest_that_fits

_STAGES = {
    0: "nothing is sharded: weights, gradients and optimizer states are whole on every process",
    1: "optimizer states are sharded",
    2: "optimizer states and gradients are sharded, weights are whole",
    3: "weights are sharded too, and loaded in shards: no process holds the whole base",
}


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
    """Combinations that can be planned but not trained."""
    warnings: tuple[str, ...]
    choice: dict[str, str] = field(default_factory=dict)
    """The combination in the words of compatibility_table.py."""


def simplest_layout(selection: Selection) -> Layout:
    """Every process computes whole rows, one micro batch a step: what candidates are varied from."""
    world = selection.num_processes
    return Layout(world, world, 1, 2, 1, (), (), (), ())


def decide_layout(
    recipe: Recipe,
    selection: Selection,
    facts: ModelFacts | None,
    memory: MemoryInputs | None = None,
    budget_gb: float = 0.0,
) -> Layout:
    """Lay the run out over the selected devices. Never raises for a conflict: conflicts are in `problems`.

    `auto` needs the run's `memory` (its layout fields do not count) and `budget_gb`, what one process may use; without
    them it takes sp 1 and stage 2. Raises LaunchError for LoRA targets that match no layer.
    """
    world = selection.num_processes
    problems: list[Problem] = []
    sizes = _sizes(recipe, selection, facts, problems)
    stages = _stages(recipe, world, facts)
    candidates = _candidates(sizes, stages, world, memory) if budget_gb else []
    chosen = smallest_that_fits(candidates, budget_gb) if candidates else Candidate(sizes[0], stages[0], 0.0)
    sp, zero, dp = chosen.sp, chosen.zero_stage, world // chosen.sp
    accumulate, batch_reason = _batch(recipe, dp, problems)
    if sp > 1:
        batch_reason += f": the {sp} processes of a group share their rows"
    combination = Combination(
        recipe.method.name, zero, recipe.model.dtype, recipe.parallel.offload, selection.kind, accumulate, sp, world
    )
    reasons = [
        ("processes", f"{world} = dp {dp} x sp {sp}" + _sp_reason(recipe, facts, sizes, chosen, candidates, budget_gb)),
        ("ZeRO", f"stage {zero} ({_zero_reason(recipe, world, chosen, candidates, budget_gb)})"),
        ("offload", offload_reason(combination)),
        ("global batch", batch_reason),
    ]
    return Layout(
        world,
        dp,
        sp,
        zero,
        accumulate,
        tuple((name, text) for name, text in reasons if text),
        tuple(problems),
        tuple(refusals(combination, recipe, facts)),
        tuple(cautions(combination)),
        choice_of(combination, recipe),
    )


def _sizes(recipe: Recipe, selection: Selection, facts: ModelFacts | None, problems: list[Problem]) -> list[int]:
    """The sp to choose from; never empty."""
    wanted, world = recipe.parallel.sp, selection.num_processes
    allowed = allowed_sp(world, facts)
    if wanted == "auto":
        return allowed
    if wanted not in allowed:
        flag = "--cpu " if selection.kind == "cpu" else "--gpus free:"
        problems.append(size_problem(wanted, world, facts, flag))
        return [1]
    return [wanted]


def _stages(recipe: Recipe, world: int, facts: ModelFacts | None) -> list[int]:
    """The ZeRO stages to choose from, in order of preference; never empty."""
    if recipe.parallel.zero != "auto":
        return [recipe.parallel.zero]
    if recipe.parallel.offload == "parameters":
        return list(OFFLOAD_STAGES["parameters"])
    rest = {"generation": on_or_off(recipe.evaluate.samples_every_steps), "compile": on_or_off(recipe.train.compile)}
    return [2] if world == 1 or joins_experts(facts) or not works({**rest, "zero": "3"}) else [2, 3]


def _candidates(sizes: list[int], stages: list[int], world: int, memory: MemoryInputs | None) -> list[Candidate]:
    if memory is None or len(sizes) * len(stages) == 1:
        return []
    found = []
    for sp in sizes:
        for stage in stages:
            needs = estimate(replace(memory, dp=world // sp, sp=sp, zero_stage=stage)).total_gb
            found.append(Candidate(sp, stage, needs))
    return found


def _sp_reason(
    recipe: Recipe,
    facts: ModelFacts | None,
    sizes: list[int],
    chosen: Candidate,
    candidates: list[Candidate],
    budget_gb: float,
) -> str:
    sp = chosen.sp
    notes = [f"sp {sp}: that many processes share one row"] if sp > 1 else []
    if recipe.parallel.sp == "auto":
        notes = [_auto_sp_reason(sizes, chosen, candidates, budget_gb)]
    data = recipe.data
    notes += row_notes(sp, data.max_length * recipe.train.micro_batch, data.packing, facts)
    return f" ({'; '.join(notes)})" if notes else ""


def _auto_sp_reason(sizes: list[int], chosen: Candidate, candidates: list[Candidate], budget_gb: float) -> str:
    if len(sizes) == 1:
        return "sp auto: the processes and heads here allow 1 only"
    if not candidates:
        return "sp auto: 1, since the model's sizes or the memory here are unknown"
    least = {n: min(c.needs_gb for c in candidates if c.sp == n) for n in sizes if n < chosen.sp}
    tried = ", ".join(f"sp {n} needs {gb:.1f} GB" for n, gb in {**least, chosen.sp: chosen.needs_gb}.items())
    text = f"sp auto: {tried}; {budget_gb:.1f} GB are free for a process"
    return text if chosen.needs_gb <= budget_gb else f"{text}, so no size fits and the largest is taken"


def _zero_reason(recipe: Recipe, world: int, chosen: Candidate, candidates: list[Candidate], budget_gb: float) -> str:
    what = _STAGES[chosen.zero_stage] if world > 1 else "one process: there is nothing to shard"
    if recipe.parallel.zero != "auto":
        return f"parallel.zero: {what}"
    if recipe.parallel.offload == "parameters":
        return f"auto: what offload: parameters needs; {what}"
    if chosen.zero_stage == 3:
        two = next(c.needs_gb for c in candidates if (c.sp, c.zero_stage) == (chosen.sp, 2))
        needs = f"stage 2 needs {two:.1f} GB, stage 3 {chosen.needs_gb:.1f} GB, {budget_gb:.1f} GB are free"
        return f"auto: {needs}; {what}"
    return f"auto: {what}"


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
