"""What a decoder is made of: its linear layers, its parameters, and what LoRA adds to it. Pure arithmetic.

Names and shapes of layers are those of the family's modelling file in transformers 5, and of the code beside the weights
for the families that transformers does not have (internlm2, chatglm, baichuan, minicpm).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import LaunchError

_TYPICAL_EXPERTS_PER_TOKEN = 2


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kv_rank: int
    q_rank: int
    """0: queries are not compressed."""
    rotary_dim: int
    """Of each query and key head; the rest of `ModelFacts.head_dim` has no position."""
    value_dim: int


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder. Counts are in parameters, `weight_bytes_on_disk` in bytes (0: not on this disk)."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Of one expert, where there are experts."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Of a query."""
    vocab_size: int
    tie_word_embeddings: bool
    max_positions: int
    """0 when the model does not say."""
    sliding_window: int | None
    """Tokens; None when every token may attend to all before it."""
    attention: tuple[str, ...]
    """Kinds of attention_kinds.py that its layers have; never empty."""
    num_experts: int
    """0 for a dense model."""
    num_parameters: int
    num_linear_parameters: int
    """Weights of the decoder's linear layers: what QLoRA holds in 4 bits and LoRA adds to. Neither the head nor experts,
    which transformers keeps as tensors of three dimensions."""
    weight_bytes_on_disk: int
    has_chat_template: bool | None
    """None: only the download can tell."""
    known_from: str
    """For people: "config.json", "gguf header", "config.json in the Hub cache", "built-in table"."""
    is_approximate: bool
    """The family's layers are not known here: counts assume a Llama-like decoder."""
    stretches_beyond: int = 0
    """Row length in tokens above which rotary frequencies depend on the longest position of the row; 0: they never do."""
    experts_per_token: int = 0
    shared_intermediate: int = 0
    """Width of the experts that every token passes."""
    dense_layers: int = 0
    """How many first layers have no experts, in a model with experts."""
    dense_intermediate: int = 0
    """Width of those."""
    latent: Latent | None = None
    has_vision: bool = False
    """A vision tower is loaded with the decoder."""

    @property
    def mlp_width(self) -> int:
        """Width of the multilayer perceptrons that one token passes in one layer."""
        if not self.num_experts:
            return self.intermediate_size
        chosen = self.experts_per_token or min(_TYPICAL_EXPERTS_PER_TOKEN, self.num_experts)
        return chosen * self.intermediate_size + self.shared_intermediate


@dataclass(frozen=True)
class Linear:
    """A linear layer that stands under the same name in `layers` decoder layers."""

    inputs: int
    outputs: int
    layers: int


@dataclass(frozen=True)
class _Family:
    attention: str = "separate"
    """How q, k and v are stored; latent attention is seen from the sizes."""
    mlp: str = "separate"
    qkv_bias: bool = False
    """Biases on q, k, v whatever config.json says."""
    attention_bias: str = "qkvo"
    """On which projections `attention_bias` of config.json puts one."""
    qk_norm: bool = False
    norms_per_layer: int = 2
    tied_by_default: bool = False
    shared_expert: str = ""
    """Name of the module of the experts that every token passes."""
    gated_shared_expert: bool = False


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "mixtral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen2_moe": _Family(qkv_bias=True, shared_expert="mlp.shared_expert", gated_shared_expert=True),
    "qwen3": _Family(qk_norm=True),
    "qwen3_moe": _Family(qk_norm=True),
    "internlm2": _Family("internlm2", "internlm2"),
    "internlm3": _Family(),
    "phi3": _Family("phi3", "gate_up"),
    "smollm3": _Family(tied_by_default=True),
    "gemma": _Family(tied_by_default=True),
    "gemma2": _Family(norms_per_layer=4, tied_by_default=True),
    "gemma3_text": _Family(norms_per_layer=4, qk_norm=True, tied_by_default=True),
    "glm": _Family(mlp="gate_up", attention_bias="qkv"),
    "glm4": _Family(mlp="gate_up", attention_bias="qkv", norms_per_layer=4),
    "chatglm": _Family("chatglm", "chatglm", qkv_bias=True),
    "baichuan": _Family("baichuan"),
    "minicpm": _Family(tied_by_default=True),
    "minicpm3": _Family(tied_by_default=True),
    "deepseek_v2": _Family(shared_expert="mlp.shared_experts"),
}


_JOINED_EXPERTS = {
    "mixtral": ("w1", "w3", "w2", "gate"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj", "gate"),
    "deepseek_v2": ("gate_proj", "up_proj", "down_proj", "gate"),
}
"""Names that PEFT takes for the experts' tensors (gate, up, down, router), and for no linear layer."""


def is_known_family(model_type: str) -> bool:
    """Whether the layers of this `model_type` are known here."""
    return model_type in _FAMILIES


def is_tied_by_default(model_type: str) -> bool:
    """Whether head and embedding are one where config.json does not say."""
    return _family(model_type).tied_by_default


def _family(model_type: str) -> _Family:
    return _FAMILIES.get(model_type, _Family())


def linear_layers(facts: ModelFacts) -> dict[str, Linear]:
    """The linear layers of the decoder by their names below a layer; the head is none of them."""
    family, n = _family(facts.model_type), facts.num_layers
    found = {name: Linear(*shape, n) for name, shape in _attention_layers(facts, family).items()}
    if not facts.num_experts:
        shapes = _mlp_layers(facts.hidden_size, facts.intermediate_size, family.mlp)
        return found | {name: Linear(*shape, n) for name, shape in shapes.items()}
    if facts.dense_layers:
        shapes = _mlp_layers(facts.hidden_size, facts.dense_intermediate, family.mlp)
        found |= {name: Linear(*shape, facts.dense_layers) for name, shape in shapes.items()}
    if facts.shared_intermediate:
        shapes = _mlp_layers(facts.hidden_size, facts.shared_intermediate, "separate")
        where, rest = family.shared_expert or "mlp.shared_expert", n - facts.dense_layers
        found |= {name.replace("mlp", where, 1): Linear(*shape, rest) for name, shape in shapes.items()}
        if family.gated_shared_expert:
            found[f"{where}_gate"] = Linear(facts.hidden_size, 1, rest)
    return found


def _attention_layers(facts: ModelFacts, family: _Family) -> dict[str, tuple[int, int]]:
    h, q, kv = facts.hidden_size, facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    latent = facts.latent
    if latent:
        queries = {"self_attn.q_proj": (h, q)}
        if latent.q_rank:
            queries = {"self_attn.q_a_proj": (h, latent.q_rank), "self_attn.q_b_proj": (latent.q_rank, q)}
        plain = facts.head_dim - latent.rotary_dim
        return queries | {
            "self_attn.kv_a_proj_with_mqa": (h, latent.kv_rank + latent.rotary_dim),
            "self_attn.kv_b_proj": (latent.kv_rank, facts.num_heads * (plain + latent.value_dim)),
            "self_attn.o_proj": (facts.num_heads * latent.value_dim, h),
        }
    joined = {
        "internlm2": ("attention.wqkv", "attention.wo"),
        "phi3": ("self_attn.qkv_proj", "self_attn.o_proj"),
        "baichuan": ("self_attn.W_pack", "self_attn.o_proj"),
        "chatglm": ("self_attention.query_key_value", "self_attention.dense"),
    }
    if family.attention in joined:
        first, last = joined[family.attention]
        return {first: (h, q + 2 * kv), last: (q, h)}
    return {
        "self_attn.q_proj": (h, q),
        "self_attn.k_proj": (h, kv),
        "self_attn.v_proj": (h, kv),
        "self_attn.o_proj": (q, h),
    }


def _mlp_layers(h: int, i: int, kind: str) -> dict[str, tuple[int, int]]:
    if kind == "internlm2":
        return {"feed_forward.w1": (h, i), "feed_forward.w3": (h, i), "feed_forward.w2": (i, h)}
    if kind == "gate_up":
        return {"mlp.gate_up_proj": (h, 2 * i), "mlp.down_proj": (i, h)}
    if kind == "chatglm":
        return {"mlp.dense_h_to_4h": (h, 2 * i), "mlp.dense_4h_to_h": (i, h)}
    return {"mlp.gate_proj": (h, i), "mlp.up_proj": (h, i), "mlp.down_proj": (i, h)}


def with_counts(facts: ModelFacts, config: Mapping[str, Any], stored: int = 0) -> ModelFacts:
    """`facts` with its numbers of parameters. `stored` is their sum over the weights on disk, 0 where there are none.

    `other_parameters` of `config` are those beside the decoder and its head (a vision tower).
    """
    linear = sum(layer.inputs * layer.outputs * layer.layers for layer in linear_layers(facts).values())
    total = stored or linear + _other_parameters(facts, config)
    return dataclasses.replace(facts, num_parameters=total, num_linear_parameters=linear)


def _other_parameters(facts: ModelFacts, config: Mapping[str, Any]) -> int:
    """What is not a linear layer: norms, biases, experts with their router, embedding and head."""
    family, h = _family(facts.model_type), facts.hidden_size
    q, kv = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    per_layer = family.norms_per_layer * h + (2 * facts.head_dim if family.qk_norm else 0)
    if facts.latent:
        per_layer += facts.latent.kv_rank + facts.latent.q_rank
    if family.qkv_bias:
        per_layer += q + 2 * kv
    elif config.get("attention_bias", family.attention_bias == "qkv") or config.get("bias"):
        per_layer += q + 2 * kv + (h if family.attention_bias == "qkvo" else 0)
    if config.get("mlp_bias"):
        per_layer += 2 * facts.intermediate_size + h
    experts = facts.num_experts * (3 * h * facts.intermediate_size + h) * (facts.num_layers - facts.dense_layers)
    embeddings = facts.vocab_size * h * (1 if facts.tie_word_embeddings else 2)
    return facts.num_layers * per_layer + experts + embeddings + h + int(config.get("other_parameters", 0))


def lora_parameters(facts: ModelFacts, rank: int, targets: tuple[str, ...]) -> int:
    """Trainable parameters of LoRA: rank x (inputs + outputs) of each adapted layer (arXiv 2106.09685, section 4.1).

    `targets` are name endings, or ("all-linear",). Raises LaunchError when one matches no layer of a known family.
    """
    layers, experts = linear_layers(facts), _JOINED_EXPERTS.get(facts.model_type, ())
    names = tuple(dict.fromkeys([*(name.rpartition(".")[2] for name in layers), *experts]))
    if targets == ("all-linear",):
        targets = names
    missing = [t for t in targets if t not in names and not any(_ends_with(name, t) for name in layers)]
    if missing and not facts.is_approximate:
        near = difflib.get_close_matches(missing[0], names, n=1)
        raise LaunchError(
            f"method.targets: {', '.join(missing)} match no linear layer of {facts.model_type}",
            (f"Did you mean {near[0]}? " if near else "") + f"Allowed: all-linear, {', '.join(names)}.",
        )
    plain = [t for t in targets if t.rpartition(".")[2] not in experts]
    adapted = [layer for name, layer in layers.items() if any(_ends_with(name, t) for t in plain)]
    count = sum((layer.inputs + layer.outputs) * layer.layers for layer in adapted)
    chosen = {t.rpartition(".")[2] for t in targets} & set(experts)
    return rank * (count + (_expert_parameters(facts, experts, chosen) if chosen else 0))


def _expert_parameters(facts: ModelFacts, names: tuple[str, ...], chosen: set[str]) -> int:
    """Trainable parameters per rank that PEFT adds to the joined tensors of the experts, and to their router.

    Gate and up projection are one tensor, which gets twice the rank (peft, utils/transformers_weight_conversion.py).
    Raises LaunchError when one of the two is chosen without the other.
    """
    gate, up, down, router = names
    h, i, n = facts.hidden_size, facts.intermediate_size, facts.num_experts
    if (gate in chosen) != (up in chosen):
        raise LaunchError(
            f"method.targets: {gate} and {up} of the experts of {facts.model_type} are one tensor",
            "Name both, or neither.",
        )
    per_layer = (n * 2 * (h + 2 * i) if gate in chosen else 0) + (n * (h + i) if down in chosen else 0)
    per_layer += h + n if router in chosen else 0
    return per_layer * (facts.num_layers - facts.dense_layers)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
