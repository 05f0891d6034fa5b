"""Fused LoRA layers against peft's own, on a real small model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer import lora_linear, wide_products
from trainer.lora_linear import FusedLora, RoundedLora, fuse, round_once


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


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without bf16 instructions, whatever this one has."""
    for module in (lora_linear, wide_products):
        monkeypatch.setattr(module, "slow_dtypes", lambda: wide_products.NARROW)


@pytest.mark.usefixtures("without_bf16")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_round_once_give_what_fp32_gives(dropout: float, bias: bool) -> None:
    twin = small_model(dropout, bias).bfloat16().train()
    round_once(twin)
    assert sum(isinstance(m, RoundedLora) for m in twin.modules()) == 14
    wide = small_model(dropout, bias).bfloat16().float().train()
    for (name, layer), (_, exact) in zip(twin.named_modules(), wide.named_modules(), strict=True):
        if not isinstance(layer, RoundedLora):
            continue
        x = torch.randn(2, 5, exact.base_layer.in_features).bfloat16().float().requires_grad_()
        narrow = x.detach().bfloat16().requires_grad_()
        found = []
        for each, given in ((exact, x), (layer, narrow)):
            torch.manual_seed(3)
            out = each(given)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)).float().sum().backward()
            found.append([out.detach(), given.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
        # Dropout scales its input in bf16.
        assert torch.equal(found[1][0], found[0][0].bfloat16()) or dropout, name
        for expected, value in zip(*found, strict=True):
            assert value.dtype == torch.bfloat16
            error = (value.float() - expected).norm() / expected.norm()
            assert error < 3e-2, name


@pytest.mark.usefixtures("without_bf16")
@pytest.mark.parametrize("kind", [fuse, round_once])
def test_what_an_adapter_has_learnt_shows_below_half_a_step_of_the_base_output(kind: Any) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64, bias=False))
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["0"])).bfloat16()  # type: ignore[arg-type]  # any module
    layer = model.base_model.model[0]
    x = torch.randn(4096, 64).bfloat16()
    with torch.no_grad():
        before = layer(x).float()
        nn.init.normal_(layer.lora_B["default"].weight, std=2e-4)
        learnt = (x.float() @ layer.lora_A["default"].weight.float().t()) @ layer.lora_B["default"].weight.float().t()
        by_peft = layer(x).float() - before
        kind(model)
        found = layer(x).float() - before
    # Along what was learnt: peft's rounding swallows nearly all of it.
    assert ((found * learnt).sum() / learnt.square().sum()).item() == pytest.approx(1, abs=0.1)
    assert ((by_peft * learnt).sum() / learnt.square().sum()).item() < 0.5


@pytest.mark.usefixtures("without_bf16")
def test_four_bit_layers_round_once_too() -> None:
    from bitsandbytes.nn.modules import Linear4bit

    base = nn.Sequential(Linear4bit(64, 128, compute_dtype=torch.bfloat16, quant_type="nf4")).bfloat16().to("cpu")
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]), autocast_adapter_dtype=False)  # type: ignore[arg-type]  # any module
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight, std=0.1)
    twin = copy.deepcopy(model)
    round_once(twin)
    fuse(model)
    assert isinstance(twin.base_model.model[0], RoundedLora)
    x = torch.randn(5, 64).bfloat16()
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


@pytest.mark.usefixtures("without_bf16")
def test_fp32_layers_and_unusual_adapters_do_not_change_by_round_once() -> None:
    for model in (small_model(), small_model(use_dora=True).bfloat16()):
        kinds = [type(m) for m in model.modules()]
        round_once(model)
        assert [type(m) for m in model.modules()] == kinds
