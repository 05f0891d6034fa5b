"""Language-model head and cross-entropy, only where a label is supervised and never as a whole logits tensor.

Shapes: N supervised positions, D hidden size, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100
CHUNK = 256


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
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias and bias_V is not None else None
        for start in range(0, hidden_ND.shape[0], CHUNK):
            hidden_CD = hidden_ND[start : start + CHUNK]
            labels_C = labels_N[start : start + CHUNK]
            logits_CV = F.linear(hidden_CD, weight_VD, bias_V).float()
            if logit_scale != 1.0:
                logits_CV *= logit_scale
            capped_CV = None
            if softcap is not None:
                capped_CV = torch.tanh(logits_CV / softcap)
                logits_CV = capped_CV * softcap
            # log_softmax, not logsumexp: on CPU it is six times faster for a large vocabulary.
            log_p_CV = torch.log_softmax(logits_CV, dim=-1)
            total -= log_p_CV.gather(1, labels_C[:, None]).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad_CV = log_p_CV.exp_()
            grad_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= 1
            if capped_CV is not None:
                grad_CV *= 1 - capped_CV.square()
            if logit_scale != 1.0:
                grad_CV *= logit_scale
            grad_low_CV = grad_CV.to(weight_VD.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[start : start + CHUNK] = grad_low_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += (grad_low_CV.t() @ hidden_CD).float()
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
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
