"""Attention over packed rows: documents laid end to end never attend to each other.

Registered in transformers under the name `packed`. One function serves one document, many documents, and
decoding with a key-value cache, so the model that trains also answers the samples.

Shapes: B batch (1 in training), H heads, K key-value heads, T row length, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cpu_attention import DocumentAttention
from .spec import TrainError

NAME = "packed"


def packed_attention(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention interface of transformers (`AttentionInterface`): returns output_BTHD and no weights.

    `document_lengths` sums to T; without it the row is one document. A dense mask would cost T x T, so documents
    are attended one at a time; on CPU that is 28 ms against 63 ms for four documents of 256 tokens.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise TrainError(
                f"{type(module).__name__} changes the attention scores ({name}), which packed attention does not do",
                "This model family cannot be trained yet; choose another model.",
            )
    length_q, length_k = query_BHTD.shape[2], key_BKTD.shape[2]
    groups = query_BHTD.shape[1] != key_BKTD.shape[1]
    if length_q != length_k:
        # Decoding: the few new positions see the whole cache (batch 1, nothing is padded).
        mask = torch.ones(length_q, length_k, dtype=torch.bool, device=query_BHTD.device).tril(length_k - length_q)
        out = F.scaled_dot_product_attention(
            query_BHTD, key_BKTD, value_BKTD, attn_mask=mask, scale=scaling, enable_gqa=groups
        )
        return out.transpose(1, 2), None
    lengths = document_lengths or (length_q,)
    same_size = (
        query_BHTD.shape[-1] == value_BKTD.shape[-1]
    )  # the kernel takes no other; latent attention has smaller values
    if len(lengths) > 1 and dropout == 0.0 and same_size and _has_flash(query_BHTD):
        return _varlen(query_BHTD, key_BKTD, value_BKTD, lengths, scaling, sliding_window), None
    whole = sliding_window is None or max(lengths) <= sliding_window
    if whole and dropout == 0.0 and _trains_on_cpu(query_BHTD, value_BKTD):
        scaling = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
        out: Any = DocumentAttention.apply(query_BHTD, key_BKTD, value_BKTD, lengths, scaling)
        return out.transpose(1, 2), None
    outs = []
    for q, k, v in zip(
        query_BHTD.split(lengths, 2), key_BKTD.split(lengths, 2), value_BKTD.split(lengths, 2), strict=True
    ):
        window = _window_mask(q.shape[2], sliding_window, q.device)
        outs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=window, dropout_p=dropout, is_causal=window is None, scale=scaling, enable_gqa=groups
            )
        )
    return torch.cat(outs, dim=2).transpose(1, 2), None


def _trains_on_cpu(query_BHTD: torch.Tensor, value_BKTD: torch.Tensor) -> bool:
    """Whether a gradient will be asked of our own backward pass, which is for one row and one head size."""
    if not query_BHTD.requires_grad or not torch.is_grad_enabled() or query_BHTD.dtype != torch.bfloat16:
        return False
    return query_BHTD.device.type == "cpu" and len(query_BHTD) == 1 and query_BHTD.shape[-1] == value_BKTD.shape[-1]


def _has_flash(query_BHTD: torch.Tensor) -> bool:
    """Whether the variable-length kernel can run: it is FlashAttention, for 16-bit tensors on Ampere or newer."""
    if not query_BHTD.is_cuda or query_BHTD.dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(query_BHTD.device)[0] >= 8


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """mask_TT of a causal window, or None where the window covers the whole document."""
    if sliding_window is None or length <= sliding_window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ~ones.tril(-sliding_window)


def _varlen(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """output_BTHD through torch.nn.attention.varlen, one kernel for all documents of the row (CUDA)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query_BHTD, key_BKTD, value_BKTD))
    ends = torch.tensor((0, *lengths), device=q.device).cumsum(0, dtype=torch.int32)
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    longest = max(lengths)
    shared: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if _shares_heads(varlen_attn):
            shared = {"enable_gqa": True}
        else:  # torch 2.11
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window, **shared)
    assert isinstance(out, torch.Tensor)
    return out[None]


@functools.cache
def _shares_heads(varlen_attn: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def register() -> None:
    """Make `attn_implementation="packed"` known to transformers. Idempotent; other models keep their own attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    # No mask is ever built: the document lengths say it all.
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)
