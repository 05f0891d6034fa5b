"""The console script, and how tests look at what it left behind."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = Path(sys.executable).with_name("launch")
LAUNCH_TRAINING = (sys.executable, "-P", str(ROOT / "tests" / "support" / "train_stages.py"))
"""The same with the stages up to training alone, for what ends with it."""
TRAIN_AT_ONCE = (*LAUNCH_TRAINING, "--no-connect")
"""The same without measuring the network first."""
FP32 = ("--set", "model.dtype=fp32")
Launch = Callable[..., subprocess.CompletedProcess[str]]


def train_only(folder: Path, recipe: str, cpu: int, name: str, sets: Sequence[str] = ()) -> Path:
    """Plan and run the first two stages, prepare and train. Returns the run folder; the run must succeed."""
    code, run = try_training(folder, recipe, cpu, name, sets)
    log = run / "logs" / "attempt_1" / "train" / "rank_0.log"
    assert code == 0, (log if log.is_file() else run / "status.json").read_text(encoding="utf-8")
    return run


def try_training(
    folder: Path, recipe: str, cpu: int, name: str, sets: Sequence[str] = (), profile: tuple[int, ...] = ()
) -> tuple[int, Path]:
    """Plan and run the first two stages, prepare and train. Returns the exit code and the run folder."""
    from launcher.progress import Progress
    from launcher.run_dir import read_json, write_json
    from launcher.start import Request, make_plan, write_run
    from launcher.supervise import supervise

    request = Request(str(folder / recipe), None, cpu, "torchrun", 1, folder / name, tuple(sets), False, profile)
    plan, loaded, run = make_plan(request)
    assert not plan.refusals, plan.refusals
    run.create()
    write_run(run, plan, loaded, 1, request)
    data = read_json(run.plan)
    write_json(run.plan, {**data, "jobs": data["jobs"][:2]})
    return supervise(run, 1, frozenset(), Progress(run, io.StringIO())), run.root


def only_run(folder: Path) -> Path:
    """The one run folder in `folder`/runs."""
    (run,) = (folder / "runs").iterdir()
    return run


def losses(run: Path) -> dict[int, float]:
    """Step -> loss; after a resume the last row of a step counts."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def held_out_losses(run: Path) -> dict[int, float]:
    """Step -> loss of the held-out rows, 0 before the first."""
    events = map(json.loads, (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["loss"] for row in events if row["event"] == "held_out_loss"}


def wait_until(condition: Callable[[], bool], timeout_s: float = 60, what: str = "condition") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s} s"
        time.sleep(0.05)


def worker_pids(run: Path) -> list[int]:
    """Processes whose command line names this run's folder (and that are not zombies)."""
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if run.name in command and "trainer.worker" in command and state != "Z":
            pids.append(int(entry.name))
    return pids
