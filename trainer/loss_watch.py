"""What is wrong with a step's loss or gradient, and which rows it came from.

A spike is reported and training goes on. A loss or gradient that is not finite stops training before anything of it is
saved; under fp16 it is part of finding the loss scale, so the step is skipped and counted, up to a limit.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .data import TokenData, step_rows
from .disk import write_text, writing
from .engine import Ranks, local_fragments
from .model import DTYPES
from .progress import Step
from .spec import TrainError, TrainSpec

WINDOW = 40
"""Losses that decide what is expected of the next one."""
ENOUGH = 15
"""Losses without which nothing is expected."""
MAX_DEVIATIONS = 5.0
"""In robust standard deviations (1.4826 x the median absolute deviation) of the logarithms of those losses."""
MIN_RISE, MIN_RISE_SHARE = 0.1, 0.2
"""A smaller rise, absolute or as a share of what is expected, is no spike, however quiet the losses before it."""
TINY_LOSS = 1e-6
"""Stands for 0 in logarithms."""
MAX_SKIPS_IN_A_ROW = 50
SHOWN_ROWS = 20
MAX_EVENT_ROWS = 200


@dataclass(frozen=True)
class Spike:
    """A loss that those before it do not explain."""

    loss: float
    expected: float
    """The median of the losses before it."""


def find_spike(before: Sequence[float], loss: float) -> Spike | None:
    """Whether `loss` is a spike after the finite losses `before` (oldest first; only the last WINDOW count). Pure.

    Median and median absolute deviation hold still where one outlier would move a mean. Logarithms, because losses of
    small batches scatter by a factor, more upwards than downwards. The steep fall of the first steps widens the
    deviation and lies below the median, so it raises no alarm.
    """
    recent = list(before)[-WINDOW:]
    if len(recent) < ENOUGH:
        return None
    expected = statistics.median(recent)
    logs = [math.log(max(x, TINY_LOSS)) for x in recent]
    center = statistics.median(logs)
    deviation = 1.4826 * statistics.median(abs(x - center) for x in logs)
    higher = math.log(max(loss, TINY_LOSS)) - center > MAX_DEVIATIONS * deviation
    rise = max(MIN_RISE, MIN_RISE_SHARE * expected)
    return Spike(loss, expected) if higher and loss > expected + rise else None


class LossWatch:
    """Remembers the last losses and counts skipped steps. The same on every rank, since losses are."""

    def __init__(self, spec: TrainSpec, ranks: Ranks, data: TokenData) -> None:
        self.spec, self.ranks, self.data = spec, ranks, data
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.skipped_in_a_row = 0

    def look(self, step: Step, number: int) -> dict[str, Any] | None:
        """Take in what the 1-based step `number` did. Returns the fields of a `loss_spike` event.

        Raises NotFiniteError after MAX_SKIPS_IN_A_ROW skipped steps, on every rank.
        """
        if step.skipped:
            # It changed no weight, so nothing is expected of its loss.
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= MAX_SKIPS_IN_A_ROW:
                raise self._too_many_skips(number - 1, step.loss_scale or 1.0)
            return None
        self.skipped_in_a_row = 0
        spike = find_spike(self.recent, step.loss)
        self.recent.append(step.loss)
        return None if spike is None else self._event(spike, number - 1)

    def _event(self, spike: Spike, step: int) -> dict[str, Any]:
        rows = [r for of_rank in rows_of_step(step, self.spec, self.data) for micro in of_rank for r in micro]
        sources = sources_of(rows, self.data)
        return {
            "loss": round(spike.loss, 4),
            "expected": round(spike.expected, 4),
            "rows": sources[:MAX_EVENT_ROWS],
            "rows_left_out": max(0, len(sources) - MAX_EVENT_ROWS),
        }

    def _too_many_skips(self, step: int, loss_scale: float) -> NotFiniteError:
        file = keep_batch("gradient", step, _all_places(self.spec), self.spec, self.ranks, self.data)
        return NotFiniteError(
            f"{self.skipped_in_a_row} steps in a row were skipped: the fp16 gradient is not finite even at loss scale "
            f"{loss_scale:g}",
            f"Use model.dtype: bf16 or fp32, or lower train.learning_rate. The last batch is kept in {file}, "
            "and so is the last checkpoint.",
        )


def what_is_not_finite(dtype: str, loss: float, grad_norm: float, skipped: bool) -> str:
    """ "loss", "gradient", or "" when the step may count. `skipped`: DeepSpeed found the gradient not finite."""
    if skipped and dtype == "fp16":
        return ""
    if not math.isfinite(loss):
        return "loss"
    return "" if math.isfinite(grad_norm) and not skipped else "gradient"


class NotFiniteError(TrainError):
    """A loss, gradient, weight or moment is not finite; raised on every rank at the same step."""


def not_finite(
    what: str, step: int, micro_losses: Sequence[torch.Tensor], spec: TrainSpec, ranks: Ranks, data: TokenData
) -> NotFiniteError:
    """The error for the 0-based `step`; its batch is kept in a file. Collective: every rank must call.

    `micro_losses`: this rank's loss of each micro batch. Where losses are not finite, the rows of those micro batches
    are the step's bad ones; where only the gradient is not, any row may be.
    """
    bad = torch.zeros(spec.parallel.dp, spec.optim.accumulate, device=ranks.device)
    bad[ranks.dp_rank] = (~torch.isfinite(torch.stack(list(micro_losses)))).float()
    dist.all_reduce(bad)
    places = [(int(rank), int(micro)) for rank, micro in bad.nonzero().tolist()]
    places = places or _all_places(spec)
    file = keep_batch(what, step, places, spec, ranks, data)
    rows = rows_of_step(step, spec, data)
    return NotFiniteError(
        f"the {what} of step {step + 1} is not finite; its rows are\n"
        f"{_listed(sources_of([r for rank, micro in places for r in rows[rank][micro]], data))}",
        f"Look at these rows, whose tokens are in {file}; lower train.learning_rate"
        f"{'' if spec.model.dtype == 'fp32' else '; or use model.dtype: fp32'}. "
        "Nothing of this step was saved: the last checkpoint is kept.",
    )


def require_finite_weights(engine: Any, step: int, spec: TrainSpec, ranks: Ranks) -> None:
    """Raises NotFiniteError, on every rank, when what a checkpoint of the 1-based `step` would hold is not finite.

    A finite gradient may still carry a weight beyond what the dtype holds, and the next loss comes after the checkpoint.
    Collective: every rank must call.
    """
    limit = torch.finfo(DTYPES[spec.model.dtype]).max
    bad = 0
    for fragment in local_fragments(engine):
        for name, tensor in fragment.tensors.items():
            if tensor.numel() > 0:
                low, high = (float(x) for x in tensor.aminmax())
                bad += not (-limit <= low and high <= limit if name == "master" else math.isfinite(low + high))
    count = torch.tensor(float(bad), device=ranks.device)
    dist.all_reduce(count)
    if count.item():
        raise NotFiniteError(
            f"after step {step} weights or moments are not finite in {spec.model.dtype}: it was not saved",
            "Lower train.learning_rate"
            f"{'' if spec.model.dtype == 'fp32' else ', or use model.dtype: fp32'}. The last checkpoint is kept.",
        )


def keep_batch(
    what: str, step: int, places: Sequence[tuple[int, int]], spec: TrainSpec, ranks: Ranks, data: TokenData
) -> Path:
    """Rank 0 writes rows, file:line and token ids of these (dp rank, micro batch) of the 0-based `step`. Returns the file."""
    folder = Path(spec.paths.bad_batches_dir)
    file = folder / f"step_{step + 1:06}.json"
    if ranks.rank != 0:
        return file
    rows = rows_of_step(step, spec, data)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    batches = [_batch_json(rank, micro, rows[rank][micro], data) for rank, micro in places]
    content = {"step": step + 1, "not_finite": what, "dtype": spec.model.dtype, "micro_batches": batches}
    # Not indented: that would take a line for every token.
    write_text(file, json.dumps(content, ensure_ascii=False) + "\n")
    return file


def _batch_json(dp_rank: int, micro: int, rows: list[int], data: TokenData) -> dict[str, Any]:
    batch = data.batch(rows, data.row_length(rows))
    return {
        "dp_rank": dp_rank,
        "micro_batch": micro,
        "rows": rows,
        "sources": sources_of(rows, data),
        "document_lengths": list(batch.document_lengths),
        "input_ids": batch.input_ids_1T[0].tolist(),
        "labels": batch.labels_1T[0].tolist(),
    }


def rows_of_step(step: int, spec: TrainSpec, data: TokenData) -> list[list[list[int]]]:
    """Row numbers of the 0-based `step`: of each dp rank, of each micro batch; -1 is no row."""
    dp = spec.parallel.dp
    # A debug run repeats its first batch: a loss that does not fall on it has a reason worth knowing.
    step = 0 if spec.debug else step
    return [step_rows(step, rank, data.num_rows, spec.optim, dp) for rank in range(dp)]


def sources_of(rows: Sequence[int], data: TokenData) -> list[str]:
    """file:line of every document in these rows, each once, sorted as text."""
    return sorted({source for row in rows for source in data.sources(row)})


def _all_places(spec: TrainSpec) -> list[tuple[int, int]]:
    return [(rank, micro) for rank in range(spec.parallel.dp) for micro in range(spec.optim.accumulate)]


def _listed(sources: Sequence[str]) -> str:
    shown = "\n".join(f"  {source}" for source in sources[:SHOWN_ROWS])
    return shown + (f"\n  and {len(sources) - SHOWN_ROWS} more" if len(sources) > SHOWN_ROWS else "")
