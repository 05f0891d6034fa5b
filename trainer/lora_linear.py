"""LoRA layers whose base product and adapter run as one function, forward and backward.

peft's own layer makes the adapter's output, its scaled copy and the sum as three more tensors of the output's size,
and as many in backward. Here both products go into one tensor, and the frozen base weight gets no gradient.

peft also rounds the base product before it adds the adapter's: in bf16 everything that the adapter has learnt vanishes
as long as it is below half a step of the base product's last bit. Where products are made in fp32 (`wide_products`)
the sum is rounded once, and shows.

Shapes: M rows (all dimensions but the last), I input size, O output size, R rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .wide_products import slow_dtypes, widened


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


class _WideProduct(torch.autograd.Function):
    """x W^T + b, left in fp32. W is widened again in backward: kept, a copy of every layer would be in memory."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias_O: torch.Tensor | None, quant_state: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.quant_state, ctx.bias_dtype = quant_state, None if bias_O is None else bias_O.dtype
        dense_OI = _dense(weight, quant_state).float()
        return torch.nn.functional.linear(x.float(), dense_OI, None if bias_O is None else bias_O.float())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_MO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias_O = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_MO @ _dense(weight, ctx.quant_state).float()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_MO.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias_O = grad_MO.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias_O, None


class WideLinear:
    """Put before the linear layers inside a LoRA layer: their output stays in fp32, for the sum."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., I) -> (..., O) in fp32."""
        layer: Any = self
        return _WideProduct.apply(x, layer.weight, layer.bias, getattr(layer.weight, "quant_state", None))  # type: ignore[return-value]  # untyped


class RoundedLora:
    """Put before one of peft's LoRA layers: the sum of its wide products is rounded to the dtype of the input."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's: x (..., I) -> (..., O)."""
        return super().forward(x, *args, **kwargs).to(x.dtype)  # type: ignore[misc]  # of the peft class that follows


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
    below it needs a gradient. See `round_once`.
    """
    for module in _lora_layers(model):
        module.__class__ = _with(FusedLora, type(module))


def round_once(model: nn.Module) -> None:
    """For ZeRO-3: let every LoRA layer whose products are made in fp32 add them up before it rounds, as the fused one does.

    In place; names, parameters and the order in which sub-modules run stay as they are. Other layers are left alone.
    """
    for module in _lora_layers(model):
        inner = [module.base_layer, *module.lora_A.values(), *module.lora_B.values()]
        if _plain_adapter(module) is not None and all(_is_wide(layer) for layer in inner):
            for layer in inner:
                layer.__class__ = _with(WideLinear, type(layer))
            module.__class__ = _with(RoundedLora, type(module))


def _lora_layers(model: nn.Module) -> list[Any]:
    from peft.tuners import lora

    # By name: peft has its 4-bit layer only where bitsandbytes is installed.
    kinds = ("Linear", "Linear4bit")
    return [m for m in model.modules() if isinstance(m, lora.LoraLayer) and type(m).__name__ in kinds]


def _is_wide(layer: Any) -> bool:
    """Whether it is a linear layer of a dtype that is multiplied in fp32; of a 4-bit one the dtype it stands for counts."""
    state = getattr(layer.weight, "quant_state", None)
    dtype = layer.weight.dtype if state is None else state.dtype
    return isinstance(layer, nn.Linear) and layer.weight.device.type == "cpu" and dtype in slow_dtypes()


@functools.cache
def _with(mixin: type, kind: type) -> Any:
    """`kind` with the forward of `mixin`."""
    return type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})


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
