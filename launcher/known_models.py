"""Sizes of the models that the shipped recipes use, so that a plan can say what a run needs before a download.

Values are those of each model's published config.json; the tests compare the parameter counts with the published ones.
"""

from __future__ import annotations

from typing import Any


def known_config(model_id: str) -> dict[str, Any] | None:
    """The parts of config.json that decide sizes, or None for a model that is not in the table."""
    return _KNOWN.get(model_id.lower())


def known_chat_template(model_id: str) -> bool | None:
    """Whether the tokenizer brings a chat template; None where only the download can tell."""
    lower = model_id.lower()
    has_one = "-instruct" in lower or "-chat" in lower or "r1-distill" in lower or lower.startswith("qwen/")
    return True if has_one and lower in _KNOWN else None


def _row(
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool,
    positions: int,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": positions,
    }


def _table() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for size, tied, shape, base_positions in (
        ("0.5B", True, (896, 4864, 24, 14, 2, 151936), 32768),
        ("1.5B", True, (1536, 8960, 28, 12, 2, 151936), 131072),
        ("3B", True, (2048, 11008, 36, 16, 2, 151936), 32768),
        ("7B", False, (3584, 18944, 28, 28, 4, 152064), 131072),
        ("14B", False, (5120, 13824, 48, 40, 8, 152064), 131072),
        ("32B", False, (5120, 27648, 64, 40, 8, 152064), 131072),
        ("72B", False, (8192, 29568, 80, 64, 8, 152064), 131072),
    ):
        rows[f"Qwen/Qwen2.5-{size}"] = _row("qwen2", *shape, tied, base_positions)
        rows[f"Qwen/Qwen2.5-{size}-Instruct"] = _row("qwen2", *shape, tied, 32768)
    r1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen"
    rows[f"{r1}-1.5B"] = _row("qwen2", 1536, 8960, 28, 12, 2, 151936, False, 131072)
    rows[f"{r1}-7B"] = _row("qwen2", 3584, 18944, 28, 28, 4, 152064, False, 131072)
    for org in ("internlm", "Shanghai_AI_Laboratory"):
        rows[f"{org}/internlm2-chat-1_8b"] = _row("internlm2", 2048, 8192, 24, 16, 8, 92544, False, 32768)
        rows[f"{org}/internlm2-chat-7b"] = _row("internlm2", 4096, 14336, 32, 32, 8, 92544, False, 32768)
    for size, shape, tied in (
        ("135M", (576, 1536, 30, 9, 3), True),
        ("360M", (960, 2560, 32, 15, 5), True),
        ("1.7B", (2048, 8192, 24, 32, 32), True),
    ):
        for suffix in ("", "-Instruct"):
            rows[f"HuggingFaceTB/SmolLM2-{size}{suffix}"] = _row("llama", *shape, 49152, tied, 8192)
    for suffix in ("", "-Instruct"):
        for name in ("Llama-3.1-8B", "Meta-Llama-3.1-8B"):
            rows[f"meta-llama/{name}{suffix}"] = _row("llama", 4096, 14336, 32, 32, 8, 128256, False, 131072)
        rows[f"meta-llama/Llama-3.2-1B{suffix}"] = _row("llama", 2048, 8192, 16, 32, 8, 128256, True, 131072)
        rows[f"meta-llama/Llama-3.2-3B{suffix}"] = _row("llama", 3072, 8192, 28, 24, 8, 128256, True, 131072)
    for name in ("Mistral-7B-v0.3", "Mistral-7B-Instruct-v0.3"):
        rows[f"mistralai/{name}"] = _row("mistral", 4096, 14336, 32, 32, 8, 32768, False, 32768)
    return {model_id.lower(): row for model_id, row in rows.items()}


_KNOWN = _table()
