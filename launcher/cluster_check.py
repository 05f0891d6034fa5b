"""`launch cluster check`: what a run over these hosts, or in this Ray cluster, would meet. In seconds and without a run."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.job import JobSpec, JobState, JobStatus, Meeting
from cluster.nodes import combined
from cluster.preflight import host_table
from cluster.registry import load
from trainer.spec import EXIT_BUG, EXIT_OK, EXIT_RETRY

from .errors import LaunchError, PlanError
from .progress import connection_line
from .run_dir import RunDir
from .stages import CONNECT_WAIT_S, connect_job
from .start import Request, cache_dir, find_place, plan_placed, runs_dir
from .supervise import failure_text
from .where import Flags, Where, meeting_of, on_several, questions_of, require_consistent

POLL_S = 0.05


@dataclass(frozen=True)
class Check:
    """The flags of `launch cluster check`, as typed."""

    recipe: str | None
    hosts: tuple[str, ...]
    gpus: str | None
    cpu: int | None
    sets: tuple[str, ...] = ()
    backend: str | None = None
    """None: ssh, where hosts are named."""
    nodes: int = 1


def check(flags: Check) -> int:
    """Print what each host has, then what the ranks measured between them. Returns an exit code.

    Raises PlanError with everything that does not fit.
    """
    backend = _backend(flags)
    where, run, meeting = _of_recipe(flags, backend) if flags.recipe is not None else _of_hosts(flags, backend)
    if len(where.nodes) < 2:
        print("one host: there is nothing to connect")
        return EXIT_OK
    return _connect(where, run, meeting)


def _backend(flags: Check) -> str:
    if not flags.hosts and flags.backend in (None, "ssh"):
        raise LaunchError(
            "which hosts?",
            "Name them: launch cluster check --hosts a:0,1 --hosts b:0,1\n"
            "Nodes of a running Ray cluster: launch cluster check --backend ray --nodes 2 --gpus free:1",
        )
    backend = flags.backend or "ssh"
    if backend not in ("ssh", "ray"):
        raise LaunchError(
            f"--backend {backend}: it runs on this host, and there is nothing to compare",
            "Choose ssh (--hosts a:0,1 --hosts b:0,1) or ray (a running cluster). Of this host: launch doctor",
        )
    require_consistent(_flags(flags, backend), backend)
    if backend == "ray":
        from .ray_place import require_cluster

        require_cluster(os.environ)
    return backend


def _flags(flags: Check, backend: str) -> Flags:
    return Flags(flags.gpus, flags.cpu, backend, flags.nodes, False, flags.hosts)


def _of_hosts(flags: Check, backend: str) -> tuple[Where, RunDir, Meeting]:
    run, meeting = RunDir((runs_dir() / "check").absolute()), Meeting()
    questions = questions_of(run.root, cache_dir(), "folder", ())
    where = on_several(_flags(flags, backend), backend, meeting, questions)
    print(host_table(where.reports), flush=True)
    return where, run, meeting


def _of_recipe(flags: Check, backend: str) -> tuple[Where, RunDir, Meeting]:
    recipe = str(flags.recipe)
    request = Request(recipe, flags.gpus, flags.cpu, backend, flags.nodes, None, flags.sets, False, hosts=flags.hosts)
    placed = find_place(request)
    plan = plan_placed(request, placed)
    if plan.refusals:
        raise PlanError(list(plan.refusals))
    print(host_table(placed.where.reports), flush=True)
    return placed.where, placed.run, meeting_of(placed.loaded.recipe)


def _connect(where: Where, run: RunDir, meeting: Meeting) -> int:
    """Run the stage that comes first in a run over several hosts, in a folder that is removed again."""
    run = RunDir(run.root.with_name(f".check-{secrets.token_hex(4)}"))
    run.create()
    try:
        job = connect_job(combined(where.nodes), where.nodes, run)
        job = dataclasses.replace(job, meeting=meeting, ray=where.ray)
        Path(job.log_dir).mkdir(parents=True)
        status = _run(job, where.backend)
        if status.state is JobState.SUCCEEDED:
            print(connection_line(run))
            return EXIT_OK
        if status.failure is not None:
            print(failure_text(dataclasses.asdict(status.failure)), file=sys.stderr)
        return EXIT_BUG if status.exit_code is None else status.exit_code
    finally:
        shutil.rmtree(run.root, ignore_errors=True)


def _run(job: JobSpec, name: str) -> JobStatus:
    """To its end. Raises LaunchError when it does not come to one: there is no supervisor here that looks for hangs."""
    # To get places and to start there, each limited by `wait_s`; then ranks meet, measure and end.
    limit_s = 2 * job.meeting.wait_s + 3 * CONNECT_WAIT_S
    deadline = time.monotonic() + limit_s
    backend = load(name)
    handle = backend.start(job)
    try:
        while not (status := backend.poll(handle)).state.is_terminal:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"the ranks have not come to an end within {limit_s:g} s, and none of them says why",
                    "Try again; cluster.wait_s of a recipe changes the limit.",
                    EXIT_RETRY,
                )
            time.sleep(POLL_S)
        return status
    finally:
        backend.kill(handle)
