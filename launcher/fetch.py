"""`launch runs fetch URL`: a run that was copied to a bucket (`storage:`) as a run folder of this machine again."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

from trainer.checkpoint_format import newest_verified, step_of
from trainer.disk import new_folder
from trainer.spec import TrainError
from trainer.storage import DamagedCopyError, Storage

from .errors import LaunchError
from .recipe_schema import PATTERNS, STORAGE_URL
from .run_dir import RunDir, read_json, write_json
from .status import RUNNING, STOPPED, Attempt, Status, read_status

_LATER = ("events.jsonl", "metrics.jsonl", "env.json")
"""Good to have; a run goes on without."""


def is_url(name: str) -> bool:
    """Whether RUN names a folder in a bucket rather than one of this machine."""
    return "://" in name


def fetch(url: str, runs_dir: Path) -> RunDir:
    """The run folder, with the newest whole checkpoint that is in the bucket. One that is here already only gets that.

    Raises LaunchError for a URL that names no run, and for a run that is running; TrainError where the bucket cannot be read.
    """
    if not re.fullmatch(STORAGE_URL, url):
        raise LaunchError(
            f"{url!r} is no place of runs", f"Write {PATTERNS[STORAGE_URL].removeprefix('a URL: ')}, and the run's id."
        )
    storage = Storage(url)
    steps = storage.steps()
    if not steps:
        raise LaunchError(f"{url} holds no checkpoint", "Give the URL of the run: what storage.url names, and its id.")
    run = RunDir((runs_dir / url.rstrip("/").rpartition("/")[2]).absolute())
    if run.status.is_file():
        _require_ended(run)
    else:
        _make_folder(storage, run)
    _fetch_newest(storage, steps, run)
    return run


def _fetch_newest(storage: Storage, steps: list[tuple[int, str]], run: RunDir) -> None:
    """The newest one that is whole, as a resume takes it. Raises TrainError where there is none, there or here."""
    own, _ = newest_verified(run.checkpoints)
    own_step = step_of(own.name) if own is not None else None
    for step, path in steps:
        if own is not None and own_step is not None and own_step >= step:
            print(f"{run.run_id}: {own.name} is here already and whole")
            return
        damaged = run.checkpoints / path.rpartition("/")[2]
        if damaged.exists():
            damaged.rename(damaged.with_name(f"{damaged.name}.damaged"))
        try:
            fetched = storage.fetch_checkpoint(path, run.checkpoints)
        except DamagedCopyError as e:
            print(f"skipped: {e}")
            continue
        print(f"{run.run_id}: fetched {fetched.name} from {storage.url}, every byte compared with its manifest")
        return
    if own is None:
        raise TrainError(f"{storage.url}: none of its {len(steps)} checkpoints is whole", "Start the run anew.")


def _require_ended(run: RunDir) -> None:
    status = read_status(run)
    if status.state == RUNNING:
        raise LaunchError(f"{run.run_id} is running (pid {status.pid})", f"Watch it: launch runs watch {run.root}")


def _make_folder(storage: Storage, run: RunDir) -> None:
    """Everything but checkpoints, as it was when the newest one was copied; the run counts as stopped since then."""
    with new_folder(run.root) as partial:
        missing = storage.fetch_files((path.name for path in run.taken_along), partial)
        needed = sorted(set(missing) - set(_LATER))
        if needed:
            raise LaunchError(
                f"{storage.url} has no {', '.join(needed)}: a run folder cannot be made of it",
                "Its checkpoints are whole: copy one into checkpoints/ of a run of the same recipe, and resume that.",
            )
        there = RunDir(partial)
        data = read_json(there.status)
        ran_until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(data["updated"]))
        print(
            f"{run.run_id}: ran on {data['host']}, {ran_until} at the latest copy; make sure that it does not run there any more"
        )
        status = Status(**{**data, "attempts": [Attempt(**row) for row in data["attempts"]]})
        status.state, status.stage, status.pid, status.exit_code = STOPPED, "", 0, None
        status.stages = dict.fromkeys(status.stages, "waiting")
        last = status.attempts[-1]
        last.cause, last.ended, last.message = "stopped", status.updated, f"fetched from {storage.url}"
        status.unreachable_since = status.next_attempt_at = None
        write_json(there.status, dataclasses.asdict(status))
