"""A stage that looks at a recipe's data: run on this host without a device, in a folder that goes when it is done."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.retry import RetryLimits
from trainer.spec import EXIT_OK

from .run_dir import RunDir, read_json
from .start import Request, make_plan, write_run


@dataclass(frozen=True)
class Staged:
    """How it ended."""

    exit_code: int
    found: dict[str, Any]
    """What the worker wrote; {} where it failed."""
    said: list[str]
    """Lines for people that its first job printed."""
    loaded: Any
    """The recipe."""


def run_stage(request: Request, stage: str, what: Sequence[str], prepare: bool) -> Staged:
    """Run `-m trainer.worker STAGE --plan ... --out ...` with the flags `what`; with `prepare`, after that stage, in the same cache.

    A failure is printed, and its folder with the logs stays. Raises LaunchError as planning does.
    """
    from .follow import print_end
    from .progress import Progress
    from .supervise import supervise

    folder = Path(tempfile.mkdtemp(prefix=f"launch-{stage}-"))
    run = RunDir(folder / stage)
    plan, loaded, _ = make_plan(dataclasses.replace(request, cpu=1), run)
    preparing = next(job for job in plan.jobs if job.name == "prepare")
    log_dir, out = str(run.logs(1, stage)), run.root / f"{stage}.json"
    flags = ("--log-dir", log_dir, "--package-root", plan.spec.package_root, "--plan", str(run.plan), "--out", str(out))
    job = dataclasses.replace(preparing, name=stage, args=(stage, *flags, *what), log_dir=log_dir)
    jobs = (preparing, job) if prepare else (job,)
    run.create()
    write_run(run, dataclasses.replace(plan, jobs=jobs, retry=RetryLimits()), loaded, 1, request)
    code = supervise(run, 1, frozenset(), Progress(run, sys.stderr))
    if code != EXIT_OK:
        print_end(run, code)
        return Staged(code, {}, [], loaded)
    log = Path(run.logs(1, jobs[0].name)) / "rank_0.log"
    lines = log.read_text(encoding="utf-8").splitlines()
    said = [line for line in lines if not line.startswith(("plan ", "prepared "))]
    staged = Staged(code, read_json(out), said, loaded)
    shutil.rmtree(folder, ignore_errors=True)
    return staged
