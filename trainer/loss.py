"""Language-model head and cross-entropy, only where a label is supervised and never as a whole logits tensor.

Shapes: N supervised positions, D hidden size, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .wide_products import widened

IGNORE = -100
CHUNK = 256
CPU_ROWS = 16
"""Positions whose fp32 logits exist at one time on CPU."""
CPU_ROUND = 32


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log p(label). The gradient is made in the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        logit_scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        count = hidden_ND.shape[0]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias and bias_V is not None else None
        wide_VD = widened(weight_VD)
        # One for all chunks: memory of this size would come new from the kernel, and be cleared, for each of them.
        buffer_CV = wide_VD.new_empty(min(CHUNK, count + -count % CPU_ROUND), len(wide_VD))
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            hidden_CD = widened(_round_up(hidden_ND[start : start + size]))
            logits_CV = torch.mm(hidden_CD, wide_VD.t(), out=buffer_CV[: len(hidden_CD)])
            if bias_V is not None:
                logits_CV += bias_V
            # Positions that only round the chunk up must add nothing to the gradient of the weight.
            logits_CV[size:].zero_()
            for losses_C, block_CV in _losses(logits_CV[:size], labels_N[start : start + size], logit_scale, softcap):
                total += losses_C.sum()
                if grad_bias_V is not None:
                    grad_bias_V += block_CV.sum(0)
            if grad_hidden_ND is not None:
                grad_hidden_ND[start : start + size] = (logits_CV @ wide_VD)[:size]
            if grad_weight_VD is not None:
                grad_weight_VD += (logits_CV.t() @ hidden_CD).float()
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.dtypes = (weight_VD.dtype, bias_V.dtype if bias_V is not None else None)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        hidden, weight, bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if hidden is None else hidden.float().mul_(grad).to(hidden.dtype),
            None if weight is None else (weight * grad).to(weight_dtype),
            None if bias is None else (bias * grad).to(bias_dtype),
            None,
            None,
            None,
        )


def _losses(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, logit_scale: float, softcap: float | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The losses of a few positions at a time, and the gradient of their sum by the logits in fp32, which also replaces `logits_CV`.

    Few, so that their fp32 copies stay in the processor's cache: for a large vocabulary that halves the time.
    """
    rows = CPU_ROWS if logits_CV.device.type == "cpu" else len(logits_CV)
    for low_CV, labels in zip(logits_CV.split(rows), labels_C.split(rows), strict=True):
        block_CV = low_CV.float()
        if logit_scale != 1.0:
            block_CV = block_CV * logit_scale
        capped_CV = None
        if softcap is not None:
            capped_CV = torch.tanh(block_CV / softcap)
            block_CV = capped_CV * softcap
        # log_softmax, not logsumexp: on CPU it is six times faster for a large vocabulary.
        log_p_CV = torch.log_softmax(block_CV, dim=-1)
        losses_C = -log_p_CV.gather(1, labels[:, None])[:, 0]
        grad_CV = log_p_CV.exp_()
        grad_CV[torch.arange(len(labels), device=labels.device), labels] -= 1
        if capped_CV is not None:
            grad_CV *= 1 - capped_CV.square()
        if logit_scale != 1.0:
            grad_CV *= logit_scale
        low_CV.copy_(grad_CV)
        yield losses_C, grad_CV


def _round_up(hidden_CD: torch.Tensor) -> torch.Tensor:
    """With zeros below, on CPU to a multiple of CPU_ROUND rows: a matrix shape that is new costs its first call 10 ms."""
    missing = -len(hidden_CD) % CPU_ROUND if hidden_CD.device.type == "cpu" else 0
    return F.pad(hidden_CD, (0, 0, 0, missing)) if missing else hidden_CD


def supervised_loss_sum(
    hidden_BTD: torch.Tensor,
    labels_BT: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Sum (fp32 scalar) of the cross-entropy over the positions whose label is not IGNORE.

    `labels_BT` is already shifted: labels[t] is the token after position t. A row without any label gives 0 with a
    gradient of 0, so that every rank runs the same backward pass. Gemma's `softcap` and a constant `logit_scale`
    are applied as those models do it.
    """
    keep_BT = labels_BT != IGNORE
    return _ChunkedCrossEntropy.apply(hidden_BTD[keep_BT], weight_VD, bias_V, labels_BT[keep_BT], logit_scale, softcap)  # type: ignore[return-value]  # autograd.Function.apply is untyped


@torch.no_grad()
def supervised_losses(
    hidden_BTD: torch.Tensor,
    labels_BT: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """losses_N (fp32): the addends of `supervised_loss_sum`, in the order of the positions. Without gradient."""
    keep_BT = labels_BT != IGNORE
    hidden_ND, labels_N, wide_VD = hidden_BTD[keep_BT], labels_BT[keep_BT], widened(weight_VD)
    found = [torch.zeros(0, device=hidden_BTD.device)]
    for hidden_CD, labels_C in zip(hidden_ND.split(CHUNK), labels_N.split(CHUNK), strict=True):
        logits_CV = torch.mm(widened(_round_up(hidden_CD)), wide_VD.t())
        if bias_V is not None:
            logits_CV += bias_V
        found += [losses for losses, _ in _losses(logits_CV[: len(hidden_CD)], labels_C, logit_scale, softcap)]
    return torch.cat(found)
