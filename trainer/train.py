"""The training loop. It reads like the algorithm: for each step fetch, forward, backward, clip, step, log, maybe save.

The loss of a step is the sum over all supervised tokens of all micro batches and ranks, divided by their number; it
does not depend on how the rows are spread over micro batches or devices.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import checkpoint
from .data import Batch, TokenData, num_steps, rows_per_step, step_rows
from .debug_view import check_losses, first_batch_page
from .engine import Ranks, build_engine, init_ranks, set_learning_rate
from .metrics import append_line, event, peak_memory_gb
from .model import PackedLanguageModel, load_model
from .sampling import Sampler
from .spec import EXIT_INTERRUPTED, OptimSpec, Prepared, TrainError, TrainSpec, read_plan
from .template import ChatTemplate, load_template


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker train`."""
    parser.add_argument("--plan", required=True, help="plan.json of the run")
    parser.add_argument("--attempt", type=int, default=1, help="number of this start of the workers, from 1")


def run(args: argparse.Namespace) -> None:
    """Train to the end, or to a stop request (SystemExit 130 after a checkpoint). Collective: every rank must call."""
    spec = read_plan(args.plan)
    print(f"plan {spec.digest()} run {spec.run_id}", flush=True)
    prepared = Prepared.read(spec.paths.prepared)
    ranks = init_ranks(spec)
    stopped = train(spec, prepared, ranks, args.attempt)
    dist.destroy_process_group()
    if stopped:
        raise SystemExit(EXIT_INTERRUPTED)


def train(spec: TrainSpec, prepared: Prepared, ranks: Ranks, attempt: int) -> bool:
    """The run from its newest verified checkpoint on. Returns True when it was asked to stop early."""
    data = TokenData.open(prepared.data_dir)
    total_steps = num_steps(data.num_rows, spec.optim, spec.parallel.dp)
    model = load_model(spec.model, prepared.model_dir, spec.method, spec.optim, ranks.device)
    folder, skipped = checkpoint.find(spec, ranks)
    if folder is not None:
        checkpoint.load_weights(model, folder)
    engine = build_engine(model, spec)
    progress = Progress()
    if folder is not None:
        checkpoint.load_optimizer(engine, folder, ranks)
        progress = Progress.of(checkpoint.read_manifest(folder).state, spec)
    log = Log(spec, ranks, attempt, total_steps)
    log.started(progress, folder, skipped, model)
    sampler = Sampler(spec, prepared, ranks)
    sampler.answer(engine.module, progress.step)
    if spec.debug:
        print(first_batch_page(_template(spec, prepared), first_batch(spec, data, ranks)), flush=True)
    losses: list[float] = []
    while progress.step < total_steps:
        set_learning_rate(engine, learning_rate(progress.step, total_steps, spec.optim))
        # A debug run repeats its first batch: a loss that does not fall on it has a reason worth knowing.
        step = train_step(engine, spec, data, ranks, 0 if spec.debug else progress.step)
        losses.append(step.loss)
        progress.advance(step, spec)
        log.stepped(step, progress, engine)
        done, stopping = progress.step == total_steps, step.stop_requested
        if spec.evaluate.samples_every_steps and progress.step % spec.evaluate.samples_every_steps == 0:
            sampler.answer(engine.module, progress.step)
        every = spec.checkpoint.every_steps
        if done or stopping or (every and progress.step % every == 0):
            log.saved(checkpoint.save(engine, spec, ranks, progress.state()))
        if stopping and not done:
            log.stopped(progress)
            return True
    if spec.debug:
        print(check_losses(losses), flush=True)
    log.finished(progress)
    return False


def first_batch(spec: TrainSpec, data: TokenData, ranks: Ranks) -> Batch:
    """The first micro batch of this rank."""
    rows = step_rows(0, ranks.dp_rank, data.num_rows, spec.optim, spec.parallel.dp)[0]
    return data.batch(rows, data.row_length(rows))


@dataclass
class Step:
    """What one optimizer step did; numbers are over all ranks."""

    loss: float
    tokens: int
    supervised_tokens: int
    grad_norm: float
    skipped: bool
    stop_requested: bool
    seconds: dict[str, float] = field(default_factory=dict)


def train_step(engine: Any, spec: TrainSpec, data: TokenData, ranks: Ranks, step: int) -> Step:
    """One optimizer step. Collective: every rank must call."""
    clock = Clock()
    dp = spec.parallel.dp
    # Every rank knows the rows of all ranks, so the number of supervised tokens needs no communication.
    rows_of_dp = [step_rows(step, rank, data.num_rows, spec.optim, dp) for rank in range(dp)]
    rows = [r for rank_rows in rows_of_dp for micro in rank_rows for r in micro if r >= 0]
    supervised, tokens = int(data.supervised_per_row[rows].sum()), int(data.tokens_per_row[rows].sum())
    loss_sum = torch.zeros((), dtype=torch.float32, device=ranks.device)
    for micro_rows in rows_of_dp[ranks.dp_rank]:
        batch = _to_device(data.batch(micro_rows, data.row_length(micro_rows)), ranks.device)
        clock.lap("data")
        micro_loss = engine(batch.input_ids_1T, batch.labels_1T, batch.position_ids_1T, batch.document_lengths)
        clock.lap("forward")
        # The engine averages gradients over dp, hence the factor; accumulation is a plain sum.
        engine.backward(micro_loss * (dp / max(supervised, 1)), scale_wrt_gas=False)
        clock.lap("backward")
        engine.step()
        clock.lap("optimizer")
        loss_sum += micro_loss.detach()
    stop = ranks.rank == 0 and os.path.exists(spec.paths.stop_request)
    totals = torch.stack((loss_sum, torch.tensor(float(stop), device=ranks.device)))
    dist.all_reduce(totals)
    clock.lap("communication")
    loss = totals[0].item() / max(supervised, 1)
    skipped = bool(getattr(engine.optimizer, "overflow", False))
    norm = engine.get_global_grad_norm() or 0.0
    # Under fp16 an overflow is part of finding the loss scale: the step was skipped, and is counted.
    if spec.model.dtype != "fp16" and (skipped or not math.isfinite(loss)):
        what = "gradient" if math.isfinite(loss) else "loss"
        raise _not_finite(what, step, rows, data)
    return Step(loss, tokens, supervised, float(norm), skipped, totals[1].item() > 0, clock.seconds)


def learning_rate(step: int, total_steps: int, optim: OptimSpec) -> float:
    """Rate of the 0-based `step`: linear warm-up, then constant, linear to 0, or half a cosine to 0."""
    warmup = math.ceil(optim.warmup_ratio * total_steps)
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(total_steps - warmup, 1)
    if optim.schedule == "constant":
        return optim.learning_rate
    if optim.schedule == "linear":
        return optim.learning_rate * (1 - share)
    return optim.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class Progress:
    """All that a resumed run must know beside weights and optimizer; it is the manifest's `state`."""

    step: int = 0
    rows_consumed: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def state(self) -> dict[str, int]:
        return dict(vars(self))

    def advance(self, step: Step, spec: TrainSpec) -> None:
        self.step += 1
        self.rows_consumed += rows_per_step(spec.optim, spec.parallel.dp)
        self.tokens += step.tokens
        self.supervised_tokens += step.supervised_tokens

    @classmethod
    def of(cls, state: dict[str, int], spec: TrainSpec) -> Progress:
        """Raises TrainError when another global batch would repeat or skip rows."""
        progress = cls(**{key: state[key] for key in vars(cls())})
        batch = rows_per_step(spec.optim, spec.parallel.dp)
        if progress.rows_consumed != progress.step * batch:
            raise TrainError(
                f"the checkpoint has seen {progress.rows_consumed} rows in {progress.step} steps, "
                f"which is not a global batch of {batch}",
                f"Resume on devices that keep a global batch of {progress.rows_consumed // max(progress.step, 1)} rows: "
                "as many as before, or a divisor of it together with train.global_batch in the recipe.",
            )
        return progress


class Clock:
    """Adds the seconds since the last lap to a named total."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


class Log:
    """What rank 0 writes for people and for the report: the rank's log, events.jsonl, metrics.jsonl."""

    def __init__(self, spec: TrainSpec, ranks: Ranks, attempt: int, total_steps: int) -> None:
        self.spec, self.attempt, self.total_steps = spec, attempt, total_steps
        self.enabled = ranks.rank == 0

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
        print(f"trainable: {sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors")
        if folder is not None:
            print(f"resumed from {folder.name} (verified), step {progress.step} of {self.total_steps}", flush=True)
            self._event("resumed", checkpoint=folder.name, step=progress.step)
        self._event("train_started", step=progress.step, total_steps=self.total_steps)

    def stepped(self, step: Step, progress: Progress, engine: Any) -> None:
        if not self.enabled:
            return
        seconds = sum(step.seconds.values())
        row = {
            "step": progress.step,
            "total_steps": self.total_steps,
            "attempt": self.attempt,
            "time": round(time.time(), 3),
            "loss": step.loss,
            "grad_norm": step.grad_norm,
            "learning_rate": engine.optimizer.param_groups[0]["lr"],
            "skipped": step.skipped,
            "tokens": step.tokens,
            "supervised_tokens": step.supervised_tokens,
            "tokens_total": progress.tokens,
            "seconds": round(seconds, 4),
            "seconds_parts": {name: round(value, 4) for name, value in step.seconds.items()},
            "tokens_per_second": round(step.tokens / seconds, 1),
            "memory_gb": round(peak_memory_gb(self.spec.parallel.device), 3),
        }
        append_line(self.spec.paths.metrics, row)
        print(
            f"step {progress.step}/{self.total_steps} loss {step.loss:.4f} grad_norm {step.grad_norm:.3f} "
            f"lr {row['learning_rate']:.2e} {row['tokens_per_second']:.0f} tokens/s {row['memory_gb']:.2f} GB",
            flush=True,
        )

    def saved(self, folder: Path) -> None:
        if self.enabled:
            print(f"saved {folder.name}", flush=True)
        self._event("checkpoint_saved", checkpoint=folder.name)

    def stopped(self, progress: Progress) -> None:
        self._event("train_stopped", step=progress.step)

    def finished(self, progress: Progress) -> None:
        self._event("train_finished", step=progress.step, tokens=progress.tokens)


def _template(spec: TrainSpec, prepared: Prepared) -> ChatTemplate:
    return load_template(prepared.model_dir, spec.data.template, spec.model.trust_remote_code)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return Batch(
        batch.input_ids_1T.to(device, non_blocking=True),
        batch.labels_1T.to(device, non_blocking=True),
        batch.position_ids_1T.to(device, non_blocking=True),
        batch.document_lengths,
    )


def _not_finite(what: str, step: int, rows: list[int], data: TokenData) -> TrainError:
    sources = sorted({source for row in rows for source in data.sources(row)})
    shown = "\n".join(f"  {source}" for source in sources[:20])
    more = f"\n  and {len(sources) - 20} more" if len(sources) > 20 else ""
    return TrainError(
        f"the {what} of step {step + 1} is not finite; this step's rows are\n{shown}{more}",
        "Look at these rows; lower train.learning_rate; or use model.dtype: fp32. The last checkpoint is kept.",
    )
