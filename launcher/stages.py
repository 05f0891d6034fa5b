"""The stages of a run as jobs. Each reads only what an earlier one wrote, so each can be run again alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cluster.environment import compute_env, device_env
from cluster.inventory import Selection
from cluster.job import JobReport, JobSpec, Meeting, RayRequest
from cluster.nodes import Node, combined
from trainer.checkpoint_format import MANIFEST
from trainer.spec import TrainSpec

from .errors import LaunchError
from .run_dir import RunDir, read_json

ENTRYPOINT = "trainer.worker"
PACKAGE_ROOT = Path(__file__).resolve().parent.parent
"""Folder of our packages; workers refuse to run others of the same names."""
STAGES = ("connect", "prepare", "train", "consolidate", "merge", "evaluate")
CONNECT_WAIT_S = 60
"""A rank that cannot be reached is known after this long, whatever training itself may wait for."""
# Filled in from prepared.json when the job starts: only `prepare` knows where a downloaded model lies.
MODEL_DIR = "{model_dir}"


def stage_names(spec: TrainSpec, num_nodes: int) -> tuple[str, ...]:
    """Stages of this run: a full fine-tune has no adapter to merge, one host nothing to connect."""
    left_out = {"merge": spec.method.name == "full", "connect": num_nodes < 2}
    return tuple(stage for stage in STAGES if not left_out.get(stage))


def jobs_of(
    spec: TrainSpec,
    selection: Selection,
    run: RunDir,
    attempt: int,
    nodes: tuple[Node, ...] = (),
    meeting: Meeting | None = None,
    ray: RayRequest | None = None,
) -> tuple[JobSpec, ...]:
    """One job a stage, in order. Only `connect` and `train` use more than one process, and more than the first of `nodes`."""
    jobs = (_job(name, spec, selection, run, attempt, nodes) for name in stage_names(spec, len(nodes)))
    return tuple(dataclasses.replace(job, meeting=meeting or Meeting(), ray=ray) for job in jobs)


def _job(
    name: str, spec: TrainSpec, selection: Selection, run: RunDir, attempt: int, nodes: tuple[Node, ...]
) -> JobSpec:
    if name == "connect":
        return connect_job(selection, nodes, run, attempt)
    log_dir = run.logs(attempt, name)
    on_all = name == "train"
    if nodes and not on_all:
        nodes = (dataclasses.replace(nodes[0], selection=_first_device(nodes[0].selection)),)
    used = combined(nodes) if nodes else selection if on_all else _first_device(selection)
    log_args = () if spec.debug else ("--log-dir", str(log_dir))
    return JobSpec(
        name=name,
        entrypoint=ENTRYPOINT,
        args=(name, *log_args, "--package-root", spec.package_root, *_arguments(name, spec, run, attempt)),
        num_processes=used.num_processes,
        devices=used.uuids,
        env=compute_env(used) if nodes else device_env(used),  # what a host sees is that host's own
        log_dir=str(log_dir),
        cwd=str(run.root),
        run_id=spec.run_id,
        nodes=tuple(node.share for node in nodes),
        report=_report(run) if name == "train" else None,
    )


def connect_job(selection: Selection, nodes: tuple[Node, ...], run: RunDir, attempt: int = 1) -> JobSpec:
    """The `connect` stage, which needs no plan: it knows nothing of a model."""
    log_dir = run.logs(attempt, "connect")
    options = ("--device", selection.kind, "--wait-s", str(CONNECT_WAIT_S), "--out", str(run.connection))
    return JobSpec(
        name="connect",
        entrypoint=ENTRYPOINT,
        args=("connect", "--log-dir", str(log_dir), "--package-root", str(PACKAGE_ROOT), *options),
        num_processes=selection.num_processes,
        devices=selection.uuids,
        env=compute_env(selection),
        log_dir=str(log_dir),
        cwd=str(run.root),
        run_id=run.run_id,
        nodes=tuple(node.share for node in nodes),
    )


def _report(run: RunDir) -> JobReport:
    return JobReport(str(run.root), str(run.metrics), str(run.checkpoints), MANIFEST)


def _first_device(selection: Selection) -> Selection:
    """One process with the first device, and all the threads that training spreads over its processes."""
    threads = selection.threads_per_process * (selection.num_processes if selection.kind == "cpu" else 1)
    return dataclasses.replace(selection, devices=selection.devices[:1], num_processes=1, threads_per_process=threads)


def _arguments(name: str, spec: TrainSpec, run: RunDir, attempt: int) -> tuple[str, ...]:
    if name == "train":
        return ("--plan", str(run.plan), "--attempt", str(attempt))
    template = ("--template", spec.data.template)
    trust = ("--trust-remote-code",) if spec.model.trust_remote_code else ()
    if name == "consolidate":
        out = run.merged if spec.method.name == "full" else run.adapter
        return ("--source", str(run.checkpoints), "--base", MODEL_DIR, "--out", str(out), *template)
    if name == "merge":
        nf4 = qlora_flags(spec.method.name, spec.model.dtype, spec.method.double_quant)
        return ("--base", MODEL_DIR, "--adapter", str(run.adapter), "--out", str(run.merged), *template, *nf4, *trust)
    return ("--plan", str(run.plan))


def qlora_flags(method: str, dtype: str, double_quant: bool) -> tuple[str, ...]:
    """Tell `merge` on which weights a QLoRA adapter was trained; nothing for another method."""
    if method != "qlora":
        return ()
    return ("--trained-on-nf4", "--nf4-dtype", dtype, *(() if double_quant else ("--nf4-single-quant",)))


def renumbered(job: JobSpec, run: RunDir, attempt: int) -> JobSpec:
    """The same job as part of another attempt: its own log folder, so that no log is overwritten."""
    old, new = job.log_dir, str(run.logs(attempt, job.name))
    args = tuple(new if a == old else a for a in job.args)
    if "--attempt" in args:
        at = args.index("--attempt") + 1
        args = (*args[:at], str(attempt), *args[at + 1 :])
    return dataclasses.replace(job, log_dir=new, args=args)


def set_output_aside(job: JobSpec, attempt: int) -> None:
    """Rename what an earlier, unfinished or hand-made job left where this one writes: results are never overwritten."""
    if "--out" not in job.args:
        return
    out = Path(job.args[job.args.index("--out") + 1])
    if out.exists():
        out.rename(out.with_name(f"{out.name}.before_attempt_{attempt}"))


def with_model_dir(job: JobSpec, run: RunDir) -> JobSpec:
    """Put the prepared model folder into the job's arguments. Raises LaunchError when `prepare` has not finished."""
    if MODEL_DIR not in job.args:
        return job
    if not run.prepared.is_file():
        raise LaunchError(
            f"{run.prepared} is missing: the prepare stage has not finished", "Run it: launch runs resume"
        )
    model_dir = read_json(run.prepared)["model_dir"]
    return dataclasses.replace(job, args=tuple(model_dir if a == MODEL_DIR else a for a in job.args))
