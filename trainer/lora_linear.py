"""LoRA layers whose base product and adapter run as one function, forward and backward.

peft's own layer makes the adapter's output, its scaled copy and the sum as three more tensors of the output's size,
and as many in backward. Here both products go into one tensor, and the frozen base weight gets no gradient.

Shapes: M rows (all dimensions but the last), I input size, O output size, R rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .wide_products import widened


class _LoraProduct(torch.autograd.Function):
    """x W^T + b + scaling (dropped A^T) B^T. `quant_state` is bitsandbytes' for a 4-bit W, else None.

    `dropped` is x itself where there is no dropout; then its share of the gradient is added to that of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
        quant_state: Any,
    ) -> torch.Tensor:
        x_MI = x.reshape(-1, x.shape[-1])
        dropped_MI = x_MI if dropped is None else dropped.reshape(-1, x.shape[-1])
        wide_MI = widened(x_MI)
        out_MO = torch.nn.functional.linear(
            wide_MI, widened(_dense(weight, quant_state)), None if bias_O is None else widened(bias_O)
        )
        low_MR = (wide_MI if dropped is None else widened(dropped_MI)) @ widened(a_RI).t()
        out_MO.addmm_(low_MR, widened(b_OR).t(), alpha=scaling)
        ctx.save_for_backward(None if dropped is None else dropped_MI, x_MI, weight, a_RI, b_OR, low_MR)
        ctx.scaling, ctx.quant_state, ctx.shape = scaling, quant_state, x.shape
        return out_MO.to(x.dtype).view(*x.shape[:-1], out_MO.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dropped_MI, x_MI, weight, a_RI, b_OR, low_MR = ctx.saved_tensors
        (grad,) = grad_outputs
        dtype, a_RI, b_OR = grad.dtype, widened(a_RI), widened(b_OR)
        grad_MO = widened(grad.reshape(-1, grad.shape[-1]))
        grad_low_MR = (grad_MO @ b_OR).mul_(ctx.scaling)
        grad_a_RI = grad_low_MR.t() @ widened(x_MI if dropped_MI is None else dropped_MI)
        # This way round: the wide matrix need not be transposed.
        grad_b_OR = (low_MR.t() @ grad_MO).mul_(ctx.scaling).t()
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_MO @ widened(_dense(weight, ctx.quant_state))
            if dropped_MI is None:
                grad_x.addmm_(grad_low_MR, a_RI)
            grad_x = grad_x.to(dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_dropped = (grad_low_MR @ a_RI).to(dtype).view(ctx.shape)
        return grad_x, grad_dropped, None, None, grad_a_RI.to(dtype), grad_b_OR.to(dtype), None, None


def _dense(weight: torch.Tensor, quant_state: Any) -> torch.Tensor:
    """weight_OI. Of a 4-bit weight a new tensor, made again in backward: keeping it would undo the saving."""
    if quant_state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, quant_state)


class FusedLora:
    """Put before one of peft's LoRA layers in the order of classes: its forward, where nothing speaks against it."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's: x (..., I) -> (..., O). Disabled, merged, several or unusual adapters are left to peft."""
        layer: Any = self
        name = _plain_adapter(layer)
        if name is None or args or kwargs or not _fits(layer.base_layer, x, layer.lora_A[name].weight):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # of the peft class that follows
        dropout = layer.lora_dropout[name]
        active = isinstance(dropout, nn.Dropout) and dropout.p > 0 and layer.training
        base = layer.base_layer
        return _LoraProduct.apply(  # type: ignore[return-value]  # autograd.Function.apply is untyped
            x,
            dropout(x) if active else None,
            base.weight,
            base.bias,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            getattr(base.weight, "quant_state", None),
        )


def fuse(model: nn.Module) -> None:
    """Give every plain LoRA layer of a peft model the fused forward, in place; names and parameters stay as they are.

    Not for ZeRO-3: it gathers weights when the sub-modules' own forwards run, which the fused one passes by; and as
    one unit (a leaf module) it would reduce the gradients of the first layer before they are there, since nothing
    below it needs a gradient.
    """
    from peft.tuners import lora

    for module in model.modules():
        # By name: peft has its 4-bit layer only where bitsandbytes is installed.
        if isinstance(module, lora.LoraLayer) and type(module).__name__ in ("Linear", "Linear4bit"):
            module.__class__ = _fused_class(type(module))


@functools.cache
def _fused_class(kind: type) -> Any:
    return type(f"Fused{kind.__name__}", (FusedLora, kind), {})


def _plain_adapter(layer: Any) -> str | None:
    """The one active adapter of a layer, where it is ordinary LoRA and not merged."""
    if layer.disable_adapters or layer.merged or layer.fan_in_fan_out:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant or layer.lora_bias[names[0]]:
        return None
    return names[0]


def _fits(base: Any, x: torch.Tensor, a_RI: torch.Tensor) -> bool:
    """Whether the base layer is a frozen linear one that computes in the dtype of x and of the adapter."""
    if x.dtype != a_RI.dtype or torch.is_autocast_enabled(x.device.type):
        return False
    if base.weight.requires_grad or (base.bias is not None and (base.bias.requires_grad or base.bias.dtype != x.dtype)):
        return False
    state = getattr(base.weight, "quant_state", None)
    if state is not None:
        return state.dtype == x.dtype and tuple(state.shape) == (base.out_features, base.in_features)
    return type(base) is nn.Linear and base.weight.dtype == x.dtype
