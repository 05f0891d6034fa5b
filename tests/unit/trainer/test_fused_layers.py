"""Fused RMSNorm, rotary positions and feed-forward layers against those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trainer import fused_layers
from trainer.fused_layers import ROTARY, FusedFeedForward, FusedNorm, fuse

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(autouse=True)
def _own_modelling_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `fuse` replaces in them is put back."""
    for modelling in (modeling_llama, modeling_gemma2):
        monkeypatch.setattr(modelling, ROTARY, getattr(modelling, ROTARY))


def norm(dtype: torch.dtype) -> LlamaRMSNorm:
    found = LlamaRMSNorm(48, 1e-5).to(dtype)
    torch.nn.init.normal_(found.weight, 1.0, 0.3)
    return found


def run(layer: LlamaRMSNorm, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(grad)
    return [out.detach(), x.grad, layer.weight.grad]  # type: ignore[list-item]  # backward has run


def test_a_norm_equals_the_one_it_replaces() -> None:
    torch.manual_seed(0)
    layer, x, grad = norm(torch.float32), torch.randn(2, 5, 48), torch.randn(2, 5, 48)
    expected = run(layer, x, grad)
    fuse(layer)
    assert isinstance(layer, FusedNorm)
    for found, wanted in zip(run(layer, x, grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_in_bf16_a_norm_is_no_further_from_the_truth() -> None:
    torch.manual_seed(0)
    layer, x, grad = norm(torch.bfloat16), torch.randn(4, 90, 48).bfloat16(), torch.randn(4, 90, 48).bfloat16()
    by_transformers = run(layer, x, grad)
    exact = norm(torch.float64)
    exact.weight.data.copy_(layer.weight.data)
    truth = run(exact, x.double(), grad.double())
    fuse(layer)
    for found, other, wanted in zip(run(layer, x, grad), by_transformers, truth, strict=True):
        error, allowed = (float((t.double() - wanted).norm()) for t in (found, other))
        assert error <= 1.1 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_queries_and_keys(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 3, 7, 16).to(dtype), torch.randn(1, 1, 7, 16).to(dtype)
    angle = torch.rand(1, 7, 8) * 6
    cos, sin = (torch.cat((f(angle), f(angle)), -1).to(dtype) for f in (torch.cos, torch.sin))
    results: list[list[Any]] = []
    for function in (
        modeling_llama.apply_rotary_pos_emb,
        fused_layers._fused_rotary(modeling_llama.apply_rotary_pos_emb),
    ):
        leaves = [t.clone().requires_grad_() for t in (query, key)]
        out = function(leaves[0], leaves[1], cos, sin)
        torch.autograd.backward(out, [t * 0.5 for t in (query, key)])
        results.append([*(o.detach() for o in out), *(leaf.grad for leaf in leaves)])
    tolerance = 1e-6 if dtype == torch.float32 else 0.04
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_a_whole_model_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    ids = torch.randint(0, 64, (1, 20))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        fuse(model)
    assert getattr(modeling_llama, ROTARY).__wrapped__ is not None
    assert sum(isinstance(m, FusedNorm) for m in model.modules()) == 5
    assert sum(isinstance(m, FusedFeedForward) for m in model.modules()) == 2
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feed_forward_layer_gives_the_same_bits_and_keeps_a_tensor_less(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = modeling_llama.LlamaMLP(LlamaConfig(**SIZES)).to(dtype)
    x, grad = torch.randn(2, 9, 32).to(dtype), torch.randn(2, 9, 32).to(dtype)
    results, kept = [], []
    for _ in range(2):
        layer.zero_grad()
        leaf, sizes = x.clone().requires_grad_(), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            out = layer(leaf)
        out.backward(grad)
        results.append([out.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
        kept.append(sum(sizes.values()))
        fuse(layer)
    assert isinstance(layer, FusedFeedForward)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    assert kept[0] - kept[1] == 2 * 9 * 48


def test_a_feed_forward_layer_of_another_formula_is_left_alone() -> None:
    class ClippedMLP(modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.clamp(-0.5, 0.5))

    gelu = modeling_llama.LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu"))
    for layer in (ClippedMLP(LlamaConfig(**SIZES)), gelu):
        fuse(layer)
        assert not isinstance(layer, FusedFeedForward)


def test_a_norm_of_another_formula_is_left_alone() -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES))
    fuse(model)
    assert not any(isinstance(m, FusedNorm) for m in model.modules())


def test_a_norm_that_only_looks_the_same_is_left_alone() -> None:
    class AddedRMSNorm(LlamaRMSNorm):
        """Adds 1 to the weight."""

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * (1 + self.weight) / self.weight

    layer = AddedRMSNorm(48)
    fuse(layer)
    assert type(layer) is AddedRMSNorm
