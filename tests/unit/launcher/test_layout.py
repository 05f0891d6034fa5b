"""Batch arithmetic and layout: every number with its reason, every conflict with what is allowed."""

import dataclasses

import pytest

from cluster.inventory import Device, Selection
from launcher.layout import allowed_sp, decide_layout
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


def test_sequence_parallel_sizes_divide_world_and_heads() -> None:
    assert allowed_sp(9, facts()) == [1, 3, 9]
    assert allowed_sp(4, facts(28, 4)) == [1, 2, 4]
    assert allowed_sp(8, facts(32, 2)) == [1, 2, 4, 8]
    assert allowed_sp(6, None) == [1, 2, 3, 6]


def test_sequence_parallel_size_that_does_not_fit_lists_the_allowed_ones() -> None:
    (problem,) = decide_layout(recipe(parallel={"sp": 2}), gpus(6), facts()).problems
    assert problem.where == "parallel.sp"
    assert "9 heads (3 kv)" in problem.message
    assert "1, 3" in problem.hint


def test_model_family_without_usable_code_is_refused_with_a_way_out() -> None:
    internlm2 = dataclasses.replace(facts(), model_type="internlm2")
    (refusal,) = decide_layout(recipe(), gpus(1), internlm2).refusals
    assert refusal.where == "model.source"
    assert "convert2llama.py" in refusal.hint


def test_what_cannot_be_trained_yet_is_a_refusal_with_a_way_out() -> None:
    chosen = recipe(
        method={"name": "qlora"}, parallel={"zero": 3, "offload": "optimizer"}, evaluate={"samples_every_steps": 5}
    )
    layout = decide_layout(chosen, gpus(2), facts())
    assert not layout.problems
    assert {r.where for r in layout.refusals} == {"parallel.zero", "parallel.offload", "evaluate.samples_every_steps"}
    assert all(r.hint for r in layout.refusals)
