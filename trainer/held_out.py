"""The loss of rows that are never trained on, in the run's own layout: shards, and rows shared by sp ranks, stay as they are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .data import TokenData
from .engine import Ranks
from .heartbeat import HEARTBEAT
from .sequence_parallel import rank_batch
from .spec import TrainSpec


@dataclass(frozen=True)
class HeldOutLoss:
    loss: float
    """Mean over all supervised tokens of the held-out rows; not finite where the model's answers are not."""
    supervised_tokens: int
    seconds: float


class HeldOut:
    """When the loss is taken, and how. Without held-out rows it is never due."""

    def __init__(self, spec: TrainSpec, ranks: Ranks, data: TokenData, total_steps: int) -> None:
        self.spec, self.ranks, self.data, self.total_steps = spec, ranks, data, total_steps
        self.rounds = rounds_of(data.held_out_rows, spec.optim.micro_batch, spec.parallel.dp)
        self.supervised = int(data.supervised_per_row[list(data.held_out_rows)].sum())

    def is_due(self, step: int) -> bool:
        """Whether the loss is wanted after `step` optimizer steps."""
        every = self.spec.evaluate.loss_every_steps
        return bool(self.rounds) and (step in (0, self.total_steps) or bool(every and step % every == 0))

    def loss(self, engine: Any) -> HeldOutLoss:
        """The loss of the weights as they are, without dropout. Changes nothing. There must be held-out rows.

        Collective: every rank must call.
        """
        began, ranks = time.perf_counter(), self.ranks
        total = torch.zeros((), dtype=torch.float64)
        engine.eval()
        with torch.no_grad():
            for rows_of_dp in self.rounds:
                HEARTBEAT.beat("held-out rows")
                batch = rank_batch(
                    self.data, rows_of_dp[ranks.dp_rank], ranks.sp_rank, self.spec.parallel.sp, ranks.device
                )
                loss = engine(batch.input_ids_1T, batch.labels_1T, batch.position_ids_1T, batch.document_lengths)
                total += loss.double().cpu()
        engine.train()
        HEARTBEAT.beat("sum of the held-out loss")
        total = total.to(ranks.device)
        dist.all_reduce(total)
        return HeldOutLoss(float(total) / self.supervised, self.supervised, round(time.perf_counter() - began, 3))


def rounds_of(rows: range, micro_batch: int, dp: int) -> list[list[list[int]]]:
    """The rows as rounds in which each dp rank has one micro batch; -1 where there are no more rows.

    Every rank takes part in every round: under ZeRO-3, and with shared rows, a forward pass is collective.
    """
    size = micro_batch * dp
    padded = [*rows, *[-1] * (-len(rows) % size)]
    return [
        [padded[start + rank * micro_batch : start + (rank + 1) * micro_batch] for rank in range(dp)]
        for start in range(0, len(padded), size)
    ]
