"""RMSNorm, rotary positions and gated units on CPU as one function each, with the backward pass written down.

Autograd keeps a tensor for every step of these formulas and goes over memory for each of them again; for a model of
576 hidden units that was a fifth of the training time. The results are those of transformers, to the last rounding.

Shapes: B batch, T row length, D hidden size; H heads, E head size.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ROTARY = "apply_rotary_pos_emb"
"""The name of that function in every modelling file of transformers."""


class _RmsNorm(torch.autograd.Function):
    """weight x / sqrt(mean(x^2) + eps), in fp32 but for the product with the weight (https://arxiv.org/abs/1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x_BTD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        scaled_BTD = x_BTD.to(torch.float32, copy=True)
        inverse_BT1 = torch.rsqrt(scaled_BTD.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x_BTD, weight_D, inverse_BT1)
        return weight_D * scaled_BTD.mul_(inverse_BT1).to(x_BTD.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_BTD, weight_D, inverse_BT1 = ctx.saved_tensors
        (grad_BTD,) = grad_outputs
        scaled_BTD = x_BTD.to(torch.float32, copy=True).mul_(inverse_BT1)
        grad_weight_D = None
        if ctx.needs_input_grad[1]:
            grad_weight_D = (grad_BTD * scaled_BTD).flatten(0, -2).sum(0).to(weight_D.dtype)
        found_BTD = grad_BTD.to(torch.float32, copy=True).mul_(weight_D.float())
        along_BT1 = (found_BTD * scaled_BTD).mean(-1, keepdim=True)
        found_BTD.sub_(scaled_BTD.mul_(along_BT1)).mul_(inverse_BT1)
        return found_BTD.to(x_BTD.dtype), grad_weight_D, None


class FusedNorm:
    """Put before a model's RMSNorm in the order of classes."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        norm: Any = self
        if hidden_states.dtype != norm.weight.dtype or hidden_states.device.type != "cpu":
            return super().forward(hidden_states)  # type: ignore[misc]  # of the norm class that follows
        return _RmsNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)  # type: ignore[return-value]  # untyped


class _Rotary(torch.autograd.Function):
    """Turn each pair (x_i, x_{i + E/2}) by its position's angle. Queries and keys have their own numbers of heads."""

    @staticmethod
    def forward(ctx: Any, query_BHTE: Any, key_BHTE: Any, cos_B1TE: Any, sin_B1TE: Any) -> Any:
        ctx.save_for_backward(cos_B1TE, sin_B1TE)
        return _turn(query_BHTE, cos_B1TE, sin_B1TE), _turn(key_BHTE, cos_B1TE, sin_B1TE)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos_B1TE, sin_B1TE = ctx.saved_tensors
        # The transposed matrix of the turn: both halves of the sines change places and sign.
        back_B1TE = -torch.cat(sin_B1TE.chunk(2, -1)[::-1], -1)
        return *(_turn(grad, cos_B1TE, back_B1TE) for grad in grad_outputs), None, None


def _turn(x_BHTE: torch.Tensor, cos_B1TE: torch.Tensor, sin_B1TE: torch.Tensor) -> torch.Tensor:
    half = x_BHTE.shape[-1] // 2
    found = x_BHTE * cos_B1TE
    found[..., :half].addcmul_(x_BHTE[..., half:], sin_B1TE[..., :half], value=-1)
    found[..., half:].addcmul_(x_BHTE[..., :half], sin_B1TE[..., half:])
    return found


class _GatedUnit(torch.autograd.Function):
    """silu(gate) x up (SwiGLU, https://arxiv.org/abs/2002.05202). silu(gate) is made again in backward, not kept."""

    @staticmethod
    def forward(ctx: Any, gate_BTD: torch.Tensor, up_BTD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_BTD, up_BTD)
        return nn.functional.silu(gate_BTD).mul_(up_BTD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_BTD, up_BTD = ctx.saved_tensors
        (grad_BTD,) = grad_outputs
        grad_gate_BTD = torch.ops.aten.silu_backward(grad_BTD * up_BTD, gate_BTD)
        return grad_gate_BTD, nn.functional.silu(gate_BTD).mul_(grad_BTD)


class FusedFeedForward:
    """Put before a model's gated feed-forward layer in the order of classes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        layer: Any = self
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc]  # of the layer class that follows
        return layer.down_proj(_GatedUnit.apply(layer.gate_proj(x), layer.up_proj(x)))


def fuse(model: nn.Module) -> None:
    """Give the model's norms, feed-forward layers and rotary function the fused forms, where these compute the same.

    Parameters and names stay; to call it again changes nothing. The rotary function is replaced in its modelling file, so in this whole process.
    """
    same: dict[type, bool] = {}
    for module in model.modules():
        kind = type(module)
        if isinstance(module, (FusedNorm, FusedFeedForward)):
            continue
        if kind.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            if kind not in same:
                same[kind] = _norm_is_same(module)
            if same[kind]:
                module.__class__ = _fused_class(FusedNorm, kind)
        elif kind.__name__.endswith("MLP") and hasattr(module, "gate_proj"):
            if kind not in same:
                same[kind] = _feed_forward_is_same(module)
            if same[kind]:
                module.__class__ = _fused_class(FusedFeedForward, kind)
    for modelling in {sys.modules[type(m).__module__] for m in model.modules()}:
        original = getattr(modelling, ROTARY, None)
        if original is not None and not hasattr(original, "__wrapped__") and _rotary_is_same(original):
            setattr(modelling, ROTARY, _fused_rotary(original))


@functools.cache
def _fused_class(form: type, kind: type) -> Any:
    return type(f"Fused{kind.__name__}", (form, kind), {})


def _fused_rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if args or kwargs or q.device.type != "cpu" or cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype:
            return original(q, k, cos, sin, *args, **kwargs)
        return _Rotary.apply(q, k, cos.unsqueeze(1), sin.unsqueeze(1))

    return rotary


def _norm_is_same(norm: Any) -> bool:
    """Whether `norm` follows the formula: some families add 1 to the weight, or multiply in fp32."""
    # Under ZeRO-3 the weight itself may be an empty tensor.
    size = getattr(norm.weight, "ds_shape", norm.weight.shape)[-1]
    generator = torch.Generator().manual_seed(0)
    x_BTD, weight_D = (torch.randn(*shape, size, generator=generator) for shape in ((1, 3), ()))
    try:
        expected = torch.func.functional_call(norm, {"weight": weight_D}, (x_BTD,))
    except (TypeError, RuntimeError):
        return False
    return torch.allclose(expected, _RmsNorm.apply(x_BTD, weight_D, norm.variance_epsilon), rtol=1e-6, atol=1e-6)  # type: ignore[arg-type]  # untyped


def _feed_forward_is_same(layer: Any) -> bool:
    """Whether the layer's class computes down(silu(gate(x)) x up(x)): some multiply, clip or cut in between."""
    generator = torch.Generator().manual_seed(0)

    def linear(inner: int, out: int) -> nn.Linear:
        # Not drawn from the global generator, which decides the adapters' initial weights.
        made: Any = nn.utils.skip_init(nn.Linear, inner, out)
        for parameter in made.parameters():
            parameter.data.normal_(generator=generator)
        return made

    small: Any = nn.Module()
    small.gate_proj, small.up_proj, small.down_proj = linear(4, 6), linear(4, 6), linear(6, 4)
    small.act_fn = getattr(layer, "act_fn", None)
    x_BTD = torch.randn(1, 3, 4, generator=generator)
    small.__class__ = type(layer)
    try:
        expected = type(layer).forward(small, x_BTD)
    except (TypeError, RuntimeError, AttributeError):
        return False
    unit: Any = _GatedUnit.apply(small.gate_proj(x_BTD), small.up_proj(x_BTD))
    return torch.allclose(expected, small.down_proj(unit), rtol=1e-6, atol=1e-6)


def _rotary_is_same(original: Callable[..., Any]) -> bool:
    """Whether a modelling file's function turns pairs that are half a head apart, as most do."""
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (
        torch.randn(*shape, 8, generator=generator) for shape in ((1, 2, 3), (1, 1, 3), (1, 3), (1, 3))
    )
    try:
        expected = original(query, key, cos, sin)
    except (TypeError, RuntimeError):
        return False
    found = _Rotary.apply(query, key, cos.unsqueeze(1), sin.unsqueeze(1))
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(expected, found, strict=True))  # type: ignore[arg-type]  # untyped
