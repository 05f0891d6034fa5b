"""What the training loop tells people and the report: the rank's log, events.jsonl, metrics.jsonl."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

from .engine import Ranks, full_shape
from .held_out import HeldOutLoss
from .metrics import append_line, event, peak_memory_gb
from .model import PackedLanguageModel
from .progress import Progress, Step
from .saver import Saved
from .spec import TrainSpec
from .throughput import Throughput

SHOWN_ROWS = 3


class Log:
    """Rank 0 writes; on the others everything but `started` does nothing."""

    def __init__(
        self, spec: TrainSpec, ranks: Ranks, attempt: int, total_steps: int, model: PackedLanguageModel
    ) -> None:
        self.spec, self.attempt, self.total_steps = spec, attempt, total_steps
        self.enabled = ranks.rank == 0
        self.throughput = Throughput(spec, ranks, model)
        self.measured = False

    def _event(self, name: str, **fields: Any) -> None:
        if self.enabled:
            event(self.spec.paths.events, name, attempt=self.attempt, **fields)

    def started(
        self, progress: Progress, folder: Path | None, skipped: list[tuple[Path, str]], model: PackedLanguageModel
    ) -> None:
        for path, reason in skipped:
            print(f"skipped checkpoint {path.name}: {reason}", flush=True)
            self._event("checkpoint_skipped", checkpoint=path.name, reason=reason)
        parameters = model.trainable().values()
        print(
            f"trainable: {sum(math.prod(full_shape(p)) for p in parameters):,} parameters in {len(parameters)} tensors"
        )
        if folder is not None:
            print(f"resumed from {folder.name} (verified), step {progress.step} of {self.total_steps}", flush=True)
            self._event("resumed", checkpoint=folder.name, step=progress.step)
        self._event("train_started", step=progress.step, total_steps=self.total_steps)

    def stepped(self, step: Step, progress: Progress, learning_rate: float, profiled: bool) -> None:
        """Write the step's row. After the first one, measure what the machine could do; see `Throughput`."""
        if not self.enabled:
            return
        row = self._row(step, progress, learning_rate, profiled)
        append_line(self.spec.paths.metrics, row)
        print(step_line(row), flush=True)
        if not self.measured:
            # Between two steps, where it is part of neither's time.
            self.throughput.measure()
            self.measured = True

    def _row(self, step: Step, progress: Progress, learning_rate: float, profiled: bool) -> dict[str, Any]:
        share = self.throughput.share_of_peak(step.tokens, step.seconds)
        memory_gb = peak_memory_gb(self.spec.parallel.device)
        row: dict[str, Any] = {
            "step": progress.step,
            "total_steps": self.total_steps,
            "attempt": self.attempt,
            "time": round(time.time(), 3),
            "loss": finite(step.loss),
            "grad_norm": finite(step.grad_norm),
            "learning_rate": learning_rate,
            "skipped": step.skipped,
            "skipped_steps": progress.skipped_steps,
            "tokens": step.tokens,
            "supervised_tokens": step.supervised_tokens,
            "tokens_total": progress.tokens,
            "seconds": round(step.seconds, 6),
            "seconds_parts": {
                name: None if value is None else round(value, 6) for name, value in step.seconds_parts.items()
            },
            "tokens_per_second": round(step.tokens / step.seconds, 1),
            "supervised_tokens_per_second": round(step.supervised_tokens / step.seconds, 1),
            "share_of_peak": None if share is None else round(share, 4),
            "memory_gb": round(memory_gb, 3),
            # This rank's peak may have grown since the ranks told theirs.
            "memory_gb_max": round(max(step.memory_gb, memory_gb), 3),
        }
        if step.loss_scale is not None:
            row["loss_scale"] = step.loss_scale
        if profiled:
            row["profiled"] = True
        return row

    def spiked(self, step: int, fields: dict[str, Any] | None) -> None:
        """The 1-based `step`'s spike, if it is one; `fields` are what `LossWatch.look` gives."""
        if self.enabled and fields is not None:
            self._event("loss_spike", step=step, **fields)
            rows = fields["rows"]
            more = len(rows) + fields["rows_left_out"] - SHOWN_ROWS
            print(
                f"loss spike at step {step}: {fields['loss']:.4f}, expected about {fields['expected']:.4f}; rows "
                f"{', '.join(rows[:SHOWN_ROWS])}{f' and {more} more (events.jsonl)' if more > 0 else ''}",
                flush=True,
            )

    def held_out(self, step: int, found: HeldOutLoss) -> None:
        """The loss of the held-out rows after the 1-based `step` (0: before the first)."""
        if not self.enabled:
            return
        self._event("held_out_loss", step=step, **{**dataclasses.asdict(found), "loss": finite(found.loss)})
        loss = f"{found.loss:.4f}" if math.isfinite(found.loss) else "not finite"
        print(
            f"held-out loss {loss} at step {step} ({found.supervised_tokens:,} supervised tokens, "
            f"{found.seconds:.1f} s)",
            flush=True,
        )

    def saved(self, ended: list[Saved]) -> None:
        """Saves that have ended since the last call, well or not."""
        for save in ended:
            if save.problem is not None:
                if self.enabled:
                    print(f"WARNING: {save.problem}\nTraining goes on (checkpoint.on_error: continue).", flush=True)
                self._event("checkpoint_failed", checkpoint=save.name, problem=save.problem.message)
                continue
            if save.remark:
                print(f"WARNING: {save.remark}", flush=True)
            if self.enabled:
                print(
                    f"saved {save.name} in {save.seconds:.2f} s, training stood still for {save.stalled_s:.2f} s",
                    flush=True,
                )
            self._event(
                "checkpoint_saved",
                checkpoint=save.name,
                seconds=round(save.seconds, 3),
                stalled_s=round(save.stalled_s, 3),
            )

    def stopped(self, progress: Progress) -> None:
        self._event("train_stopped", step=progress.step, skipped_steps=progress.skipped_steps)

    def finished(self, progress: Progress) -> None:
        self._event("train_finished", step=progress.step, tokens=progress.tokens, skipped_steps=progress.skipped_steps)


def finite(value: float) -> float | None:
    """JSON knows no NaN or infinity: they become null."""
    return value if math.isfinite(value) else None


def step_line(row: dict[str, Any]) -> str:
    """A row of metrics.jsonl as one line of the log."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    norm = "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
    share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%} of peak "
    scale = f" scale {row['loss_scale']:g}" if "loss_scale" in row else ""
    skipped = " SKIPPED (fp16 overflow)" if row["skipped"] else ""
    return (
        f"step {row['step']}/{row['total_steps']} loss {loss} grad_norm {norm} lr {row['learning_rate']:.2e} "
        f"{row['tokens_per_second']:.0f} tokens/s {share}{row['memory_gb']:.2f} GB{scale}{skipped}"
    )
