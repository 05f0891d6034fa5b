"""Packed attention equals one call per document, and decoding equals the whole sequence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.attention import packed_attention
from trainer.spec import TrainError

LENGTHS = (5, 1, 9)


def qkv(heads: int, kv_heads: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, length, 8, generator=generator) for h in (heads, kv_heads, kv_heads)]


def dense(q, k, v, lengths, window=None):
    """The same through one dense block mask."""
    total = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(total)
    mask = (document[:, None] == document[None]) & (position[:, None] >= position[None])
    if window is not None:
        mask &= position[:, None] - position[None] < window
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_documents_do_not_see_each_other(kv_heads: int, window: int | None) -> None:
    q, k, v = qkv(6, kv_heads, sum(LENGTHS))
    out, _ = packed_attention(nn.Module(), q, k, v, None, document_lengths=LENGTHS, sliding_window=window)
    torch.testing.assert_close(out, dense(q, k, v, LENGTHS, window), rtol=1e-5, atol=1e-5)


def test_without_lengths_the_row_is_one_document() -> None:
    q, k, v = qkv(4, 4, 12)
    out, _ = packed_attention(nn.Module(), q, k, v, None)
    torch.testing.assert_close(out, dense(q, k, v, (12,)), rtol=1e-5, atol=1e-5)


def test_decoding_with_a_cache_equals_the_whole_sequence() -> None:
    q, k, v = qkv(4, 2, 12)
    whole, _ = packed_attention(nn.Module(), q, k, v, None)
    last, _ = packed_attention(nn.Module(), q[:, :, -3:], k, v, None)
    torch.testing.assert_close(last, whole[:, -3:], rtol=1e-5, atol=1e-5)


def test_values_smaller_than_keys_never_reach_the_kernel_for_several_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention: FlashAttention takes one head size for all three."""
    monkeypatch.setattr("trainer.attention._has_flash", lambda query: True)
    monkeypatch.setattr("trainer.attention._varlen", lambda *args: pytest.fail("one head size for all three is needed"))
    q, k, v = qkv(4, 4, sum(LENGTHS))
    out, _ = packed_attention(nn.Module(), q, k, v[..., :6], None, document_lengths=LENGTHS)
    torch.testing.assert_close(out, dense(q, k, v[..., :6], LENGTHS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_attention_that_would_be_computed_wrongly_is_refused(name: str) -> None:
    q, k, v = qkv(4, 4, 4)
    with pytest.raises(TrainError, match=name):
        packed_attention(nn.Module(), q, k, v, None, **{name: 50.0})
