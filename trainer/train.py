"""The training loop. It reads like the algorithm: for each step fetch, forward, backward, clip, step, log, maybe save.

The loss of a step is the sum over all supervised tokens of all micro batches and ranks, divided by their number; it
does not depend on how the rows are spread over micro batches or devices.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import checkpoint
from .clock import Clock
from .data import Batch, TokenData, num_steps, step_rows
from .debug_view import check_losses, first_batch_page
from .engine import Ranks, build_engine, clip_whole_gradient, init_ranks, loss_scaler_state, set_learning_rate
from .heartbeat import HEARTBEAT
from .held_out import HeldOut
from .loss_watch import LossWatch, NotFiniteError, not_finite, require_finite_weights, rows_of_step, what_is_not_finite
from .metrics import peak_memory_gb
from .model import PackedLanguageModel, load_model
from .profiler import StepProfiler
from .progress import Progress, Step
from .sampling import Sampler
from .saver import Saved, Saver
from .sequence_parallel import rank_batch
from .spec import EXIT_INTERRUPTED, OptimSpec, Prepared, TrainError, TrainSpec, read_plan
from .storage_copy import Copier
from .template import ChatTemplate, load_template
from .train_log import Log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker train`."""
    parser.add_argument("--plan", required=True, help="plan.json of the run")
    parser.add_argument("--attempt", type=int, default=1, help="number of this start of the workers, from 1")


def run(args: argparse.Namespace) -> None:
    """Train to the end, or to a stop request (SystemExit 130 after a checkpoint). Collective: every rank must call."""
    spec = read_plan(args.plan)
    print(f"plan {spec.digest()} run {spec.run_id}", flush=True)
    if spec.method.name != "qlora":
        hide_bitsandbytes()
    prepared = Prepared.read(spec.paths.prepared)
    HEARTBEAT.beat("join the other ranks")
    ranks = init_ranks(spec)
    copier = Copier(spec, ranks)
    stopped = train(spec, prepared, ranks, args.attempt, copier)
    dist.destroy_process_group()
    copier.finish()
    if stopped:
        raise SystemExit(EXIT_INTERRUPTED)


def hide_bitsandbytes() -> None:
    """Let peft and transformers find no bitsandbytes in this process: importing it brings torch's compiler, 2 s on two cores."""
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # None is how Python marks what cannot be imported


def train(spec: TrainSpec, prepared: Prepared, ranks: Ranks, attempt: int, copier: Copier) -> bool:
    """The run from its newest verified checkpoint on. Returns True when it was asked to stop early."""
    data = TokenData.open(prepared.data_dir)
    total_steps = num_steps(data.num_rows, spec.optim, spec.parallel.dp)
    HEARTBEAT.beat("load the model")
    model = load_model(spec, prepared.model_dir, ranks.device)
    engine, progress, folder, skipped = _from_checkpoint(model, spec, ranks)
    log = Log(spec, ranks, attempt, total_steps, model)
    log.started(progress, folder, skipped, model)
    sampler = Sampler(spec, prepared, ranks)
    sampler.answer(engine.module, progress.step)
    held_out = HeldOut(spec, ranks, data, total_steps)
    if held_out.is_due(progress.step):
        log.held_out(progress.step, held_out.loss(engine))
    if spec.debug:
        print(first_batch_page(_template(spec, prepared), first_batch(spec, data, ranks)), flush=True)
    watch, profiler = LossWatch(spec, ranks, data), StepProfiler(spec, ranks, progress.step + 1, total_steps)
    saver = Saver(engine, spec, ranks, lambda: copier.copying)
    copier.offer(folder)
    losses: list[float] = []

    def saved(ended: list[Saved]) -> None:
        log.saved(ended)
        copier.saved(ended)

    with _finishing(saver, saved):
        while progress.step < total_steps:
            rate = learning_rate(progress.step, total_steps, spec.optim)
            set_learning_rate(engine, rate)
            with profiler.step(progress.step + 1):
                step = train_step(engine, spec, data, ranks, progress.step)
            losses.append(step.loss)
            progress.advance(step, spec)
            done, stopping = progress.step == total_steps, step.stop_requested
            saved(saver.poll())
            log.stepped(step, progress, rate, profiled=profiler.records(progress.step))
            profiler.stepped(progress.step, step, last=done or stopping)
            log.spiked(progress.step, watch.look(step, progress.step))
            if spec.evaluate.samples_every_steps and progress.step % spec.evaluate.samples_every_steps == 0:
                sampler.answer(engine.module, progress.step)
            every = spec.checkpoint.every_steps
            if done or stopping or (every and progress.step % every == 0):
                HEARTBEAT.beat("save", progress.step, may_last=True)
                require_finite_weights(engine, progress.step, spec, ranks)
                saved(saver.save(progress.state(), last=done or stopping))
            if held_out.is_due(progress.step) and not (stopping and not done):
                log.held_out(progress.step, held_out.loss(engine))
            if stopping and not done:
                log.stopped(progress)
                return True
    if spec.debug:
        print(check_losses(losses), flush=True)
    log.finished(progress)
    return False


def _from_checkpoint(
    model: PackedLanguageModel, spec: TrainSpec, ranks: Ranks
) -> tuple[Any, Progress, Path | None, list[tuple[Path, str]]]:
    """(engine, how far it is, the newest verified checkpoint if there is one, newer ones that were skipped and why)."""
    HEARTBEAT.beat("find the checkpoint")
    folder, skipped = checkpoint.find(spec, ranks)
    if folder is not None:
        checkpoint.load_weights(model, folder)
    HEARTBEAT.beat("build the engine")
    engine = build_engine(model, spec)
    if folder is None:
        return engine, Progress(), None, skipped
    checkpoint.load_optimizer(engine, folder, ranks)
    return engine, Progress.of(checkpoint.read_manifest(folder).state, spec), folder, skipped


@contextlib.contextmanager
def _finishing(saver: Saver, saved: Callable[[list[Saved]], None]) -> Iterator[None]:
    """What all ranks run into together costs no checkpoint that is still being written."""
    try:
        yield
    except NotFiniteError:
        try:
            saved(saver.finish())
        except TrainError as unsaved:
            print(f"WARNING: {unsaved}", flush=True)
        raise


def first_batch(spec: TrainSpec, data: TokenData, ranks: Ranks) -> Batch:
    """The first micro batch of this rank."""
    rows = step_rows(0, ranks.dp_rank, data.num_rows, spec.optim, spec.parallel.dp)[0]
    return data.batch(rows, data.row_length(rows))


def train_step(
    engine: Any,
    spec: TrainSpec,
    data: TokenData,
    ranks: Ranks,
    step: int,
    before_update: Callable[[], None] | None = None,
) -> Step:
    """One optimizer step. Collective: every rank must call.

    `before_update` is called on every rank when the step's gradients are complete and not yet used.
    """
    sp = spec.parallel.sp
    # Every rank knows the rows of all ranks, so the number of supervised tokens needs no communication.
    rows_of_dp = rows_of_step(step, spec, data)
    rows = [r for rank_rows in rows_of_dp for micro in rank_rows for r in micro if r >= 0]
    supervised, tokens = int(data.supervised_per_row[rows].sum()), int(data.tokens_per_row[rows].sum())
    micro_losses: list[torch.Tensor] = []
    with Clock(ranks.device) as clock:
        for micro, micro_rows in enumerate(rows_of_dp[ranks.dp_rank]):
            HEARTBEAT.beat("data", step + 1, micro)
            batch = rank_batch(data, micro_rows, ranks.sp_rank, sp, ranks.device)
            clock.lap("data")
            HEARTBEAT.beat("forward", step + 1, micro)
            micro_loss = engine(batch.input_ids_1T, batch.labels_1T, batch.position_ids_1T, batch.document_lengths)
            clock.lap("forward")
            HEARTBEAT.beat("backward", step + 1, micro)
            # The engine averages gradients over all ranks, hence the factor; accumulation is a plain sum.
            engine.backward(micro_loss * (ranks.world_size / max(supervised, 1)), scale_wrt_gas=False)
            clock.lap("backward")
            HEARTBEAT.beat("optimizer", step + 1, micro)
            if before_update is not None and engine.is_gradient_accumulation_boundary():
                before_update()
            whole_norm = clip_whole_gradient(engine, spec.optim.max_grad_norm)
            engine.step()
            clock.lap("optimizer")
            micro_losses.append(micro_loss.detach())
        HEARTBEAT.beat("sum over all ranks", step + 1)
        loss_sum, stop, memory_gb = _totals(micro_losses, spec, ranks)
        clock.lap("optimizer")
    HEARTBEAT.step_done(step + 1)
    loss = loss_sum / max(supervised, 1)
    skipped = bool(getattr(engine.optimizer, "overflow", False))
    norm = float(engine.get_global_grad_norm() or 0.0) if whole_norm is None else whole_norm
    if what := what_is_not_finite(spec.model.dtype, loss, norm, skipped):
        raise not_finite(what, step, micro_losses, spec, ranks, data)
    scale = loss_scaler_state(engine).get("cur_scale")
    return Step(loss, tokens, supervised, norm, skipped, scale, stop, memory_gb, clock.seconds, clock.parts)


def _totals(micro_losses: list[torch.Tensor], spec: TrainSpec, ranks: Ranks) -> tuple[float, bool, float]:
    """(loss sum, whether rank 0 was asked to stop, highest peak memory in GB) over all ranks, in one small all-reduce."""
    stop = ranks.rank == 0 and os.path.exists(spec.paths.stop_request)
    # A sum over slots of which each rank fills its own: a maximum in the same call.
    memory_gb = [
        peak_memory_gb(spec.parallel.device) if rank == ranks.rank else 0.0 for rank in range(ranks.world_size)
    ]
    totals = torch.tensor([0.0, float(stop), *memory_gb], device=ranks.device)
    totals[0] = torch.stack(micro_losses).sum()
    dist.all_reduce(totals)
    loss_sum, stops, *peaks = totals.tolist()
    return loss_sum, stops > 0, max(peaks)


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


def _template(spec: TrainSpec, prepared: Prepared) -> ChatTemplate:
    return load_template(prepared.model_dir, spec.data.template, spec.model.trust_remote_code)
