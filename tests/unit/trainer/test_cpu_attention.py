"""The backward pass of attention on CPU, against autograd through torch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from trainer.cpu_attention import BLOCK, DocumentAttention, blocks_of


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], scaling: float
) -> torch.Tensor:
    """One document at a time, by torch."""
    documents = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat(
        [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            for q, k, v in documents
        ],
        2,
    )


def own(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], scaling: float
) -> torch.Tensor:
    return DocumentAttention.apply(query, key, value, lengths, scaling)  # type: ignore[return-value]  # untyped


def results(
    function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], grad: torch.Tensor, *args: Any
) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, *args)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]  # backward has run


def row(
    length: int, heads: int, kv_heads: int, size: int, spread: float = 2.0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Token by token in memory, as the projections of a model leave it."""
    generator = torch.Generator().manual_seed(length)
    query, key, value, grad = (
        torch.randn(1, length, h, size, generator=generator, dtype=torch.float64).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    return [query * spread, key * spread, value], grad


ROWS = [
    ((BLOCK,), 2, 2, 8),
    ((1, 130, 260, 109), 4, 2, 24),
    ((37, 60), 9, 3, 16),
    ((2 * BLOCK, 1, 2 * BLOCK + 7), 4, 1, 20),
    ((5,) * 60, 2, 1, 8),
]


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "size"), ROWS)
def test_gradients_equal_those_of_torch(lengths: tuple[int, ...], heads: int, kv_heads: int, size: int) -> None:
    tensors, grad = row(sum(lengths), heads, kv_heads, size)
    expected = results(reference, tensors, grad, lengths, size**-0.5)
    for found, wanted in zip(results(own, tensors, grad, lengths, size**-0.5), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    low = [t.float() for t in tensors]
    for found, wanted in zip(results(own, low, grad.float(), lengths, size**-0.5), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_in_bf16_it_is_as_near_the_truth_as_torch(spread: float) -> None:
    """Large scores are the hard case: what is rounded there are differences, not the scores themselves."""
    lengths = (200, 56, 300)
    tensors, grad = row(556, 9, 3, 64, spread)
    low, low_grad = [t.bfloat16() for t in tensors], grad.bfloat16()
    truth = results(reference, [t.double() for t in low], low_grad.double(), lengths, 0.125)
    by_torch = results(reference, low, low_grad, lengths, 0.125)
    for found, other, wanted in zip(results(own, low, low_grad, lengths, 0.125), by_torch, truth, strict=True):
        error, allowed = (float((t.double() - wanted).norm() / wanted.norm()) for t in (found, other))
        assert error < 3 * allowed


def test_what_follows_a_document_does_not_reach_it() -> None:
    tensors, grad = row(300, 2, 1, 16)
    first = results(own, [t[:, :, :130] for t in tensors], grad[:, :, :130], (130,), 0.25)
    for t in tensors:
        t[:, :, 130:] = 1e3
    both = results(own, tensors, grad, (130, 170), 0.25)
    for alone, among in zip(first, both, strict=True):
        torch.testing.assert_close(among[:, :, :130], alone)


def test_a_long_document_is_never_a_square_of_scores() -> None:
    lengths = (40 * BLOCK,)
    assert max(block.bias_QM.numel() for block in blocks_of(lengths, torch.bfloat16)) == BLOCK * BLOCK
