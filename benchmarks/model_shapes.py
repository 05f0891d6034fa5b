"""Models of known shapes with random weights, and checkpoints of them, for what is measured on files alone. No training."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return QWEN2 | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES = {
    "smollm2": None,
    "qwen2_0.5b": _qwen2(896, 4864, 24, 14, 2),
    "qwen2_1.5b": _qwen2(1536, 8960, 28, 12, 2),
    "qwen2_3b": _qwen2(2048, 11008, 36, 16, 2),
    "llama_1.1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "qwen2_7b": _qwen2(3584, 18944, 28, 28, 4) | {"tie_word_embeddings": False},
}
"""None: the real model that this project's demo uses."""


def write_model(name: str, folder: Path, smollm2: Path) -> Path:
    """The model as a folder: real for smollm2, else random bf16 weights with SmolLM2's tokenizer. Made once."""
    shape = SHAPES[name]
    if shape is None:
        return smollm2
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    fields = {k: v for k, v in shape.items() if k not in ("model_type", "architectures", "torch_dtype")}
    config = AutoConfig.for_model(str(shape["model_type"]), **fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(partial)
    for file in (*smollm2.glob("tokenizer*"), *smollm2.glob("chat_template*"), *smollm2.glob("special_tokens*")):
        shutil.copy(file, partial / file.name)
    partial.rename(folder)
    return folder


def write_adapter(folder: Path, base: Path, rank: int) -> Path:
    """A LoRA adapter of every linear layer of `base`, as PEFT lays it out, with random fp32 matrices. Made once."""
    if (folder / "adapter_config.json").is_file():
        return folder
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    tensors, targets = {}, set()
    for name, (out, inner) in _linear_layers(base).items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inner) / math.sqrt(inner)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank) * 0.002
        targets.add(name.split(".")[-2])
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(targets),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _linear_layers(base: Path) -> dict[str, tuple[int, int]]:
    shapes = weight_shapes(json.loads((base / "config.json").read_text(encoding="utf-8")))
    return {n: (s[0], s[1]) for n, s in shapes.items() if len(s) == 2 and n.endswith("_proj.weight")}


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a Llama- or Qwen2-shaped config.json, in the order of the model's parameters."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, size in (("q", query), ("k", kv), ("v", kv)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (size, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (size,)
        shapes |= {
            f"{at}.self_attn.o_proj.weight": (hidden, query),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def write_checkpoint(folder: Path, config: dict[str, Any], zero: int, ranks: int, lora_rank: int = 0) -> Path:
    """A checkpoint as DeepSpeed 0.19.8 writes it (stage 2 or 3), with random masters and both moments. Made once.

    With `lora_rank` only LoRA matrices are trained, and a stage 3 checkpoint holds the frozen weights too: as zeros, which
    take no room on the disk.
    """
    if (folder / "latest").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    step = folder / "global_step1"
    step.mkdir(parents=True)
    weights = weight_shapes(config)
    trained = dict(_lora_shapes(weights, lora_rank)) if lora_rank else weights
    total = sum(math.prod(shape) for shape in trained.values())
    if zero == 3:
        share = sum(-(-math.prod(shape) // ranks) for shape in trained.values())
    else:
        share = -(-total // (2 * ranks)) * 2
    for rank in range(ranks):
        _save_sparse(
            _optimizer_state(share, zero, ranks, seed=rank),
            step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    frozen = {f"base_model.model.{name}": shape for name, shape in weights.items()} if lora_rank else {}
    for rank in range(ranks if zero == 3 else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if zero == 3 else "mp_rank_00_model_states.pt"
        _save_sparse(_model_state(trained, frozen, zero, ranks, bool(config.get("tie_word_embeddings"))), step / name)
    (folder / ("adapter_config.json" if lora_rank else "config.json")).write_text(
        json.dumps(_lora_config(lora_rank) if lora_rank else config), encoding="utf-8"
    )
    (folder / "latest").write_text("global_step1", encoding="utf-8")
    return folder


def _lora_shapes(weights: dict[str, tuple[int, ...]], rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in weights.items():
        if name.endswith("_proj.weight"):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            yield f"{prefix}.lora_A.default.weight", (rank, shape[1])
            yield f"{prefix}.lora_B.default.weight", (shape[0], rank)


def _lora_config(rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "all-linear",
    }


def _optimizer_state(share: int, zero: int, ranks: int, seed: int) -> dict[str, Any]:
    import torch

    torch.manual_seed(seed)
    flat, moments = torch.randn(share) * 0.02, {"step": torch.tensor(1.0)}
    moments |= {name: torch.randn(share) * 1e-4 for name in ("exp_avg", "exp_avg_sq")}
    base = {"state": {0: moments}, "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.999), "params": [0]}]}
    if zero == 3:
        state = {"zero_stage": 3, "partition_count": ranks, "optimizer_state_dict": base, "fp32_flat_groups": [flat]}
    else:
        state = {
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": [flat],
            "zero_stage": 2,
            "group_paddings": [0],
            "partition_count": [ranks],
        }
    return {"optimizer_state_dict": state, "ds_version": "0.19.8"}


def _model_state(
    trained: dict[str, tuple[int, ...]], frozen: dict[str, tuple[int, ...]], zero: int, ranks: int, tied: bool
) -> dict[str, Any]:
    import torch

    whole = {n: torch.zeros(() if zero == 3 else s, dtype=torch.bfloat16) for n, s in trained.items()}
    fragments = {
        n: torch.zeros(-(-math.prod(s) // (ranks if zero == 3 else 1)), dtype=torch.bfloat16) for n, s in frozen.items()
    }
    return {
        "module": whole,
        "buffer_names": [],
        "param_shapes": [{name: torch.Size(shape) for name, shape in trained.items()}],
        "frozen_param_shapes": {name: torch.Size(shape) for name, shape in frozen.items()},
        "frozen_param_fragments": fragments,
        "shared_params": {"lm_head.weight": "model.embed_tokens.weight"} if tied and not frozen else {},
        "global_steps": 1,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
    }


class _Sparse:
    """A file for writing in which long runs of zeros are holes."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for at in range(0, len(view), 2**20):
            piece = view[at : at + 2**20]
            if len(piece) == 2**20 and not any(piece[:64]) and bytes(piece).count(0) == len(piece):
                self.file.seek(len(piece), 1)
            else:
                self.file.write(piece)
        return len(view)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.truncate(self.file.tell())
        self.file.close()


def _save_sparse(content: dict[str, Any], path: Path) -> None:
    import torch

    file = _Sparse(path)
    torch.save(content, file)  # type: ignore[arg-type]  # it only writes and flushes
    file.close()
