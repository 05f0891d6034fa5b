"""Kinds of attention from config.json and GGUF metadata, and which models are refused for them."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.attention_kinds import REFUSED, kinds_of_config, kinds_of_gguf


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"model_type": "llama"}, "full"),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, "full"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding window"),
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}, "full, sliding window"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": None}, "full"),
        ({"model_type": "gemma2"}, "full, softcapped"),
        ({"model_type": "gemma2", "attn_logit_softcapping": None}, "full"),
        ({"model_type": "grok", "attn_logit_softcapping": 30.0}, "full, softcapped"),
        (
            {"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"]},
            "full, sinks, sliding window",
        ),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "full, latent"),
        ({"model_type": "deepseek_v32", "kv_lora_rank": 512, "index_topk": 2048}, "full, latent, sparse"),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, "chunked"),
        ({"model_type": "llama4_text", "layer_types": ["chunked_attention", "full_attention"]}, "chunked, full"),
        ({"model_type": "qwen3_next", "full_attention_interval": 4}, "recurrent"),
        ({"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]}, "full, recurrent"),
        ({"model_type": "jamba", "attn_layer_period": 8}, "recurrent"),
        ({"model_type": "lfm2", "full_attn_idxs": [2, 5], "conv_L_cache": 3}, "recurrent"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "full, recurrent"),
        ({"model_type": "falcon_h1", "mamba_d_state": 256}, "recurrent"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}, "full, recurrent"),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention"], "mamba_d_state": 256}, "full"),
        ({"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention"]}, "full, recurrent"),
        ({"model_type": "recurrent_gemma", "block_types": ["recurrent", "attention"]}, "full, recurrent"),
        ({"model_type": "of_tomorrow", "mamba_d_state": 16}, "recurrent"),
        ({"model_type": "of_tomorrow", "layer_types": ["quantum_attention"]}, "sparse"),
    ],
)
def test_kinds_of_config(config: dict[str, Any], kinds: str) -> None:
    assert ", ".join(kinds_of_config(config)) == kinds


@pytest.mark.parametrize(
    ("arch", "metadata", "tensors", "kinds"),
    [
        ("llama", {}, ["blk.0.attn_q.weight"], "full"),
        ("gemma3", {"gemma3.attention.sliding_window": 512}, [], "sliding window"),
        ("gemma2", {"gemma2.attn_logit_softcapping": 50.0, "gemma2.attention.sliding_window": 4096}, [],
         "sliding window, softcapped"),
        ("gpt-oss", {"gpt-oss.attention.sliding_window": 128}, ["blk.0.attn_sinks.weight"], "sinks, sliding window"),
        ("jamba", {"jamba.ssm.conv_kernel": 4}, [], "recurrent"),
        ("qwen3next", {"qwen3next.ssm.state_size": 128}, [], "recurrent"),
        ("lfm2", {"lfm2.shortconv.l_cache": 3}, [], "recurrent"),
        ("rwkv7", {}, [], "recurrent"),
        ("deepseek2", {"deepseek2.attention.kv_lora_rank": 512}, [], "latent"),
        ("llama4", {}, [], "chunked"),
    ],
)  # fmt: skip
def test_kinds_of_gguf(arch: str, metadata: dict[str, Any], tensors: list[str], kinds: str) -> None:
    assert ", ".join(kinds_of_gguf(arch, metadata, tensors)) == kinds


def test_softmax_attention_is_never_refused() -> None:
    assert not {"full", "sliding window", "latent"} & set(REFUSED)


def test_families_of_the_installed_transformers_are_recognised_from_their_defaults() -> None:
    """A family whose own code has a recurrent state, sinks or capped scores must not pass as plain attention."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    expected = {
        "bamba": "recurrent", "falcon_h1": "recurrent", "jamba": "recurrent", "lfm2_moe": "recurrent",
        "minimax": "recurrent", "nemotron_h": "recurrent", "olmo_hybrid": "recurrent", "qwen3_5_text": "recurrent",
        "qwen3_next": "recurrent", "zamba2": "recurrent", "gpt_oss": "sinks", "mimo_v2_flash": "sinks",
        "gemma2": "softcapped", "llama4_text": "chunked", "deepseek_v32": "sparse", "deepseek_v3": "latent",
    }  # fmt: skip
    for family, kind in expected.items():
        assert kind in kinds_of_config(CONFIG_MAPPING[family]().to_dict()), family
    for family in ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "smollm3", "olmo2", "granite"):
        assert not set(kinds_of_config(CONFIG_MAPPING[family]().to_dict())) & set(REFUSED), family
