"""Which kinds of attention a model has, and which of them cannot be trained with several documents in a row. Pure.

Documents of a row are kept apart by the attention function alone, so whatever else mixes positions is refused here.
Sources: the names in transformers' configuration_utils.ALLOWED_ATTN_LAYER_TYPES and its models' config files;
the keys in llama.cpp's src/llama-arch.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .compatibility_table import AXES, CHUNKED, FULL, LATENT, RECURRENT, RULES, SINKS, SLIDING, SOFTCAPPED, SPARSE

REFUSED: dict[str, str] = {
    kind: rule.reason for kind in AXES["attention"].values for rule in RULES if rule.when == {"attention": (kind,)}
}
"""Kind of attention -> why such a model is not trained."""

_LAYER_TYPES = {
    "attention": FULL,
    "full_attention": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": CHUNKED,
    "linear_attention": RECURRENT,
    "conv": RECURRENT,
    "hybrid": RECURRENT,
    "hybrid_sliding": RECURRENT,
    "mamba": RECURRENT,
    "mamba2": RECURRENT,
    "recurrent": RECURRENT,
    "moe": None,
    "mlp": None,
    "dense": None,
}
"""Entries of `layer_types` (and of its older names); None: a layer without attention. Any other is sparse."""

_RECURRENT_FAMILIES = frozenset(
    [
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "inkling2_text",
        "inkling_text",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
        "zaya",
    ]
)
_RECURRENT_KEYS = (
    "mamba_d_state",
    "ssm_state_size",
    "linear_num_value_heads",
    "linear_conv_kernel_dim",
    "conv_L_cache",
)
_SINK_FAMILIES = frozenset(
    [
        "deepseek_v4",
        "flint",
        "gpt_oss",
        "granite_swa",
        "granitemoe_swa",
        "hy_v4",
        "mimo_v2_flash",
        "openai_privacy_filter",
    ]
)
_SOFTCAPPED_BY_DEFAULT = frozenset(("gemma2", "t5gemma", "vaultgemma"))
_RECURRENT_ARCHS = frozenset(
    ["mamba", "mamba2", "jamba", "falcon-h1", "lfm2", "lfm2moe", "plamo2", "granitehybrid", "nemotron_h"]
)


def kinds_of_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of a decoder's config.json (of its `text_config` where there is one), sorted; never empty."""
    family = str(config.get("model_type", ""))
    kinds = _kinds_of_layers(config, family)
    if config.get("attn_logit_softcapping", 50.0 if family in _SOFTCAPPED_BY_DEFAULT else None):
        kinds.add(SOFTCAPPED)
    if family in _SINK_FAMILIES:
        kinds.add(SINKS)
    if config.get("kv_lora_rank"):
        kinds.add(LATENT)
    if config.get("index_topk"):
        kinds.add(SPARSE)
    return tuple(sorted(kinds or {FULL}))


def _kinds_of_layers(config: Mapping[str, Any], family: str) -> set[str]:
    layers = config.get("layer_types") or config.get("layers_block_type") or config.get("block_types")
    if isinstance(layers, list) and layers:
        found = {_LAYER_TYPES.get(str(layer), SPARSE) for layer in layers}
        return {kind for kind in found if kind is not None}
    if family in _RECURRENT_FAMILIES or any(config.get(key) for key in _RECURRENT_KEYS):
        return {RECURRENT}
    if family.startswith("llama4") and config.get("attention_chunk_size", 8192):
        return {CHUNKED}
    return {SLIDING} if config.get("sliding_window") and config.get("use_sliding_window", True) else {FULL}


def kinds_of_gguf(arch: str, metadata: Mapping[str, Any], tensor_names: Iterable[str]) -> tuple[str, ...]:
    """The kinds of a GGUF file's model, sorted; never empty."""
    kinds = set()
    has_state = any(key.startswith((f"{arch}.ssm.", f"{arch}.shortconv.", f"{arch}.wkv.")) for key in metadata)
    if has_state or arch in _RECURRENT_ARCHS or arch.startswith("rwkv"):
        kinds.add(RECURRENT)
    if arch == "llama4":
        kinds.add(CHUNKED)
    if metadata.get(f"{arch}.attn_logit_softcapping") or arch == "gemma2":
        kinds.add(SOFTCAPPED)
    if any(".attn_sinks." in name for name in tensor_names):
        kinds.add(SINKS)
    if metadata.get(f"{arch}.attention.kv_lora_rank"):
        kinds.add(LATENT)
    if metadata.get(f"{arch}.attention.indexer.top_k"):
        kinds.add(SPARSE)
    if metadata.get(f"{arch}.attention.sliding_window"):
        kinds.add(SLIDING)
    return tuple(sorted(kinds or {FULL}))
