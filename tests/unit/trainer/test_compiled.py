"""Compiled decoder layers against plain ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer import attention
from trainer.compiled import compile_layers


def test_compiled_layers_give_the_same_loss_and_are_compiled_once() -> None:
    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation(attention.NAME)
    compiled = copy.deepcopy(model)
    compile_layers(compiled)
    ids = torch.randint(0, 64, (1, 24))
    graphs = []
    for lengths in ((24,), (10, 14), (3, 3, 18)):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        found = []
        for each in (model, compiled):
            each.zero_grad()
            loss = each(
                input_ids=ids, position_ids=positions, document_lengths=lengths, use_cache=False, labels=ids
            ).loss
            loss.backward()
            found.append([loss.detach(), each.model.layers[0].self_attn.q_proj.weight.grad.clone()])
        for plain, fast in zip(*found, strict=True):
            torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] > 0
    with torch.no_grad():
        answer = compiled.generate(input_ids=ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(
            answer, model.generate(input_ids=ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
        )
