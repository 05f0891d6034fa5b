"""Attention of packed rows on CPU: torch's own kernel forward, and a backward pass made of matrix products.

torch's backward kernel does not use the matrix unit that its forward uses, and takes ten times as long. Here the
row is cut into blocks of queries, and each block is multiplied with the keys that its documents reach back to, so
no T x T matrix exists and long documents cost no more memory than short ones.

Shapes: H query heads, K key-value heads, G = H / K, T row length, D head size, N blocks, Q queries of a block,
S keys that a block sees.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .wide_products import widened

BLOCK = 128
KEY_STEP = 32
"""Spans of keys begin at a multiple of this: every new matrix shape costs the first call some milliseconds."""
LENGTH_STEP = 32
"""Lengths that torch's kernel is given: for every new one it makes code of 2 MB, and never frees it."""


@dataclass(frozen=True)
class Block:
    """Queries start..start + BLOCK against keys first_key..start + BLOCK."""

    start: int
    first_key: int
    hidden: int
    """So many keys at the beginning of the span belong to an earlier document."""
    bias_QM: torch.Tensor
    """0 where a query sees a key, -inf elsewhere; it covers the last M keys, all between them and the hidden are seen."""


@functools.lru_cache(maxsize=8)
def blocks_of(lengths: tuple[int, ...], dtype: torch.dtype) -> tuple[Block, ...]:
    """The blocks of a row whose documents have these lengths, the last one filled up with queries that see nothing."""
    total = sum(lengths)
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    firsts = torch.tensor((0, *lengths)).cumsum(0)
    padded = -(-total // BLOCK) * BLOCK
    document_T = torch.cat((document_T, torch.full((padded - total,), -1)))
    blocks = []
    for start in range(0, padded, BLOCK):
        own_Q = document_T[start : start + BLOCK]
        first = int(firsts[own_Q[0]])
        first_key = first // KEY_STEP * KEY_STEP
        # Within one document only its beginning and the diagonal need a mask.
        one_document = bool((own_Q == own_Q[0]).all())
        keys_M = torch.arange(start if one_document else first_key, start + BLOCK)
        seen_QM = (own_Q[:, None] == document_T[keys_M]) & (keys_M <= torch.arange(start, start + BLOCK)[:, None])
        seen_QM &= own_Q[:, None] >= 0
        bias_QM = torch.zeros(seen_QM.shape, dtype=dtype).masked_fill_(~seen_QM, float("-inf"))
        blocks.append(Block(start, first_key, first - first_key if one_document else 0, bias_QM))
    return tuple(blocks)


class DocumentAttention(torch.autograd.Function):
    """softmax(scaling q k^T) v within each document, causal. apply(query_1HTD, key_1KTD, value_1KTD, lengths, scaling).

    Scores are not kept: backward makes the probabilities again from the log-sum-exp of forward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_1HTD: torch.Tensor,
        key_1KTD: torch.Tensor,
        value_1KTD: torch.Tensor,
        lengths: tuple[int, ...],
        scaling: float,
    ) -> torch.Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        _, heads, total, size = query_1HTD.shape
        out_1THD = query_1HTD.new_empty(1, total, heads, size)
        lse_HT = torch.empty(heads, total, dtype=torch.promote_types(query_1HTD.dtype, torch.float32))
        start = 0
        wide = [widened(t) for t in (query_1HTD, key_1KTD, value_1KTD)]
        for length in lengths:
            q, k, v = (_rounded(t, start, length) for t in wide)
            out, lse = kernel(q, k, v, is_causal=True, scale=scaling)
            out_1THD.narrow(1, start, length).copy_(out[:, :, :length].transpose(1, 2))
            lse_HT.narrow(1, start, length).copy_(lse[0, :, :length])
            start += length
        ctx.save_for_backward(query_1HTD, key_1KTD, value_1KTD, out_1THD, lse_HT)
        ctx.lengths, ctx.scaling = lengths, scaling
        return out_1THD.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dtype = grad_outputs[0].dtype
        *tensors, lse_HT = *ctx.saved_tensors[:4], *grad_outputs, ctx.saved_tensors[4]
        query_1HTD, key_1KTD, value_1KTD, out_1THD, grad_1HTD = map(widened, tensors)
        scaling, kv_heads, (_, _, total, size) = ctx.scaling, key_1KTD.shape[1], query_1HTD.shape
        delta_HT = grad_1HTD[0].to(lse_HT.dtype, copy=True).mul_(out_1THD[0].transpose(0, 1)).sum(-1)
        # One more column on each side subtracts inside the product, before the sum is rounded to the tensor's dtype.
        q_NKRE = _query_blocks(query_1HTD[0], lse_HT / -scaling, kv_heads)
        g_NKRE = _query_blocks(grad_1HTD[0], -delta_HT, kv_heads)
        k_KTE, v_KTE = (_with_ones(t[0], q_NKRE.shape[-1], q_NKRE.shape[0] * BLOCK) for t in (key_1KTD, value_1KTD))
        grad_q_NKRD = torch.empty_like(q_NKRE[..., :size])
        grad_k_KTD, grad_v_KTD = (torch.zeros_like(k_KTE[..., :size], dtype=lse_HT.dtype) for _ in range(2))
        for n, block in enumerate(blocks_of(ctx.lengths, query_1HTD.dtype)):
            span = slice(block.first_key, block.start + BLOCK)
            k_KSE, v_KSE, q_KRE, g_KRE = k_KTE[:, span], v_KTE[:, span], q_NKRE[n], g_NKRE[n]
            p_KRS = _scaled_product(q_KRE, k_KSE.transpose(1, 2), scaling)
            p_KGQS = p_KRS.view(kv_heads, -1, BLOCK, p_KRS.shape[-1])
            p_KGQS[..., -block.bias_QM.shape[1] :].add_(block.bias_QM)
            p_KRS[..., : block.hidden] = float("-inf")
            p_KRS.exp_()
            grad_v_KTD[:, span] += torch.bmm(p_KRS.transpose(1, 2), g_KRE[..., :size])
            p_KRS.mul_(torch.bmm(g_KRE, v_KSE.transpose(1, 2)))
            grad_q_NKRD[n] = _scaled_product(p_KRS, k_KSE[..., :size], scaling)
            grad_k_KTD[:, span].add_(torch.bmm(p_KRS.transpose(1, 2), q_KRE[..., :size]), alpha=scaling)
        grad_k_1KTD, grad_v_1KTD = (g[None, :, :total].to(dtype) for g in (grad_k_KTD, grad_v_KTD))
        return _rows_of_blocks(grad_q_NKRD, total).to(dtype), grad_k_1KTD, grad_v_1KTD, None, None


def _rounded(rows_1HTD: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """The rows of a document and some more, up to a multiple of LENGTH_STEP. Causal attention does not see what follows."""
    wanted = -(-length // LENGTH_STEP) * LENGTH_STEP
    total = rows_1HTD.shape[2]
    if start + wanted <= total:
        return rows_1HTD.narrow(2, start, wanted)
    return F.pad(rows_1HTD.narrow(2, start, total - start), (0, 0, 0, start + wanted - total))


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale a b for batches of matrices, scaled before it is rounded."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def _query_blocks(rows_HTD: torch.Tensor, column_HT: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The rows as blocks of matrices (N, K, G x Q, D + columns), with `column_HT` at their right.

    A 16-bit dtype takes two columns, whose sum holds what one would lose.
    """
    heads, total, size = rows_HTD.shape
    narrow = rows_HTD.dtype != column_HT.dtype
    count = -(-total // BLOCK)
    found = rows_HTD.new_empty(count, kv_heads, heads // kv_heads, BLOCK, size + 1 + narrow)
    if total % BLOCK:
        # Rows behind the end see nothing and give nothing, but what memory happens to hold may be NaN.
        found[-1].zero_()
    rows = found.permute(1, 2, 0, 3, 4).flatten(0, 1)
    high_HT = column_HT.to(rows_HTD.dtype)
    parts = [rows_HTD, high_HT[..., None]]
    if narrow:
        parts.append((column_HT - high_HT).to(rows_HTD.dtype)[..., None])
    whole = total // BLOCK
    at = 0
    for part in parts:
        target = rows[..., at : at + part.shape[-1]]
        target[:, :whole] = part[:, : whole * BLOCK].unflatten(1, (whole, BLOCK))
        if whole < count:
            target[:, whole, : total - whole * BLOCK] = part[:, whole * BLOCK :]
        at += part.shape[-1]
    return found.flatten(2, 3)


def _with_ones(rows_KTD: torch.Tensor, width: int, length: int) -> torch.Tensor:
    """The rows (K, length, width) with ones at their right and zeros below."""
    heads, total, size = rows_KTD.shape
    found = rows_KTD.new_zeros(heads, length, width)
    found[:, :total, :size] = rows_KTD
    found[:, :total, size:] = 1
    return found


def _rows_of_blocks(blocks_NKRD: torch.Tensor, total: int) -> torch.Tensor:
    """(N, K, G x Q, D) back to (1, H, T, D), token by token in memory."""
    count, kv_heads, rows, size = blocks_NKRD.shape
    heads = kv_heads * rows // BLOCK
    rows_TKGD = blocks_NKRD.view(count, kv_heads, -1, BLOCK, size).permute(0, 3, 1, 2, 4)
    return rows_TKGD.reshape(1, count * BLOCK, heads, size)[:, :total].transpose(1, 2)
