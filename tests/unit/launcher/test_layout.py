"""Batch arithmetic and layout: every number with its reason, every conflict with what is allowed."""

import dataclasses

import pytest

from cluster.inventory import Device, Selection
from launcher.layout import decide_layout
from launcher.memory import MemoryInputs, estimate
from launcher.model_facts import ModelFacts
from launcher.recipe_schema import Recipe


def gpus(count: int) -> Selection:
    devices = tuple(Device(str(i), "A100", f"GPU-{i}", 80.0, 79.0, False, False, "") for i in range(count))
    return Selection("cuda", devices, count, 4)


def recipe(**sections: object) -> Recipe:
    base = {"model": {"source": "a/b"}, "method": {"name": "lora"}, "data": {"files": [{"path": "x.jsonl"}]}}
    return Recipe.model_validate({**base, **sections})


def facts(num_heads: int = 9, num_kv_heads: int = 3) -> ModelFacts:
    return ModelFacts(
        model_type="llama",
        num_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_positions=8192,
        sliding_window=None,
        attention=("full",),
        num_experts=0,
        num_parameters=134_515_008,
        num_linear_parameters=106_168_320,
        weight_bytes_on_disk=0,
        has_chat_template=True,
        known_from="config.json",
        is_approximate=False,
    )


@pytest.mark.parametrize(
    ("train", "world", "accumulate", "text"),
    [
        ({}, 1, 1, "1 rows = micro 1 x accumulate 1 x dp 1"),
        ({"global_batch": 64, "micro_batch": 2}, 2, 16, "64 rows = micro 2 x accumulate 16 x dp 2"),
        ({"accumulate": 4}, 4, 4, "16 rows = micro 1 x accumulate 4 x dp 4"),
        ({"accumulate": 4, "global_batch": 8}, 2, 4, "8 rows = micro 1 x accumulate 4 x dp 2"),
    ],
)
def test_batch_arithmetic(train: dict, world: int, accumulate: int, text: str) -> None:
    layout = decide_layout(recipe(train=train), gpus(world), facts())
    assert not layout.problems
    assert layout.accumulate == accumulate
    assert dict(layout.reasons)["global batch"] == text


@pytest.mark.parametrize(
    ("train", "world", "allowed"),
    [
        ({"global_batch": 10}, 4, "8, 4"),
        ({"global_batch": 2}, 4, "4"),
        ({"global_batch": 16, "accumulate": 3}, 4, "12"),
    ],
)
def test_global_batch_that_does_not_fit_names_what_does(train: dict, world: int, allowed: str) -> None:
    (problem,) = decide_layout(recipe(train=train), gpus(world), facts()).problems
    assert problem.where == "train.global_batch"
    assert all(number in problem.hint for number in allowed.split(", "))


SMALL, LARGE = 134_515_008, 6_000_000_000
"""Parameters. ZeRO-3 gathers a small model whole, so it needs more than stage 2; a large one it halves and more."""


def memory(num_parameters: int) -> MemoryInputs:
    return MemoryInputs(
        facts=dataclasses.replace(facts(), num_parameters=num_parameters),
        kind="hub",
        method="lora",
        rank=16,
        targets=("all-linear",),
        dropout=0.0,
        double_quant=True,
        dtype="bf16",
        micro_batch=1,
        max_length=65536,
        gradient_checkpointing=True,
        device="cuda",
        dp=1,
        sp=1,
        zero_stage=2,
        offload="none",
        keep=2,
        copies_checkpoint=False,
    )


def needs(sp: int, zero: int, world: int, inputs: MemoryInputs) -> float:
    return estimate(dataclasses.replace(inputs, dp=world // sp, sp=sp, zero_stage=zero)).total_gb


@pytest.mark.parametrize(
    ("size", "world", "fitting", "sp", "zero"),
    [
        (SMALL, 9, (1, 2), 1, 2),
        (SMALL, 9, (3, 2), 3, 2),
        (SMALL, 9, (9, 2), 9, 2),
        (SMALL, 6, (3, 2), 3, 2),
        (SMALL, 9, None, 9, 3),
        (LARGE, 9, (1, 2), 1, 2),
        (LARGE, 9, (1, 3), 1, 3),
        (LARGE, 9, (3, 3), 3, 3),
        (LARGE, 9, None, 9, 3),
    ],
)
def test_auto_takes_the_smallest_sp_and_then_the_lowest_stage_that_fit(
    size: int, world: int, fitting: tuple[int, int] | None, sp: int, zero: int
) -> None:
    """`fitting`: the budget is exactly what this (sp, stage) needs."""
    inputs = memory(size)
    budget = needs(*fitting, world, inputs) if fitting else 0.1
    layout = decide_layout(recipe(parallel={"sp": "auto"}), gpus(world), facts(), inputs, budget)
    assert (layout.sp, layout.zero_stage, layout.dp) == (sp, zero, world // sp)
    reason = dict(layout.reasons)["processes"]
    assert f"sp {sp} needs {needs(sp, zero, world, inputs):.1f} GB" in reason
    assert f"{budget:.1f} GB are free" in reason
    assert ("no size fits" in reason) == (fitting is None)


def test_auto_stage_three_says_what_both_stages_need() -> None:
    inputs = memory(LARGE)
    layout = decide_layout(recipe(), gpus(4), facts(), inputs, needs(1, 3, 4, inputs))
    assert layout.zero_stage == 3
    reason = dict(layout.reasons)["ZeRO"]
    assert f"stage 2 needs {needs(1, 2, 4, inputs):.1f} GB" in reason
    assert f"stage 3 {needs(1, 3, 4, inputs):.1f} GB" in reason


@pytest.mark.parametrize(
    ("sections", "world", "stage"),
    [
        ({}, 4, 2),
        ({}, 1, 2),
        ({"parallel": {"zero": 0}}, 4, 0),
        ({"parallel": {"offload": "optimizer"}}, 4, 2),
        ({"parallel": {"offload": "parameters"}}, 4, 3),
        ({"parallel": {"offload": "parameters"}}, 1, 3),
    ],
)
def test_stage_where_memory_is_unknown(sections: dict, world: int, stage: int) -> None:
    layout = decide_layout(recipe(**sections), gpus(world), facts())
    assert layout.zero_stage == stage
    assert not layout.refusals


def test_auto_does_not_choose_a_stage_under_which_samples_cannot_be_answered() -> None:
    chosen = recipe(evaluate={"samples_every_steps": 5})
    layout = decide_layout(chosen, gpus(4), facts(), memory(LARGE), 0.1)
    assert layout.zero_stage == 2
    assert not layout.refusals


def test_auto_sp_is_one_where_nothing_is_known() -> None:
    for known, budget in ((None, 24.0), (memory(SMALL), 0.0)):
        layout = decide_layout(recipe(parallel={"sp": "auto"}), gpus(9), facts(), known, budget)
        assert layout.sp == 1
        assert "unknown" in dict(layout.reasons)["processes"]


def test_ranks_that_share_rows_lower_the_global_batch() -> None:
    layout = decide_layout(recipe(parallel={"sp": 3}, train={"global_batch": 12}), gpus(6), facts())
    assert (layout.dp, layout.sp, layout.accumulate) == (2, 3, 6)
    assert dict(layout.reasons)["global batch"].startswith("12 rows = micro 1 x accumulate 6 x dp 2: the 3 processes")
    assert "each computes 683 of the 2048 tokens of a micro batch, padded to 2049" in dict(layout.reasons)["processes"]


def test_sequence_parallel_size_that_does_not_fit_is_a_conflict() -> None:
    (problem,) = decide_layout(recipe(parallel={"sp": 2}), gpus(6), facts()).problems
    assert problem.where == "parallel.sp"
    assert "9 heads (3 kv)" in problem.message
    assert "1, 3" in problem.hint


def test_offload_says_that_no_compiler_is_needed() -> None:
    layout = decide_layout(recipe(parallel={"offload": "optimizer"}), gpus(2), facts())
    assert "no compiler needed" in dict(layout.reasons)["offload"]
    assert "offload" not in dict(decide_layout(recipe(), gpus(2), facts()).reasons)


@pytest.mark.parametrize(
    ("sections", "family", "stage"),
    [
        ({}, "llama", 3),
        ({}, "mixtral", 2),
        ({"train": {"compile": True}}, "llama", 2),
        ({"evaluate": {"samples_every_steps": 5}}, "llama", 2),
    ],
)
def test_auto_never_takes_a_stage_that_is_refused(sections: dict, family: str, stage: int) -> None:
    """Although stage 2 does not fit."""
    known = dataclasses.replace(facts(), model_type=family, num_experts=8 * (family == "mixtral"))
    layout = decide_layout(recipe(**sections), gpus(4), known, memory(LARGE), 0.1)
    assert layout.zero_stage == stage
    assert not layout.refusals
