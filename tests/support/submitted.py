"""A run submitted from a third host to a Ray of two: how long until its first step, and what becomes of it without Ray's supervisor of the job."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.processes import ProcessIdentity
from launcher.run_dir import RunDir
from launcher.status import read_status
from support.chaos_hosts import Seen, last_step, lost, rows_of
from support.commands import LAUNCH, ROOT, wait_until
from support.hosts import Host, hosts
from support.machines import started_at
from support.ray_hosts import RayCluster, ray_cluster

ACCIDENT = "kill -9 of Ray's supervisor of the job"
BACKEND = "ray, submitted"
START_PARTS = ("submit", "Ray", "plan", "connect", "prepare", "train: start", "train: load", "train: first step")
"""Until `launch submit` returns, until the job's process begins, until the first stage does, those stages, and as for a recovery."""


@dataclass
class Site:
    """A cluster, and a client of it."""

    cluster: RayCluster
    client: Host
    folder: Path
    env: dict[str, str]

    @property
    def home(self) -> Path:
        """Where runs lie on the cluster."""
        return self.folder / "home"

    def launch(self, *argv: str) -> str:
        """`launch ARGV` on the client, which must do well. Returns its output."""
        done = subprocess.run(
            [*self.client.prefix, str(LAUNCH), *argv],
            cwd=self.folder / "client",
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextlib.contextmanager
def site(folder: Path, environment: Mapping[str, str]) -> Iterator[Site]:
    for name in ("cluster", "home"):
        (folder / name).mkdir()
    shutil.copytree(ROOT / "recipes", folder / "client")
    extra = {"HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "TUNELAUNCH_CACHE": str(folder / "home" / "cache")}
    with hosts(3) as found, ray_cluster(found[:2], folder / "cluster", "7" * 64, **extra) as cluster:
        env = {k: v for k, v in environment.items() if not k.startswith(("RAY_", "TUNELAUNCH_"))}
        env |= {"PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN_PATH": str(cluster.token_file)}
        yield Site(cluster, found[2], folder, {**env, "TUNELAUNCH_RUNS": str(folder / "client" / "runs")})


def submit(where: Site, *sets: str) -> tuple[Path, dict[str, float]]:
    """Submit a run of two nodes. Returns its folder once it has done a step, and the seconds by `START_PARTS` until then."""
    typed = time.time()
    flags = [word for s in sets for word in ("--set", s)]
    address = ("--ray", where.cluster.url, "--ca", str(where.cluster.certificate))
    where.launch("submit", "tiny_cpu.yaml", *address, "--cpu", "1", "--nodes", "2", *flags)
    returned = time.time()
    records = sorted((where.folder / "client" / "runs").iterdir(), key=os.path.getmtime)
    run = where.home / "runs" / records[-1].name
    wait_until(lambda: last_step(run) >= 1, 200, "the first step of a submitted run")
    (entry, *_) = sorted(where.cluster.processes("launcher", "_submitted"))
    identity = ProcessIdentity.of(entry)
    assert identity is not None
    status = read_status(RunDir(run))
    began = status.attempts[0].started
    beat = json.loads((run / "logs" / "attempt_1" / "train" / "heartbeat_rank_0.json").read_text())
    loaded = next(e["time"] for e in rows_of(run / "events.jsonl") if e["event"] == "train_started")
    connected = began + status.seconds["connect"]
    marks = [typed, returned, started_at(identity.start_ticks), began, connected, connected + status.seconds["prepare"]]
    marks += [started_at(beat["pid_start"]), loaded, rows_of(run / "metrics.jsonl")[0]["time"]]
    return run, {part: round(b - a, 1) for part, (a, b) in zip(START_PARTS, itertools.pairwise(marks), strict=True)}


def kill_supervisor(where: Site) -> Seen:
    """Of a run that has done some steps."""
    run, parts = submit(where, "train.max_steps=100000", "checkpoint.every_steps=5")
    wait_until(lambda: last_step(run) >= 7, 60, "step 7 of a submitted run")
    (supervisor,) = where.cluster.processes("JobSupervisor")
    since = time.time()
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: read_status(RunDir(run)).state != "running", 90, "the end of the run")
    noticed = time.time() - since
    wait_until(lambda: not [p for h in where.cluster.hosts for p in h.jobs()], 60, "no process left")
    gone = time.time() - since
    wait_until(lambda: "running" not in where.launch("runs", "show", run.name).splitlines()[0], 60, "Ray knows")
    page = where.launch("runs", "show", run.name)
    status = read_status(RunDir(run))
    cause = page.splitlines()[-2]
    assert "supervisor of the job has died (on " in cause, page
    seen = Seen(ACCIDENT, BACKEND, f"{status.state} with a checkpoint; to Ray it {page.split()[1]}", cause)
    seen.noticed_s, seen.gone_s, seen.lost_steps = round(noticed, 1), round(gone, 1), lost(run, status.attempts[0])
    seen.begin = parts
    return seen
