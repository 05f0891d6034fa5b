"""One rank of tests/distributed/test_sequence_parallel.py: the same row whole and shared, on two models at once."""

from __future__ import annotations

import copy
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from trainer import attention
from trainer.data import Batch
from trainer.engine import start_deepspeed
from trainer.sequence_parallel import share_rows, slice_of, whole_rows


def row(vocabulary: int, lengths: tuple[int, ...]) -> Batch:
    total = sum(lengths)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocabulary, (1, total), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return Batch(ids, torch.zeros_like(ids), positions, lengths)


def hidden(base: Any, batch: Batch) -> torch.Tensor:
    return base.get_decoder()(
        input_ids=batch.input_ids_1T,
        position_ids=batch.position_ids_1T,
        document_lengths=batch.document_lengths,
        use_cache=False,
    ).last_hidden_state


def gradients(base: Any, part: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    base.zero_grad()
    (part * weights).sum().backward()
    return {name: p.grad.clone() for name, p in base.named_parameters() if p.grad is not None}


def compare(config_dir: str, sp: int, lengths: tuple[int, ...], window: int | None) -> dict[str, float]:
    """Largest differences between the shared and the whole computation, and what the other models did meanwhile."""
    config = AutoConfig.from_pretrained(config_dir)
    if window:
        config.use_sliding_window, config.sliding_window = True, window
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    attention.register()
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float64).train()
    shared, batch = copy.deepcopy(whole), row(config.vocab_size, lengths)
    before = hidden(whole, batch)
    weights = torch.randn(before.shape, dtype=before.dtype, generator=torch.Generator().manual_seed(5))
    expected = gradients(whole, before, weights)
    share_rows(shared, sp, timedelta(seconds=120))
    sp_rank = dist.get_rank() % sp
    size = sum(lengths) // sp
    own = slice(sp_rank * size, (sp_rank + 1) * size)
    part = hidden(shared, slice_of(batch, sp_rank, sp))
    found = gradients(shared, part, weights[:, own])
    for tensor in found.values():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size() // sp
    with whole_rows(shared), torch.no_grad():
        alone = hidden(shared, batch)
    worst = max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected)
    return {
        "hidden": float((part - before[:, own]).abs().max()),
        "gradients": worst,
        "other_model": float((hidden(whole, batch) - before).abs().max()),
        "whole_rows": float((alone - before).abs().max()),
        "back_again": float((hidden(shared, slice_of(batch, sp_rank, sp)) - part).abs().max()),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    start_deepspeed(timedelta(seconds=120))
    results = [
        {**item, **compare(item["config"], item["sp"], tuple(item["lengths"]), item["window"])}
        for item in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    ]
    if dist.get_rank() == 0:
        Path(results[0]["out"]).write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
