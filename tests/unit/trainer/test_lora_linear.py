"""Fused LoRA layers against peft's own, on a real small model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.lora_linear import FusedLora, fuse


def small_model(dropout: float = 0.0, bias: bool = False, **config: Any) -> Any:
    """A peft model whose adapters are not at their starting point."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
    )
    lora = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules="all-linear", **config)
    model = get_peft_model(LlamaForCausalLM(shape), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("proj.base_layer.bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def step(model: Any) -> dict[str, torch.Tensor]:
    """Logits and the gradient of every trainable parameter."""
    torch.manual_seed(1)
    model.zero_grad()
    logits = model(input_ids=torch.arange(24).view(2, 12)).logits
    logits.square().mean().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def fused(model: Any) -> Any:
    twin = copy.deepcopy(model)
    fuse(twin)
    return twin


def assert_same(model: Any, twin: Any) -> None:
    expected, found = step(model), step(twin)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_peft(dropout: float, bias: bool) -> None:
    model = small_model(dropout, bias).train()
    twin = fused(model)
    assert sum(isinstance(m, FusedLora) for m in twin.modules()) == 14
    assert_same(model, twin)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_unusual_adapters_are_left_to_peft(config: dict[str, Any]) -> None:
    model = small_model(bias=True, **config).train()
    assert_same(model, fused(model))


def test_names_stay_and_peft_still_merges_and_disables() -> None:
    model = small_model().eval()
    twin = fused(model)
    ids = torch.arange(12)[None]
    assert list(twin.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with model.disable_adapter(), twin.disable_adapter():
            torch.testing.assert_close(twin(input_ids=ids).logits, model(input_ids=ids).logits)
            assert not torch.allclose(twin(input_ids=ids).logits, plain)
        twin.merge_adapter()
        torch.testing.assert_close(twin(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)
        twin.unmerge_adapter()
        torch.testing.assert_close(twin(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(twin.merge_and_unload()(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = small_model().train()
    twin = fused(model)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(model, twin)


def test_the_first_layer_asks_no_gradient_of_its_input() -> None:
    model = fused(small_model())
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 48)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.base_layer.weight.grad is None
    assert layer.lora_A["default"].weight.grad is not None


def test_four_bit_layers_give_what_peft_gives() -> None:
    from bitsandbytes.nn.modules import Linear4bit

    torch.manual_seed(0)
    base = nn.Sequential(
        Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4"),
        Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4"),
    ).to("cpu")
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"]))  # type: ignore[arg-type]  # any module
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    twin = fused(model)
    assert sum(isinstance(m, FusedLora) for m in twin.modules()) == 2
    found = []
    for each in (model, twin):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
        out = each(x)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
