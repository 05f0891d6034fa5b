"""One rank of a program that is not ours: DeepSpeed's own save_checkpoint, transformers' Trainer on DeepSpeed, and FSDP.

The only argument is a JSON list of {"folder", "method": full | lora, "zero", "by": deepspeed | trainer | fsdp}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from trainer.engine import start_deepspeed

VOCABULARY, LENGTH = 96, 16


def model_of(method: str) -> Any:
    """Odd sizes, so that shards do not end where parameters do."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(shape).bfloat16()
    if method == "full":
        return model
    # As after some training: lora_B is not zero.
    lora = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return lora.bfloat16()


def config_of(zero: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }


def by_deepspeed(folder: Path, method: str, zero: int) -> None:
    import deepspeed

    model = model_of(method)
    trained = [p for p in model.parameters() if p.requires_grad]
    # Two groups, as weight decay makes them.
    groups = [{"params": trained[::2], "weight_decay": 0.1}, {"params": trained[1::2], "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config_of(zero))
    ids = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(folder))
    if dist.get_rank() == 0:
        _write_config(folder, method)
    dist.barrier()


def _write_config(folder: Path, method: str) -> None:
    model = model_of(method)
    if method == "lora":
        model.peft_config["default"].save_pretrained(str(folder))
    else:
        model.config.save_pretrained(str(folder))


def by_fsdp(folder: Path, method: str) -> None:
    """As accelerate and torchtitan do: the model sharded by FSDP 2, saved by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    model = model_of(method)
    for layer in model.modules():
        if type(layer).__name__ == "LlamaDecoderLayer":
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    step = folder / "checkpoint-1"
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=step / "pytorch_model_fsdp_0")
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in weights.items()}
    if dist.get_rank() == 0:
        _write_config(step, method)
        torch.save(whole, folder / "expected.pt")
    dist.barrier()


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def by_trainer(folder: Path, method: str, zero: int) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        bf16=True,
        use_cpu=True,
        report_to=[],
        deepspeed=config_of(zero),
    )
    Trainer(model=model_of(method), args=arguments, train_dataset=Rows()).train()
    dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    start_deepspeed(timedelta(seconds=120))
    for item in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print("=====", json.dumps(item), flush=True)
        if item["by"] == "fsdp":
            by_fsdp(Path(item["folder"]), item["method"])
        else:
            make = by_deepspeed if item["by"] == "deepspeed" else by_trainer
            make(Path(item["folder"]), item["method"], item["zero"])
        gc.collect()
    sys.stdout.flush()
    os._exit(0)
