"""The table of published models: counts, coverage, names, and what is said of families that are not trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.known_models import (
    KnownModel,
    did_you_mean,
    find_known,
    known_chat_template,
    known_models,
    nearest_models,
)
from launcher.model_facts import facts_of_known
from launcher.model_families import FAMILIES, REFUSED_TYPES, refusals_of
from trainer.turn_templates import turn_templates

SIZES = list({model.names: model for model in known_models()}.values())
LEGEND = re.findall(r"(?m)^#   ([a-z]+) ", Path("launcher/known_models.csv").read_text(encoding="utf-8"))
# What the first release names, as its models are called.
NAMED = [
    "Qwen/Qwen1.5-7B-Chat",
    "Qwen/Qwen2-7B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen3-8B",
    "internlm/internlm2-chat-7b",
    "internlm/internlm2_5-7b-chat",
    "internlm/internlm3-8b-instruct",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai/DeepSeek-V2-Lite",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.3-70B-Instruct",
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "google/gemma-2b",
    "google/gemma-2-9b",
    "google/gemma-3-1b-it",
    "google/gemma-3-4b-it",
    "microsoft/Phi-3-mini-4k-instruct",
    "microsoft/phi-4",
    "zai-org/chatglm3-6b",
    "zai-org/glm-4-9b-chat",
    "zai-org/glm-4-9b-chat-hf",
    "baichuan-inc/Baichuan2-7B-Chat",
    "01-ai/Yi-6B",
    "openbmb/MiniCPM-2B-sft-bf16",
    "openbmb/MiniCPM3-4B",
    "HuggingFaceTB/SmolLM2-1.7B",
]


@pytest.mark.parametrize("model", SIZES, ids=lambda m: m.model_id)
def test_sizes_give_the_published_number_of_parameters(model: KnownModel) -> None:
    facts = facts_of_known(model)
    assert facts.num_parameters == pytest.approx(model.num_parameters, rel=0.01)
    assert not facts.is_approximate
    exact = model.num_parameters % 10_000_000 and model.model_id != "mistralai/Mixtral-8x22B-Instruct-v0.1"
    assert not exact or facts.num_parameters == model.num_parameters


@pytest.mark.parametrize("model", SIZES, ids=lambda m: m.model_id)
def test_every_size_names_its_sources(model: KnownModel) -> None:
    sources = model.source.split("; ")
    assert len(sources) == 2
    assert set(sources) <= set(LEGEND)


def test_heads_divide_as_attention_needs() -> None:
    for model in SIZES:
        facts = facts_of_known(model)
        assert facts.num_heads % facts.num_kv_heads == 0, model.model_id
        assert facts.head_dim * facts.num_heads >= facts.hidden_size or facts.head_dim in (128, 256), model.model_id


def test_all_families_that_were_promised_are_there() -> None:
    found = [find_known(name) for name in NAMED]
    assert all(found)
    assert {model.family.name for model in found if model} >= set(FAMILIES) - {
        "qwen1.5-moe",
        "qwen3-moe",
        "minicpm5",
        "glm4-0414",
    }


def test_every_family_has_models_an_example_and_a_template() -> None:
    templates = turn_templates()
    for family in FAMILIES.values():
        example = find_known(family.example)
        assert example is not None, family.name
        assert example.family is family
        assert example.is_chat
        assert not family.template or family.template in templates, family.template


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("qwen/qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("Shanghai_AI_Laboratory/internlm2-chat-1_8b", "internlm/internlm2-chat-1_8b"),
        ("ZhipuAI/glm-4-9b-chat-hf", "zai-org/glm-4-9b-chat-hf"),
        ("LLM-Research/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("unsloth/gemma-3-1b-it", "google/gemma-3-1b-it"),
        ("someone/Qwen2.5-7B-Instruct", None),
        ("Qwen2.5-7B-Instruct", None),
    ],
)
def test_names_in_any_case_and_of_mirrors(name: str, same: str | None) -> None:
    found = find_known(name)
    assert (found.model_id if found else None) == same


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("Qwen/Qwen2.5-7B-Instuct", "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen3-8b", "Qwen/Qwen3-8B"),
        ("internlm2-chat", "internlm/internlm2-chat-7b"),
        ("lama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("gemma3-4b", "google/gemma-3-4b-pt"),
    ],
)
def test_a_bad_name_gets_the_three_nearest(name: str, first: str) -> None:
    near = nearest_models(name)
    assert near[0] == first
    assert len(set(near)) == 3
    assert did_you_mean(name) == f"Did you mean {near[0]}, {near[1]} or {near[2]}?"


def test_a_name_like_no_other_gets_none() -> None:
    assert nearest_models("zzzzzzzz") == []
    assert did_you_mean("zzzzzzzz") == ""


def test_who_brings_a_chat_template() -> None:
    assert known_chat_template("Qwen/Qwen2.5-7B") is True
    assert known_chat_template("google/gemma-3-1b-it") is True
    assert known_chat_template("google/gemma-3-1b-pt") is None
    assert known_chat_template("baichuan-inc/Baichuan2-7B-Chat") is None
    assert known_chat_template("a/b") is None


def test_refusals_name_a_model_that_is_trained() -> None:
    refused = [model for model in SIZES if refusals_of(facts_of_known(model))]
    assert {model.family.name for model in refused} == {
        "internlm2", "internlm2.5", "gemma2", "chatglm3", "glm4-code", "baichuan2", "minicpm",
    }  # fmt: skip
    for refusal in [r for model in refused for r in refusals_of(facts_of_known(model))] + list(REFUSED_TYPES.values()):
        names = [name for name in re.findall(r"[\w-]+/[\w.-]*[\w]", refusal.instead) if find_known(name)]
        assert any(not refusals_of(facts_of_known(find_known(name))) for name in names), refusal  # type: ignore[arg-type]


def test_rows_of_the_table_with_more_than_sizes() -> None:
    lite = facts_of_known(find_known("deepseek-ai/DeepSeek-V2-Lite"))  # type: ignore[arg-type]
    assert (lite.head_dim, lite.dense_layers, lite.shared_intermediate, lite.experts_per_token) == (192, 1, 2816, 6)
    assert lite.mlp_width == 6 * 1408 + 2816
    assert lite.attention == ("full", "latent")
    phi = facts_of_known(find_known("microsoft/Phi-3.5-mini-instruct"))  # type: ignore[arg-type]
    assert phi.stretches_beyond == 4096
    mistral = facts_of_known(find_known("mistralai/Mistral-7B-v0.1"))  # type: ignore[arg-type]
    assert (mistral.sliding_window, mistral.attention) == (4096, ("sliding window",))
