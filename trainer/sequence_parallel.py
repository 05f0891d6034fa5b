"""Sequence parallelism: the ranks of one group share a row, by DeepSpeed Ulysses (arXiv 2309.14509).

Each rank computes its slice of the row; for attention an all-to-all gives it the whole row for a part of the heads.
DeepSpeed itself is not told: to its ZeRO all ranks are alike, so gradients are averaged and shards cut over dp x sp.

Shapes: T row length, S = T / sp slice of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import attention
from .data import Batch, TokenData
from .spec import TrainError

NAME = "packed_ulysses"


def padded_length(length: int, sp: int) -> int:
    """The next multiple of `sp`: every rank of a group gets as many tokens."""
    return -(-length // sp) * sp


def slice_of(row: Batch, sp_rank: int, sp: int) -> Batch:
    """The S tokens of a row that rank `sp_rank` of `sp` computes; labels are shifted already, so none is lost.

    `document_lengths` stay those of the whole row: that is what attention sees after the all-to-all.
    """
    length = row.input_ids_1T.shape[1]
    assert length % sp == 0, f"{length} tokens cannot be shared by {sp} ranks"
    own = slice(sp_rank * length // sp, (sp_rank + 1) * length // sp)
    tensors = (t[:, own] for t in (row.input_ids_1T, row.labels_1T, row.position_ids_1T))
    return Batch(*tensors, document_lengths=row.document_lengths)


def rank_batch(data: TokenData, rows: Sequence[int], sp_rank: int, sp: int, device: torch.device) -> Batch:
    """What rank `sp_rank` of `sp` computes of these rows, on its device. Row -1 is empty."""
    batch = slice_of(data.batch(rows, padded_length(data.row_length(rows), sp)), sp_rank, sp)
    if device.type == "cpu":
        return batch
    tensors = (batch.input_ids_1T, batch.labels_1T, batch.position_ids_1T)
    return Batch(*(t.to(device, non_blocking=True) for t in tensors), document_lengths=batch.document_lengths)


def share_rows(base: Any, sp: int, timeout: timedelta) -> None:
    """Make this model's attention work on slices. Collective: every rank must call, after DeepSpeed has started.

    `timeout` limits every exchange. The function is registered under a name of its own, so that another model in this process keeps its attention.
    Raises TrainError when the heads cannot be shared by `sp` ranks.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = base.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % sp or (kv_heads % sp and sp % kv_heads):
        raise TrainError(
            f"{sp} ranks cannot share {heads} heads ({kv_heads} kv)",
            "parallel.sp must divide the heads, and it and the kv heads must divide one another.",
        )
    ulysses = UlyssesSPAttentionHF(
        attn=ALL_ATTENTION_FUNCTIONS[base.config._attn_implementation],
        batch_size=1,
        attn_head_count=heads,
        attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        kv_head_count=kv_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=_own_group(sp, timeout),
        seq_length_is_variable=True,
    )

    def shared_attention(
        module: torch.nn.Module,
        query_BHSD: torch.Tensor,
        key_BKSD: torch.Tensor,
        value_BKSD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        return ulysses(module, query_BHSD, key_BKSD, value_BKSD, attention_mask, **kwargs)

    # Compiled layers keep out of it: the exchange waits for other ranks.
    ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(shared_attention))
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)
    base.set_attn_implementation(NAME)


@contextmanager
def whole_rows(base: Any) -> Iterator[None]:
    """Within it, the model computes whole rows on one rank, without the others: for samples."""
    shared = base.config._attn_implementation == NAME
    if shared:
        base.set_attn_implementation(attention.NAME)
    try:
        yield
    finally:
        if shared:
            base.set_attn_implementation(NAME)


def _own_group(sp: int, timeout: timedelta) -> Any:
    """The group of `sp` neighbouring ranks that this one belongs to. Collective: every rank makes all of them."""
    mine = None
    for first in range(0, dist.get_world_size(), sp):
        ranks = list(range(first, first + sp))
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None
    return mine
