"""Weights that a token is multiplied with, and the machine's rate, measured and kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.handmade_run import make_spec
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trainer.engine import Ranks
from trainer.model import PackedLanguageModel
from trainer.throughput import (
    MEASUREMENTS,
    RATES_FILE,
    Throughput,
    flops_per_token,
    matmul_parameters,
    measure_rate,
    product_shape,
    read_rates,
)

SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
HEAD = 32 * 100


def llama(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_tables_do_not_count_and_heads_do(tied: bool) -> None:
    model = llama(tied)
    assert matmul_parameters(model, model.config) == 2 * LAYER + HEAD


def test_adapters_count() -> None:
    model = get_peft_model(llama(True), LoraConfig(r=4, target_modules=["q_proj"]))
    assert matmul_parameters(model, model.config) == 2 * LAYER + HEAD + 2 * (4 * 32 + 32 * 4)


def test_of_experts_the_share_counts_that_a_token_is_sent_to() -> None:
    experts: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = Qwen3MoeConfig(**SIZES, **experts)
    model = Qwen3MoeForCausalLM(config)
    attention, router, expert = 2 * 32 * 32 + 2 * 32 * 16, 32 * 8, 3 * 32 * 16
    assert matmul_parameters(model, config) == 2 * (attention + router + 2 * expert) + HEAD


@pytest.mark.parametrize(("method", "flops"), [("lora", 400), ("qlora", 400), ("full", 600)])
def test_flops_per_token(method: str, flops: int) -> None:
    assert flops_per_token(100, method) == flops


@pytest.mark.parametrize(
    ("hidden", "inner", "device", "shape"),
    [
        (576, 1536, "cpu", (1024, 576, 1536)),
        (32, 64, "cpu", (1024, 512, 1024)),  # too small to tell anything
        (576, None, "cpu", (1024, 576, 2304)),
        (576, [64, 128], "cpu", (1024, 576, 2304)),
        (4096, 11008, "cpu", (88, 4096, 11008)),
        (576, 1536, "cuda", (8192, 4096, 4096)),
    ],
)
def test_product_shape(hidden: int, inner: object, device: str, shape: tuple[int, int, int]) -> None:
    assert product_shape(hidden, inner, device) == shape


def test_the_rate_is_that_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    import trainer.throughput

    monkeypatch.setattr(trainer.throughput, "best_seconds", lambda product, device: 0.5 * len(product().shape))
    assert measure_rate((4, 5, 6), torch.float32, torch.device("cpu")) == 2 * 4 * 5 * 6


@pytest.fixture
def throughput(tmp_path: Path) -> Throughput:
    spec = make_spec(tmp_path)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, cache_dir=str(tmp_path / "cache")))
    ranks = Ranks(rank=0, local_rank=0, world_size=2, dp_rank=0, sp_rank=0, device=torch.device("cpu"))
    return Throughput(spec, ranks, PackedLanguageModel(llama(True)))


def test_share_of_peak_counts_every_process(throughput: Throughput) -> None:
    assert throughput.share_of_peak(1000, 1.0) is None
    throughput.rates = [1e9, 4e9, 2e9]
    flops = 4 * (2 * LAYER + HEAD) * 1000
    assert throughput.share_of_peak(1000, 0.5) == pytest.approx(flops / 0.5 / (2 * 4e9))


def test_the_best_of_a_few_runs_is_kept(throughput: Throughput) -> None:
    throughput.file.parent.mkdir()
    throughput.file.write_text(json.dumps({"other machine": [1.0]}), encoding="utf-8")
    for n in range(1, MEASUREMENTS + 2):
        throughput.measure()
        assert len(throughput.rates) == min(n, MEASUREMENTS)
    assert read_rates(throughput.file) == {"other machine": [1.0], throughput.key: throughput.rates}
    assert all(rate > 1e8 for rate in throughput.rates)
    assert "fp32 | " in throughput.key
    assert throughput.key.endswith("1024x512x1024")


def test_a_cache_that_cannot_be_written_stops_nothing(
    throughput: Throughput, capsys: pytest.CaptureFixture[str]
) -> None:
    throughput.file.parent.write_text("a file where the cache folder should be", encoding="utf-8")
    throughput.measure()
    assert throughput.share_of_peak(1000, 1.0)
    assert "the matrix product rate is not kept: cannot write" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ufeff{}"])
def test_a_damaged_file_is_measured_anew(throughput: Throughput, text: str) -> None:
    throughput.file.parent.mkdir()
    throughput.file.write_text(text, encoding="utf-8")
    assert read_rates(throughput.file) == {}
    throughput.measure()
    assert list(read_rates(throughput.file)) == [throughput.key]
    assert throughput.file.name == RATES_FILE
