"""The accidents of tests/chaos/test_many_machines.py: each begins a run, lets something happen to it, and looks at what became of it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launcher.run_dir import RunDir
from launcher.status import read_status
from support.chaos_hosts import EVERY, Seen, last_step, lost, of_attempts, recovery, rows_of
from support.commands import ROOT, wait_until
from support.machines import Machines

STEPS = 60
KILL_AT = 7
END_S = 150
GONE_S = 90
"""Processes on a host that nobody reaches any more have this long to end."""
NO_RETRY = ("retry.crashes=0", "retry.node_losses=0", "retry.hangs=0")


class Scene:
    """One run on some machines, and the accident that befalls it."""

    def __init__(self, machines: Machines, accident: str, folder: Path) -> None:
        self.machines, self.accident, self.folder = machines, accident, folder
        self.process: subprocess.Popen[bytes] | None = None
        self.run: Path | None = None
        """None where it is refused before it begins."""
        self.seen: Seen | None = None

    @staticmethod
    def folder_for(parent: Path) -> Path:
        """A copy of the recipes with one more, `chaos.yaml`."""
        folder = parent / "recipes"
        shutil.copytree(ROOT / "recipes", folder)
        text = (folder / "tiny_cpu.yaml").read_text(encoding="utf-8")
        text = text.replace("epochs: 10", f"max_steps: {STEPS}").replace("every_steps: 10", f"every_steps: {EVERY}")
        (folder / "chaos.yaml").write_text(f"{text}retry:\n  wait_s: 1\n", encoding="utf-8")
        return folder

    def launch(self, *args: str, **extra: str) -> subprocess.Popen[bytes]:
        self.process = self.machines.launch(args, self.folder, self.folder / "launch.log", **extra)
        return self.process

    def begin(self, *sets: str, at_step: int = KILL_AT) -> Path:
        """Start a run and return its folder once it has done `at_step` steps."""
        flags = [word for s in sets for word in ("--set", s)]
        process = self.launch("chaos.yaml", *self.machines.devices, "--run-dir", "chaos_run", *flags)
        self.run = run = self.folder / "chaos_run"
        wait_until(lambda: last_step(run) >= at_step or process.poll() is not None, END_S, f"step {at_step}")
        assert process.poll() is None, self.output()
        return run

    def output(self) -> str:
        return (self.folder / "launch.log").read_text(encoding="utf-8", errors="replace")

    def ended(self, *codes: int) -> int:
        """Wait for the end of the command. Returns its exit code, which must be one of `codes`."""
        assert self.process is not None
        code = self.process.wait(END_S)
        assert code in codes, self.output()
        return code

    def saw(self, seen: Seen, within_s: float = 15) -> None:
        """Note it, with what is left over once the command has ended; its cause without what differs from round to round."""
        seen.cause = re.sub(r"\bpid \d+", "pid N", seen.cause.replace(f"{self.folder}/", ""))
        self.seen = seen
        seen.left, gone_s = self.machines.left_over(within_s)
        if seen.gone_s is None:
            seen.gone_s = round(gone_s, 1)

    def end(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()


def went_on(scene: Scene, since: float, cause: str) -> None:
    """The run has ended well, with the accident as the end of its first attempt."""
    scene.ended(0)
    assert scene.run is not None
    seen = of_attempts(scene.accident, scene.machines.backend, scene.run, since)
    assert seen.state == "succeeded"
    assert cause in seen.cause, seen.cause
    assert seen.parts
    seen.state = "went on by itself"
    scene.saw(seen)


def stopped(scene: Scene, since: float, code: int, *causes: str) -> None:
    """The run has ended with an exit code, and says why."""
    scene.ended(code)
    assert scene.run is not None
    seen = of_attempts(scene.accident, scene.machines.backend, scene.run, since)
    assert seen.state == "failed"
    assert any(cause in seen.cause for cause in causes), seen.cause
    assert seen.cause in scene.output()
    seen.state = f"failed, exit {code}"
    scene.saw(seen, GONE_S)


def kill_worker(scene: Scene) -> None:
    scene.begin()
    since = time.time()
    scene.machines.kill_worker()
    went_on(scene, since, "rank 1 was killed by SIGKILL")


def kill_host(scene: Scene) -> None:
    """It is started again after ten seconds: meanwhile the next attempt waits for it."""
    scene.begin()
    since = time.time()
    scene.machines.kill_host()
    time.sleep(10)
    scene.machines.bring_back()
    is_ray = scene.machines.backend == "ray"
    named = f"was lost with the node {scene.machines.broken.address}" if is_ray else "the link to beta:"
    went_on(scene, since, named)


def cut_for_20_s(scene: Scene) -> None:
    """A link that is silent for less than `cluster.silence_s` costs nothing but time."""
    run = scene.begin()
    held, noticed, since = 0, None, time.time()
    scene.machines.broken.cut()
    try:
        while time.time() < since + 20:
            if noticed is None and read_status(RunDir(run)).shown_state == "unknown":
                noticed = round(time.time() - since, 1)
            held = last_step(run)
            time.sleep(0.2)
    finally:
        scene.machines.broken.mend()
    scene.ended(0)
    status = read_status(RunDir(run))
    assert (status.state, len(status.attempts)) == ("succeeded", 1)
    after = next(row["time"] for row in rows_of(run / "metrics.jsonl") if row["step"] > held)
    seen = Seen(scene.accident, scene.machines.backend, "the same attempt went on", "none: nothing failed", noticed, 0)
    assert last_step(run) == STEPS
    seen.new_step_s = round(after - since, 1)
    scene.saw(seen)


def cut_for_good(scene: Scene) -> None:
    run = scene.begin("cluster.silence_s=20", *NO_RETRY)
    far = scene.machines.broken
    since = time.time()
    far.cut()
    try:
        wait_until(lambda: not far.jobs(), GONE_S, "the far host ends its own processes")
        gone_s = time.time() - since
        is_ray = scene.machines.backend == "ray"
        named = f"was lost with the node {far.address}" if is_ray else "host beta has not been heard for"
        stopped(scene, since, 75, named)
    finally:
        scene.machines.abandon()
    assert scene.seen is not None
    assert run.is_dir()
    scene.seen.gone_s = round(gone_s, 1)


def kill_launcher(scene: Scene) -> None:
    run = scene.begin()
    assert scene.process is not None
    scene.process.send_signal(signal.SIGKILL)
    scene.process.wait()
    left, gone_s = scene.machines.left_over(30)
    assert read_status(RunDir(run)).shown_state == "crashed"
    typed = time.time()
    scene.launch("runs", "resume", str(run))
    scene.ended(0)
    status = read_status(RunDir(run))
    seen = Seen(scene.accident, scene.machines.backend, "crashed; `runs resume` went on", status.attempts[0].message)
    seen.lost_steps = lost(run, status.attempts[0])
    seen.parts = recovery(run, 2, typed, typed)
    seen.new_step_s = round(sum(seen.parts.values()), 2)
    seen.gone_s = round(gone_s, 1)
    scene.saw(seen)
    seen.left = max(seen.left, left)


def full_disk(scene: Scene) -> None:
    """The last host's `checkpoints` becomes a disk of its own that has room for half a shard."""
    run = scene.begin()
    folders = [f"step_{step:06d}.partial" for step in range(EVERY, STEPS + 1, EVERY)]
    since = time.time()
    with scene.machines.own_disk(run / "checkpoints", "64k", scene.process, folders):
        stopped(scene, since, 2, "No space left on device")


def refused(scene: Scene, codes: tuple[int, ...], *words: str, since: float) -> None:
    """Nothing was begun, and the command says why."""
    code = scene.ended(*codes)
    seconds = round(time.time() - since, 1)
    said = scene.output()
    assert all(word in said for word in words), said
    cause = [line for line in said.splitlines() if words[0] in line][-1].strip().removeprefix("error: ")
    run = RunDir(scene.folder / "chaos_run")
    assert not run.metrics.exists()
    tries = len(read_status(run).attempts) if run.status.exists() else 0
    state = f"failed after {tries} attempts" if tries else "refused"
    scene.saw(Seen(scene.accident, scene.machines.backend, f"{state}, exit {code}", cause, seconds))


def port_taken(scene: Scene) -> None:
    code = "import socket, time; s = socket.create_server(('', 29555)); print('up', flush=True); time.sleep(600)"
    argv = [*scene.machines.hosts[0].prefix, "python3", "-c", code]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as taken:
        try:
            assert taken.stdout is not None
            assert taken.stdout.readline() == "up\n"
            since = time.time()
            scene.launch("chaos.yaml", *scene.machines.devices, "--run-dir", "chaos_run", "--set", "cluster.port=29555")
            refused(scene, (75,), "port 29555 cannot be used: Address already in use", "cluster.port", since=since)
        finally:
            taken.kill()


def wrong_token(scene: Scene) -> None:
    (scene.folder / "wrong").write_text("6" * 64, encoding="utf-8")
    since = time.time()
    # 75: Ray's client cannot tell a refused token from a cluster that does not answer.
    extra = {"RAY_AUTH_TOKEN_PATH": str(scene.folder / "wrong")}
    scene.launch("chaos.yaml", *scene.machines.devices, "--run-dir", "chaos_run", **extra)
    refused(scene, (2, 75), "cannot join the Ray cluster", "RAY_AUTH_TOKEN", since=since)


def other_version(scene: Scene) -> None:
    """beta's Python finds another transformers."""
    old = scene.folder / "old" / "transformers-4.0.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n", encoding="utf-8")
    python = scene.folder / "python of beta"
    own = ROOT / ".venv" / "bin" / "python"
    python.write_text(f"#!/bin/sh\nPYTHONPATH='{old.parent}' exec '{own}' \"$@\"\n", encoding="utf-8")
    python.chmod(0o755)
    hosts = f"hosts:\n  - alpha\n  - {{host: beta, python: '{python}'}}\n"
    (scene.folder / "hosts.yaml").write_text(hosts, encoding="utf-8")
    since = time.time()
    scene.launch("chaos.yaml", "--hosts", "hosts.yaml", "--cpu", "1", "--run-dir", "chaos_run")
    refused(scene, (2,), "transformers 4.0.0, but 5.", "pip install transformers==5.", since=since)


def no_data(scene: Scene) -> None:
    with scene.machines.own_disk(scene.folder / "data", "1m"):
        since = time.time()
        scene.launch("chaos.yaml", *scene.machines.devices, "--run-dir", "chaos_run")
        refused(scene, (2,), "example_chat.jsonl does not exist there", since=since)


EVERYWHERE = ("torchrun", "ssh", "ray")
ACCIDENTS: dict[str, tuple[Callable[[Scene], None], tuple[str, ...]]] = {
    "kill -9 of a worker": (kill_worker, EVERYWHERE),
    "a host dies, and is back 10 s later": (kill_host, ("ssh", "ray")),
    "cable out for 20 s": (cut_for_20_s, ("ssh", "ray")),
    "cable out for good": (cut_for_good, ("ssh", "ray")),
    "kill -9 of the launcher": (kill_launcher, EVERYWHERE),
    "the disk of one host is full when it saves": (full_disk, EVERYWHERE),
    "the port is taken": (port_taken, ("ssh",)),
    "wrong token": (wrong_token, ("ray",)),
    "another transformers on one host": (other_version, ("ssh",)),
    "no data on one host": (no_data, ("ssh",)),
}
"""What happens -> how, and where it can."""
