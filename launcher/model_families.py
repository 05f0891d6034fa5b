"""The families of published models: template, LoRA targets, and which of them cannot be trained, with the nearest that can.

Names of layers are those of the family's modelling file in transformers; a test compares them. Nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .attention_kinds import REFUSED, SOFTCAPPED
from .model_layers import ModelFacts

_DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = _DENSE[:4]
_GATE_UP = (*_ATTENTION, "gate_up_proj", "down_proj")
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@dataclass(frozen=True)
class Family:
    """What models of one family have in common, beside their sizes."""

    name: str
    title: str
    model_type: str
    """As in config.json."""
    template: str
    """The same chat format among the templates of other tools; "": they have none."""
    targets: tuple[str, ...] = _DENSE
    """What carries an adapter unless a recipe says otherwise: the linear layers of a decoder layer, but not experts."""
    own_template: Literal["always", "chat", "unknown"] = "chat"
    """Which of its models bring a chat template of their own: all, those trained for chat, or the download tells."""
    example: str = ""
    """A model to start with."""
    note: str = ""
    """For the table of families: what to know about its attention or weights."""


_MOE = "experts stay in 16 bits under qlora"
_JOINED = f"{_MOE}; targets: all-linear adapts them and their router as well, each expert with its own adapter"
_ROWS = "its rotary positions change with the row length: rows stay within"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "qwen1.5", "Qwen1.5", "qwen2", "llamafactory/qwen", own_template="always", example="Qwen/Qwen1.5-7B-Chat"
        ),
        Family(
            "qwen1.5-moe",
            "Qwen1.5-MoE",
            "qwen2_moe",
            "llamafactory/qwen",
            _DENSE,
            "always",
            "Qwen/Qwen1.5-MoE-A2.7B-Chat",
            f"{_MOE}, the shared one apart",
        ),
        Family("qwen2", "Qwen2", "qwen2", "llamafactory/qwen", own_template="always", example="Qwen/Qwen2-7B-Instruct"),
        Family(
            "qwen2.5",
            "Qwen2.5",
            "qwen2",
            "llamafactory/qwen",
            own_template="always",
            example="Qwen/Qwen2.5-7B-Instruct",
        ),
        Family("qwen3", "Qwen3", "qwen3", "llamafactory/qwen3", own_template="always", example="Qwen/Qwen3-8B"),
        Family(
            "qwen3-moe",
            "Qwen3 MoE",
            "qwen3_moe",
            "llamafactory/qwen3",
            _ATTENTION,
            "always",
            "Qwen/Qwen3-30B-A3B",
            _JOINED,
        ),
        Family(
            "internlm2",
            "InternLM2",
            "internlm2",
            "xtuner/internlm2_chat",
            ("wqkv", "wo", "w1", "w2", "w3"),
            example="internlm/internlm2-chat-7b",
        ),
        Family(
            "internlm2.5",
            "InternLM2.5",
            "internlm2",
            "xtuner/internlm2_chat",
            ("wqkv", "wo", "w1", "w2", "w3"),
            example="internlm/internlm2_5-7b-chat",
        ),
        Family(
            "internlm3",
            "InternLM3",
            "internlm3",
            "llamafactory/intern2",
            example="internlm/internlm3-8b-instruct",
            note=f"{_ROWS} 32768 tokens",
        ),
        Family(
            "deepseek-r1-distill-qwen",
            "DeepSeek-R1-Distill-Qwen",
            "qwen2",
            "llamafactory/deepseekr1",
            example="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        ),
        Family(
            "deepseek-r1-distill-llama",
            "DeepSeek-R1-Distill-Llama",
            "llama",
            "llamafactory/deepseekr1",
            example="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        ),
        Family(
            "deepseek-v2-lite",
            "DeepSeek-V2-Lite",
            "deepseek_v2",
            "xtuner/deepseek_v2",
            ("q_proj", *_LATENT),
            example="deepseek-ai/DeepSeek-V2-Lite-Chat",
            note=f"latent attention: a row is not shared over devices (sp 1); {_JOINED}, and none of the shared experts",
        ),
        Family("llama2", "Llama 2", "llama", "llamafactory/llama2", example="meta-llama/Llama-2-7b-chat-hf"),
        Family("llama3", "Llama 3", "llama", "llamafactory/llama3", example="meta-llama/Meta-Llama-3-8B-Instruct"),
        Family("llama3.1", "Llama 3.1", "llama", "llamafactory/llama3", example="meta-llama/Llama-3.1-8B-Instruct"),
        Family("llama3.2", "Llama 3.2", "llama", "llamafactory/llama3", example="meta-llama/Llama-3.2-3B-Instruct"),
        Family("llama3.3", "Llama 3.3", "llama", "llamafactory/llama3", example="meta-llama/Llama-3.3-70B-Instruct"),
        Family("mistral", "Mistral", "mistral", "llamafactory/mistral", example="mistralai/Mistral-7B-Instruct-v0.3"),
        Family(
            "mixtral",
            "Mixtral",
            "mixtral",
            "llamafactory/mistral",
            _ATTENTION,
            example="mistralai/Mixtral-8x7B-Instruct-v0.1",
            note=_JOINED,
        ),
        Family("gemma", "Gemma", "gemma", "llamafactory/gemma", example="google/gemma-2b-it"),
        Family("gemma2", "Gemma 2", "gemma2", "llamafactory/gemma2", example="google/gemma-2-9b-it"),
        Family(
            "gemma3",
            "Gemma 3, text",
            "gemma3_text",
            "llamafactory/gemma",
            example="google/gemma-3-1b-it",
            note="5 of 6 layers have the window",
        ),
        Family(
            "gemma3-vision",
            "Gemma 3, text and images",
            "gemma3_text",
            "llamafactory/gemma",
            example="google/gemma-3-4b-it",
            note="5 of 6 layers have the window; the vision tower is loaded and not adapted, so lora and qlora only",
        ),
        Family(
            "phi3",
            "Phi-3, Phi-3.5",
            "phi3",
            "llamafactory/phi",
            ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
            "always",
            "microsoft/Phi-3.5-mini-instruct",
            "rotary positions of the 128k models and Phi-3.5 change with the row length: rows stay within 4096 tokens",
        ),
        Family(
            "phi4",
            "Phi-4",
            "phi3",
            "llamafactory/phi4",
            ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
            "always",
            "microsoft/phi-4",
            "rotary positions of Phi-4-mini change with the row length: rows stay within 4096 tokens; its chat format is llamafactory/phi4_mini",
        ),
        Family(
            "chatglm3",
            "ChatGLM3",
            "chatglm",
            "llamafactory/chatglm3",
            ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
            "unknown",
            "zai-org/chatglm3-6b",
        ),
        Family(
            "glm4-code",
            "GLM-4-9B, with its own code",
            "chatglm",
            "llamafactory/glm4",
            ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
            "unknown",
            "zai-org/glm-4-9b-chat",
        ),
        Family(
            "glm4",
            "GLM-4-9B, for transformers",
            "glm",
            "llamafactory/glm4",
            _GATE_UP,
            example="zai-org/glm-4-9b-chat-hf",
        ),
        Family(
            "glm4-0414", "GLM-4-0414, GLM-Z1", "glm4", "llamafactory/glm4", _GATE_UP, example="zai-org/GLM-4-9B-0414"
        ),
        Family(
            "baichuan2",
            "Baichuan2",
            "baichuan",
            "xtuner/baichuan2_chat",
            ("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"),
            "unknown",
            "baichuan-inc/Baichuan2-7B-Chat",
        ),
        Family("yi", "Yi, Yi-1.5", "llama", "llamafactory/yi", example="01-ai/Yi-1.5-9B-Chat"),
        Family("minicpm", "MiniCPM", "minicpm", "xtuner/minicpm", example="openbmb/MiniCPM-2B-sft-bf16"),
        Family(
            "minicpm3",
            "MiniCPM3",
            "minicpm3",
            "xtuner/minicpm3",
            ("q_a_proj", "q_b_proj", *_LATENT, *_DENSE[4:]),
            "always",
            "openbmb/MiniCPM3-4B",
            f"latent attention: a row is not shared over devices (sp 1); {_ROWS} 32768 tokens",
        ),
        Family("minicpm5", "MiniCPM5", "llama", "", example="openbmb/MiniCPM5-1B", own_template="unknown"),
        Family("smollm2", "SmolLM2", "llama", "llamafactory/smollm2", example="HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    )
}


# all-linear would also adapt experts, or the gate of a shared one: their recipes name the layers.
_NAMED_TARGETS = frozenset(("qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2"))


def recipe_targets(family: Family | None) -> tuple[str, ...]:
    """`method.targets` of a new recipe; ("all-linear",) where that means the same as the family's list."""
    return family.targets if family and family.model_type in _NAMED_TARGETS else ("all-linear",)


@dataclass(frozen=True)
class Refusal:
    """Why models of a kind are not trained, and what is nearest to them that is."""

    reason: str
    instead: str


_OWN_CODE = "and the code beside its weights does not use the attention interface that packed rows need"
REFUSED_TYPES: dict[str, Refusal] = {
    "internlm2": Refusal(
        "transformers has no InternLM2, and the code beside its weights fits version 4",
        "InternLM's own tools/convert2llama.py (github.com/InternLM/InternLM) writes the same weights in Llama's format:\n"
        "run it once and give its output folder as model.source; the rest of the recipe stays as it is.\n"
        "Or take internlm/internlm3-8b-instruct, which needs no conversion.",
    ),
    "chatglm": Refusal(
        f"transformers has no ChatGLM, {_OWN_CODE}",
        "GLM-4-9B is there for transformers too: zai-org/glm-4-9b-chat-hf has the weights of zai-org/glm-4-9b-chat.\n"
        "Nearest to ChatGLM3-6B: that model, or zai-org/GLM-4-9B-0414.",
    ),
    "baichuan": Refusal(
        f"transformers has no Baichuan, {_OWN_CODE}",
        "Nearest by size and languages: Qwen/Qwen2.5-7B-Instruct, Qwen/Qwen2.5-14B-Instruct.",
    ),
    "minicpm": Refusal(
        f"transformers has no MiniCPM before version 3, {_OWN_CODE}",
        "Nearest: openbmb/MiniCPM5-1B and openbmb/MiniCPM5-2B, whose layers are Llama's; or openbmb/MiniCPM3-4B.",
    ),
    "phi3small": Refusal(
        f"transformers has no Phi-3-small, {_OWN_CODE}",
        "Nearest: microsoft/Phi-3.5-mini-instruct or microsoft/Phi-3-medium-4k-instruct.",
    ),
}
"""model_type -> why such a model is not trained."""

_WORKS = (
    "What works: models whose layers are all softmax attention, with or without a sliding window, such as\n"
    "Qwen2.5, Qwen3, Llama 3, Mistral, Gemma 3 and SmolLM2."
)
_INSTEAD = {
    SOFTCAPPED: "Nearest to Gemma 2: google/gemma-3-1b-it, google/gemma-3-4b-it, google/gemma-3-12b-it.",
}


def refusals_of(facts: ModelFacts) -> list[Refusal]:
    """Why this model is not trained; empty for one that is."""
    if facts.model_type in REFUSED_TYPES:
        return [REFUSED_TYPES[facts.model_type]]
    return [
        Refusal(
            f"{facts.model_type} cannot be trained: {REFUSED[kind]}",
            "\n".join(filter(None, (_WORKS, _INSTEAD.get(kind)))),
        )
        for kind in facts.attention
        if kind in REFUSED
    ]
