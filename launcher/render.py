"""Formats plans and runs for people. Decides nothing."""

from __future__ import annotations

import shlex
import time

from cluster.registry import load

from .attempts import attempt_lines
from .memory import MemoryEstimate
from .plan import Plan
from .progress import clock
from .run_dir import RunDir
from .status import Status


def plan_page(plan: Plan) -> str:
    """Everything that will happen, in the order in which a person asks: where, what, how much, exactly which commands."""
    spec = plan.spec
    lines = [f"plan {spec.digest()}  {spec.recipe_name}  ({spec.method.name}, {plan.backend})", ""]
    lines += _rows("run folder", [spec.paths.run_dir])
    lines += _rows("devices", _devices(plan))
    for reason in plan.reasons:
        lines += _rows(reason.name, [reason.text])
    lines += _rows("data", [f"{f.path} ({f.format})" for f in spec.data.files])
    lines += _rows("rows", [_data_line(plan)])
    if plan.memory is not None:
        lines += _rows("memory", _memory(plan.memory))
    lines += _rows("checkpoints", [_checkpoint_line(plan)])
    lines += _rows("failures", [_retry_line(plan)])
    lines += _rows("stages", [" -> ".join(job.name for job in plan.jobs)])
    lines += _rows("deepspeed", [_compact(spec.deepspeed)])
    lines += ["", "commands ({model_dir}: the folder that prepare finds or makes)"]
    backend = load(plan.backend)
    lines += [f"  {job.name:<11} {shlex.join(backend.command(job))}" for job in plan.jobs]
    train = next(job for job in plan.jobs if job.name == "train")
    lines += ["environment that is set"]
    lines += [f"  {key}={shlex.quote(value)}" for key, value in sorted(train.env.items())]
    lines += [f"warning: {text}" for text in plan.warnings]
    for refusal in plan.refusals:
        lines += [f"cannot be started: {refusal.where}: {refusal.message}"]
        lines += [f"    {line}" for line in refusal.hint.splitlines()]
    return "\n".join(lines)


def _rows(label: str, values: list[str]) -> list[str]:
    return [f"{label if i == 0 else '':<13} {value}" for i, value in enumerate(values)]


def _devices(plan: Plan) -> list[str]:
    parallel = plan.spec.parallel
    if not plan.devices:
        where = f"cpu of {len(plan.nodes)} hosts" if plan.nodes else "cpu"
        return [f"{where}: {parallel.world_size} process(es) x {parallel.threads_per_process} thread(s)"]
    return [
        f"{d['index']}: {d['name']}  {d['memory_free_gb']:.1f} of {d['memory_total_gb']:.1f} GB free  {d['uuid']}"
        for d in plan.devices
    ]


def _data_line(plan: Plan) -> str:
    data = plan.spec.data
    packing = "packed, documents kept apart" if data.packing else "one document a row, no padding computed"
    template = "the model's own chat template" if data.template == "model" else f"chat template {data.template}"
    return f"up to {data.max_length} tokens, {packing}; longer ones: {data.too_long}; {template}"


def _memory(memory: MemoryEstimate) -> list[str]:
    lines = [
        f"{memory.total_gb:.1f} GB per device (estimate)",
        *(f"  {term.name} {term.gb:.2f} GB = {term.arithmetic}" for term in memory.terms),
    ]
    if memory.host_terms:
        lines.append(f"{sum(term.gb for term in memory.host_terms):.1f} GB of CPU memory per process")
        lines += [f"  {term.name} {term.gb:.2f} GB = {term.arithmetic}" for term in memory.host_terms]
    return lines


def _checkpoint_line(plan: Plan) -> str:
    checkpoint = plan.spec.checkpoint
    when = f"every {checkpoint.every_steps} steps and at the end" if checkpoint.every_steps else "at the end"
    size = f", {plan.memory.checkpoint_gb:.2f} GB each" if plan.memory is not None else ""
    how = "written while training goes on" if checkpoint.asynchronous else "training waits"
    return f"{when}, the newest {checkpoint.keep} are kept{size}; {how}"


def _retry_line(plan: Plan) -> str:
    retry = plan.retry
    budgets = (
        (retry.crashes, "crashes"),
        (retry.node_losses, "lost nodes"),
        (retry.preemptions, "preemptions"),
        (retry.hangs, "hangs"),
    )
    given = ", ".join(f"{number} {what}" for number, what in budgets if number)
    hang = f"; a hang: {plan.hang_s} s without a sign of life" if plan.hang_s else "; hangs are not looked for"
    return (f"goes on by itself after {given} within {retry.per_steps} steps" if given else "stops at the first") + hang


def _compact(config: dict[str, object]) -> str:
    import json

    return json.dumps(config, separators=(", ", ": "))


def run_line(run: RunDir, status: Status) -> str:
    """One row of `launch runs`."""
    when = time.strftime("%m-%d %H:%M", time.localtime(status.started))
    return f"{run.run_id:<48} {status.shown_state:<10} {status.stage:<12} attempt {status.attempt}  {when}"


def run_page(run: RunDir, status: Status) -> str:
    """`launch runs show`: the state of each stage, the first cause of a failure, and where things are."""
    lines = [f"{run.run_id}  {status.shown_state}  attempt {status.attempt}", f"folder        {run.root}"]
    for stage, state in status.stages.items():
        seconds = status.seconds.get(stage)
        lines.append(f"{stage:<13} {state}" + (f"  {clock(seconds)}" if seconds is not None else ""))
    for label, path in (("adapter", run.adapter), ("merged", run.merged), ("report", run.report / "report.html")):
        if path.exists():
            lines.append(f"{label:<13} {path}")
    if status.unreachable_since is not None:
        since = time.strftime("%m-%d %H:%M:%S", time.localtime(status.unreachable_since))
        lines.append(f"unreachable   since {since}; it may well go on, and nothing is started beside it")
    if status.next_attempt_at is not None:
        lines.append(
            f"waiting       {max(status.next_attempt_at - time.time(), 0):.0f} s before attempt {status.attempt + 1}"
        )
    if status.attempts:
        lines += ["attempts", *attempt_lines(status.attempts, time.time())]
    return "\n".join(lines)
