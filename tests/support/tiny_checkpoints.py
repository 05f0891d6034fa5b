"""Small real models, adapters and checkpoints for the tests of consolidate and merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from trainer.checkpoint_format import STATES, Manifest, ShardFile, sha256_file, shard_file_name, write_manifest

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}小薇："
SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}


def save_base(
    folder: Path,
    family: str = "llama",
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> Path:
    """A model with random weights, and a byte-level tokenizer with a chat template, in `folder`."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    else:
        config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](
            **SIZES | HEADS | (sizes or {}), tie_word_embeddings=tied
        )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder, **options)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def adapted(base: Path, dtype: torch.dtype = torch.bfloat16, spread: float = 0.1, **options: Any) -> Any:
    """A PeftModel on `base` whose lora_B are not zero; adapters in `dtype`, as during training."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
    torch.manual_seed(1)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_" in name:
                parameter.data = torch.randn(parameter.shape).mul(spread).to(dtype)
    return peft_model


def adapter_config(peft_model: Any) -> dict[str, Any]:
    config = peft_model.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def save_checkpoint(folder: Path, masters: dict[str, torch.Tensor], num_ranks: int = 1, **fields: Any) -> Path:
    """A checkpoint in the documented layout: the flattened parameters laid end to end and cut into `num_ranks` parts."""
    folder.mkdir(parents=True)
    total = sum(tensor.numel() for tensor in masters.values())
    share = -(-total // num_ranks)
    files: list[ShardFile] = []
    for rank in range(num_ranks):
        tensors = {"rng|torch": torch.get_rng_state()}
        fragments: dict[str, tuple[int, int]] = {}
        at = 0
        for name, tensor in masters.items():
            low, high = max(at, rank * share), min(at + tensor.numel(), (rank + 1) * share)
            if low < high:
                fragments[name] = (low - at, high - low)
                piece = tensor.detach().float().flatten()[low - at : high - at]
                tensors |= {
                    f"{name}|{state}": piece.clone() if state == "master" else piece * 0 - 7 for state in STATES
                }
            at += tensor.numel()
        path = folder / shard_file_name(rank)
        save_file(tensors, str(path))
        files.append(ShardFile(path.name, rank, path.stat().st_size, sha256_file(path), fragments))
    known: dict[str, Any] = {
        "run_id": "小薇-20260102-030405-abcd",
        "step": 200,
        "world_size": num_ranks,
        "dp": num_ranks,
        "sp": 1,
        "zero_stage": 2,
        "method": "lora",
        "dtype": "bf16",
        "base_model": "tiny",
        "parameters": {name: tuple(tensor.shape) for name, tensor in masters.items()},
        "adapter_config": None,
        "files": tuple(files),
        "state": {"step": 200, "rows_consumed": 800, "tokens": 9, "supervised_tokens": 5, "optimizer_step": 200},
    }
    write_manifest(folder, Manifest(**known | fields))
    return folder
