"""The run folder: the API between stages. One property per path; nobody else joins them."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainer.spec import PathsSpec

from .errors import LaunchError

ANOTHER_PLACE = "Choose another place with --out."


def new_run_id(name: str, now: time.struct_time | None = None) -> str:
    """`<name>-<yyyymmdd-hhmmss>-<4 hex>`. Minted once per run, by the launcher."""
    stamp = time.strftime("%Y%m%d-%H%M%S", now or time.localtime())
    return f"{name}-{stamp}-{secrets.token_hex(2)}"


@dataclass(frozen=True)
class RunDir:
    """One run's folder. `root` is absolute."""

    root: Path

    @property
    def run_id(self) -> str:
        return self.root.name

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    def earlier_recipe(self, attempt: int) -> Path:
        """Where to keep the recipe that was in force until `attempt` changed it; a name that is free."""
        path, number = self.root / f"recipe.before_attempt_{attempt}.yaml", 2
        while path.exists():
            path, number = self.root / f"recipe.before_attempt_{attempt}.{number}.yaml", number + 1
        return path

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def env(self) -> Path:
        return self.root / "env.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def prepared(self) -> Path:
        return self.root / "prepared.json"

    @property
    def connection(self) -> Path:
        """What the ranks of several hosts measured between them."""
        return self.root / "connection.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def profile(self) -> Path:
        return self.root / "profile"

    @property
    def bad_batches(self) -> Path:
        return self.root / "bad_batches"

    @property
    def stop_request(self) -> Path:
        return self.root / "stop_requested"

    @property
    def submission(self) -> Path:
        """Where and how the run was submitted; only a run on another machine has it."""
        return self.root / "submission.json"

    @property
    def job_log(self) -> Path:
        """What a submitted run's launcher printed, kept once the run has ended."""
        return self.root / "job.log"

    @property
    def taken_along(self) -> tuple[Path, ...]:
        """What goes to the storage with each checkpoint, so that a run folder can be made again from it."""
        return (self.recipe, self.plan, self.env, self.status, self.events, self.metrics)

    @property
    def supervisor_log(self) -> Path:
        return self.root / "supervisor.log"

    @property
    def supervisor_lock(self) -> Path:
        return self.root / ".supervisor.lock"

    def logs(self, attempt: int, stage: str) -> Path:
        return self.root / "logs" / f"attempt_{attempt}" / stage

    def create(self) -> None:
        """Raises LaunchError when it exists or cannot be made. The record of its own submission may be in it already."""
        try:
            self.root.mkdir(parents=True)
        except FileExistsError:
            if os.listdir(self.root) == [self.submission.name]:
                return
            raise LaunchError(f"{self.root} exists", "Give another --run-dir, or continue it with --resume.") from None
        except OSError as e:
            raise LaunchError(
                f"cannot create the run folder {self.root}: {e.strerror}", "Give another --run-dir."
            ) from None

    def paths(self) -> PathsSpec:
        return PathsSpec(
            run_dir=str(self.root),
            prepared=str(self.prepared),
            metrics=str(self.metrics),
            events=str(self.events),
            samples=str(self.samples),
            checkpoints_dir=str(self.checkpoints),
            adapter_dir=str(self.adapter),
            merged_dir=str(self.merged),
            report_dir=str(self.report),
            profile_dir=str(self.profile),
            bad_batches_dir=str(self.bad_batches),
            stop_request=str(self.stop_request),
        )


@contextmanager
def file_of_the_user(path: Path) -> Iterator[IO[str]]:
    """`new_content` of a file that --out names; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise LaunchError(f"cannot write {path}: {e.strerror}", ANOTHER_PLACE) from None
    with new_content(path, ANOTHER_PLACE) as f:
        yield f


@contextmanager
def new_content(path: Path, hint: str) -> Iterator[IO[str]]:
    """A UTF-8 file that becomes `path` once the block ends without an error: readers see the old content or the new, never a part.

    Temporary name, fsync, rename. Raises LaunchError where it cannot be written.
    """
    temporary = ""
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(fd, "w", encoding="utf-8", newline="") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as e:
        raise LaunchError(f"cannot write {path}: {e.strerror}", hint) from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """`text` as the new content of `path`. Raises LaunchError on a full disk."""
    with new_content(path, "Free some space, or give another --run-dir.") as f:
        f.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically. Raises LaunchError on a full disk."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_event(path: Path, name: str, fields: dict[str, Any]) -> None:
    """Append {"time", "event": name, **fields} to events.jsonl; on a line of its own also after one that a crash cut short."""
    row = json.dumps({"time": round(time.time(), 3), "event": name, **fields}, ensure_ascii=False)
    with open(path, "ab+") as f:
        if f.tell() > 0:
            f.seek(-1, os.SEEK_END)
            row = row if f.read(1) == b"\n" else "\n" + row
        f.write(f"{row}\n".encode())


def read_json(path: Path) -> Any:
    """The value of a JSON file that this program wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
