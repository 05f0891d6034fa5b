"""Every family of the launcher's table against transformers' own code: layers, targets, sizes, and packed attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import LaunchError
from launcher.model_facts import read_facts
from launcher.model_families import FAMILIES, REFUSED_TYPES
from launcher.model_layers import ModelFacts, linear_layers, lora_parameters
from launcher.model_source import SourceRef
from trainer import attention
from trainer.model import PackedLanguageModel, decoder_only
from trainer.spec import TrainError

TYPES = sorted({family.model_type for family in FAMILIES.values()} - set(REFUSED_TYPES))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "num_key_value_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 16},
    "deepseek_v2": {
        **EXPERTS,
        **LATENT,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "q_lora_rank": None,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
    },
    "minicpm3": {**LATENT, "q_lora_rank": 24, "v_head_dim": 20},
    "gemma3_text": {"head_dim": 24, "sliding_window": 8},
    "mistral": {"sliding_window": 6},
} | {name: {"head_dim": 24} for name in ("qwen3", "internlm3", "glm", "glm4", "gemma", "gemma2")}
LENGTHS = (12, 9, 19)
# A gate with one output: an adapter on it would only shift how much the shared expert counts.
# And names that PEFT takes for the joined experts of DeepSeek-V2, so that its other layers of these names cannot be named.
EXPERT_NAMES = {
    "mixtral": ("w1", "w2", "w3", "gate"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj", "gate"),
    "deepseek_v2": ("gate_proj", "up_proj", "down_proj", "gate"),
}
NO_TARGETS = {"qwen2_moe": {"shared_expert_gate"}, "deepseek_v2": {"gate_proj", "up_proj", "down_proj"}}


def config_of(model_type: str) -> Any:
    return AutoConfig.for_model(model_type, **{**SIZES, **MORE.get(model_type, {})})


def model_of(model_type: str, implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(model_type), attn_implementation=implementation)


def facts_of(model_type: str, folder: Path) -> ModelFacts:
    (folder / "config.json").write_text(json.dumps(config_of(model_type).to_dict(), default=str), encoding="utf-8")
    found = read_facts(SourceRef("random", str(folder), "tiny"))
    assert found is not None
    return found


def layers_of(model: Any) -> dict[str, list[tuple[int, int]]]:
    """Name below its decoder layer -> (inputs, outputs) of each linear layer of that name."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            below = name.split(".layers.")[1].partition(".")[2]
            found.setdefault(below, []).append((module.in_features, module.out_features))
    return found


@pytest.mark.parametrize("model_type", TYPES)
def test_layers_and_parameters_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    model, facts = model_of(model_type), facts_of(model_type, tmp_path)
    ours = {name: [(layer.inputs, layer.outputs)] * layer.layers for name, layer in linear_layers(facts).items()}
    assert ours == layers_of(model)
    assert facts.num_parameters == model.num_parameters()
    assert not facts.is_approximate


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.model_type in TYPES], ids=lambda f: f.name)
def test_targets_are_all_linear_layers(family: Any) -> None:
    names = {name.rpartition(".")[2] for name in layers_of(model_of(family.model_type))}
    assert set(family.targets) == names - NO_TARGETS.get(family.model_type, set())


@pytest.mark.parametrize("model_type", TYPES)
def test_adapters_have_the_size_that_is_planned(model_type: str, tmp_path: Path) -> None:
    facts = facts_of(model_type, tmp_path)
    targets = next(f.targets for f in FAMILIES.values() if f.model_type == model_type)
    lists = [
        list(targets),
        ["q_proj", "gate_proj", "up_proj"],
        ["o_proj", "w1", "w2", "w3"],
        ["o_proj", "down_proj", "gate"],
    ]
    known = {name.rpartition(".")[2] for name in linear_layers(facts)} | set(EXPERT_NAMES.get(model_type, ()))
    for chosen in ("all-linear", *(names for names in lists if set(names) <= known)):
        config = LoraConfig(r=4, target_modules=chosen, task_type="CAUSAL_LM")
        peft_model: Any = get_peft_model(model_of(model_type), config)
        planned = lora_parameters(facts, 4, ("all-linear",) if chosen == "all-linear" else tuple(chosen))
        assert peft_model.get_nb_trainable_parameters()[0] == planned, chosen


def test_half_of_a_joined_expert_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="w1 and w3 of the experts of mixtral are one tensor"):
        lora_parameters(facts_of("mixtral", tmp_path), 4, ("q_proj", "w1"))


def packed_loss(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    """Summed loss of the rows, laid end to end."""
    ids, positions = torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]
    return PackedLanguageModel(model)(ids, ids.clone(), positions, tuple(len(row) for row in rows))


@pytest.mark.parametrize("model_type", [name for name in TYPES if name != "gemma2"])
def test_packed_documents_have_the_loss_of_single_ones(model_type: str) -> None:
    attention.register()
    model = model_of(model_type, attention.NAME).train()
    rows = [torch.randint(1, 128, (length,)) for length in LENGTHS]
    packed, single = packed_loss(model, rows), sum(packed_loss(model, [row]) for row in rows)
    torch.testing.assert_close(packed, single, rtol=1e-5, atol=1e-4)
    packed.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_capped_attention_is_refused_where_it_would_be_computed() -> None:
    attention.register()
    with pytest.raises(TrainError, match="softcap"):
        packed_loss(model_of("gemma2", attention.NAME), [torch.arange(1, 9)])


def vision_model() -> Any:
    text = {**SIZES, "head_dim": 24, "sliding_window": 8, "model_type": "gemma3_text"}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 56, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)


def test_of_a_model_with_a_vision_tower_the_decoder_alone_is_adapted() -> None:
    attention.register()
    model = vision_model()
    excluded = decoder_only(model)
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=excluded, task_type="CAUSAL_LM")
    peft_model: Any = get_peft_model(model, config)
    adapted = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert adapted
    assert all("language_model.layers" in name for name in adapted)
    packed_loss(peft_model, [torch.randint(1, 128, (length,)) for length in LENGTHS]).backward()
    assert all(p.grad is not None for p in peft_model.parameters() if p.requires_grad)


def test_of_a_plain_decoder_nothing_is_left_out() -> None:
    assert decoder_only(model_of("llama")) is None
