"""`launch cluster check`: what a run over these hosts would meet, in seconds and without a run."""

from __future__ import annotations

import dataclasses
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.job import JobSpec, JobState, JobStatus, Meeting
from cluster.nodes import Node, combined
from cluster.preflight import host_table
from cluster.registry import load
from trainer.spec import EXIT_BUG, EXIT_OK

from .errors import LaunchError, PlanError
from .hosts import gather, parse_hosts, questions_for, shared_folders
from .progress import connection_line
from .run_dir import RunDir
from .stages import connect_job
from .start import cache_dir, runs_dir
from .supervise import failure_text
from .where import COMPARED_PACKAGES, require_one_kind

POLL_S = 0.05


@dataclass(frozen=True)
class Check:
    """The flags of `launch cluster check`, as typed."""

    recipe: str | None
    hosts: tuple[str, ...]
    gpus: str | None
    cpu: int | None
    sets: tuple[str, ...] = ()


def check(flags: Check) -> int:
    """Print what each host has, then what the ranks measured between them. Returns an exit code.

    Raises PlanError with everything that does not fit.
    """
    if not flags.hosts:
        raise LaunchError("which hosts?", "Name them: launch cluster check --hosts a:0,1 --hosts b:0,1")
    require_one_kind(flags.gpus, flags.cpu)
    nodes, run, meeting = _of_recipe(flags) if flags.recipe is not None else _of_hosts(flags)
    if len(nodes) < 2:
        print("one host: there is nothing to connect")
        return EXIT_OK
    return _connect(nodes, run, meeting)


def _of_hosts(flags: Check) -> tuple[tuple[Node, ...], RunDir, Meeting]:
    run = RunDir((runs_dir() / "check").absolute())
    questions = questions_for(shared_folders(run.root, cache_dir(), "folder"), (), COMPARED_PACKAGES)
    meeting = Meeting()
    nodes, reports = gather(parse_hosts(flags.hosts, flags.gpus, flags.cpu), questions, meeting)
    print(host_table(reports))
    return nodes, run, meeting


def _of_recipe(flags: Check) -> tuple[tuple[Node, ...], RunDir, Meeting]:
    from .start import Request, make_plan

    request = Request(str(flags.recipe), flags.gpus, flags.cpu, "ssh", 1, None, flags.sets, False, hosts=flags.hosts)
    plan, _, run = make_plan(request)
    if plan.refusals:
        raise PlanError(list(plan.refusals))
    print(next(reason.text for reason in plan.reasons if reason.name == "hosts"))
    return plan.nodes, run, plan.jobs[0].meeting


def _connect(nodes: tuple[Node, ...], run: RunDir, meeting: Meeting) -> int:
    """Run the stage that comes first in a run over several hosts, in a folder that is removed again."""
    run = RunDir(run.root.with_name(f".check-{secrets.token_hex(4)}"))
    run.create()
    try:
        job = dataclasses.replace(connect_job(combined(nodes), nodes, run), meeting=meeting)
        Path(job.log_dir).mkdir(parents=True)
        status = _run(job)
        if status.state is JobState.SUCCEEDED:
            print(connection_line(run))
            return EXIT_OK
        if status.failure is not None:
            print(failure_text(dataclasses.asdict(status.failure)), file=sys.stderr)
        return EXIT_BUG if status.exit_code is None else status.exit_code
    finally:
        shutil.rmtree(run.root, ignore_errors=True)


def _run(job: JobSpec) -> JobStatus:
    backend = load("ssh")
    handle = backend.start(job)
    try:
        while not (status := backend.poll(handle)).state.is_terminal:
            time.sleep(POLL_S)
        return status
    finally:
        backend.kill(handle)
