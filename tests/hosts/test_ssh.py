"""A run over two hosts by real ssh: the same losses, and what happens when something breaks. `make test-cluster`.

Both hosts are network namespaces of this machine; they share the file system, except where a test gives one its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import FP32, ROOT, TRAIN_AT_ONCE, losses, only_run, wait_until, worker_pids
from support.hosts import command_of
from support.ssh_hosts import SshCluster, SshHost, ssh_cluster

HOSTS = ("--hosts", "alpha", "--hosts", "beta", "--cpu", "1")
NO_RETRY = ("--set", "retry.crashes=0", "--set", "retry.node_losses=0")
STEPS = 12


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshCluster]:
    with ssh_cluster(tmp_path_factory.mktemp("ssh"), 2) as found:
        yield found


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Recipes in a folder with a space, quotes and Chinese: `short.yaml` of 12 steps, `long.yaml` of 2000 with a checkpoint every 5."""
    folder = tmp_path / "my 'work' \"目录\""
    shutil.copytree(ROOT / "recipes", folder)
    text = (folder / "tiny_cpu.yaml").read_text(encoding="utf-8")
    for name, steps, every in (("short", STEPS, 6), ("long", 2000, 5)):
        changed = text.replace("epochs: 10", f"max_steps: {steps}").replace("every_steps: 10", f"every_steps: {every}")
        (folder / f"{name}.yaml").write_text(changed, encoding="utf-8")
    return folder


@pytest.fixture
def started(cluster: SshCluster, work: Path, environment: dict[str, str]) -> Iterator[Start]:
    start = Start(cluster, work, environment)
    yield start
    start.end()


class Start:
    """Starts a long run over both hosts, without measuring the network first, and waits until it trains."""

    def __init__(self, cluster: SshCluster, work: Path, environment: dict[str, str]) -> None:
        self.cluster, self.work, self.environment = cluster, work, environment
        self.processes: list[subprocess.Popen[str]] = []

    def __call__(self, *args: str, at_step: int = 7) -> tuple[subprocess.Popen[str], Path]:
        log = self.work / "launch.log"
        command = ["long.yaml", *HOSTS, *FP32, *args]
        process = self.cluster.popen(command, self.work, self.environment, log, TRAIN_AT_ONCE)
        self.processes.append(process)
        wait_until(lambda: (self.work / "runs").is_dir() and any((self.work / "runs").glob("long-*")), what="a run")
        run = only_run(self.work)
        wait_until(lambda: at(run) >= at_step or process.poll() is not None, 120, f"step {at_step}")
        assert process.poll() is None, self.output()
        return process, run

    def output(self) -> str:
        return (self.work / "launch.log").read_text(encoding="utf-8")

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def at(run: Path) -> int:
    """The last step that was trained."""
    return max(losses(run), default=0) if (run / "metrics.jsonl").is_file() else 0


def worker_on(host: SshHost, run: Path) -> int:
    (pid,) = {pid for pid in worker_pids(run) if pid in host.host.pids() and b"distributed.run" not in command_of(pid)}
    return pid


def assert_nothing_is_left(cluster: SshCluster, within_s: float = 15) -> None:
    wait_until(lambda: not any(host.host.jobs() for host in cluster.hosts), within_s, "no process left on any host")


def test_a_killed_worker_is_the_first_cause(cluster: SshCluster, started: Start) -> None:
    process, run = started(*NO_RETRY)
    os.kill(worker_on(cluster.hosts[1], run), signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(60) == 75, started.output()
    assert time.monotonic() - began < 25
    assert "rank 1 was killed by SIGKILL (signal 9)" in started.output()
    assert_nothing_is_left(cluster)


def test_a_run_goes_on_by_itself_when_a_lost_host_is_back(
    cluster: SshCluster, started: Start, work: Path, environment: dict[str, str]
) -> None:
    # A checkpoint that is being written beside training when a host dies is none: two intervals would be lost.
    process, run = started("--set", "checkpoint.async=false")
    beta = cluster.hosts[1]
    beta.kill()
    began = time.monotonic()
    wait_until(lambda: "attempt 2 (lost node 1 of 5" in started.output(), 60, "another attempt")
    assert time.monotonic() - began < 25
    before = at(run)
    beta.start()
    wait_until(lambda: at(run) > before + 5 or process.poll() is not None, 120, "steps of the second attempt")
    assert process.poll() is None, started.output()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, started.output()
    first, second = json.loads((run / "status.json").read_text(encoding="utf-8"))["attempts"]
    assert (first["cause"], first["retried"], second["cause"]) == ("node_lost", True, "stopped")
    assert first["message"].startswith("the link to beta:")
    assert first["step"] - first["next_step"] <= 5
    assert_nothing_is_left(cluster)
    # By hand, it goes on over the same hosts.
    before = at(run)
    again = cluster.popen(["runs", "resume", str(run)], work, environment, work / "again.log")
    wait_until(lambda: at(run) > before + 5 or again.poll() is not None, 120, "steps after the resume")
    assert again.poll() is None, (work / "again.log").read_text(encoding="utf-8")
    again.send_signal(signal.SIGINT)
    assert again.wait(60) == 130
    assert "resumed from step_0000" in (run / "logs" / "attempt_3" / "train" / "rank_1.log").read_text(
        encoding="utf-8"
    ) + (run / "logs" / "attempt_3" / "train" / "rank_0.log").read_text(encoding="utf-8")
    assert_nothing_is_left(cluster)


def test_a_lost_host_is_the_first_cause(cluster: SshCluster, started: Start) -> None:
    process, _ = started(*NO_RETRY)
    cluster.hosts[1].kill()
    try:
        assert process.wait(60) == 75, started.output()
        assert "the link to beta:" in started.output()
        wait_until(lambda: not cluster.hosts[0].host.jobs(), 15, "nothing left on alpha")
    finally:
        cluster.hosts[1].start()


def test_a_cable_pulled_for_20_s_costs_nothing_but_time(cluster: SshCluster, started: Start) -> None:
    process, run = started()
    beta = cluster.hosts[1]
    before = at(run)
    beta.host.cut()
    time.sleep(20)
    held = at(run)
    beta.host.mend()
    wait_until(lambda: at(run) > held + 3 or process.poll() is not None, 90, "steps after the cable was put back")
    assert process.poll() is None, started.output()
    assert held - before < 500
    assert "the job cannot be reached; it may well go on" in started.output()
    assert "the job is reachable again" in started.output()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, started.output()
    assert max(losses(run)) % 5 == 0 or any((run / "checkpoints").glob(f"step_*{max(losses(run))}"))
    assert_nothing_is_left(cluster)


def test_a_cable_cut_for_good_ends_both_sides(cluster: SshCluster, started: Start) -> None:
    process, _ = started("--set", "cluster.silence_s=6", *NO_RETRY)
    alpha, beta = cluster.hosts
    beta.host.cut()
    try:
        began = time.monotonic()
        wait_until(lambda: not beta.host.jobs(), 40, "beta ends its own processes")
        assert process.wait(60) == 75, started.output()
        assert time.monotonic() - began < 45
        assert "host beta has not been heard for" in started.output()
        wait_until(lambda: not alpha.host.jobs(), 15, "nothing left on alpha")
    finally:
        beta.host.mend()


def test_nothing_outlives_a_killed_launcher(cluster: SshCluster, started: Start) -> None:
    process, run = started()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_nothing_is_left(cluster)
    assert not worker_pids(run)


def test_nothing_outlives_a_cut_ssh_link(cluster: SshCluster, started: Start) -> None:
    process, _ = started(*NO_RETRY)
    sessions = [pid for pid in cluster.hosts[1].host.pids() if b"sshd: root@notty" in command_of(pid)]
    assert sessions
    for pid in sessions:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(60) == 75, started.output()
    assert "the link to beta:" in started.output()
    assert_nothing_is_left(cluster)


def test_a_disk_that_fills_on_one_host_while_it_saves_is_told(cluster: SshCluster, started: Start) -> None:
    process, run = started(at_step=1)
    sshd = str(cluster.hosts[1].daemon.pid)
    (run / "checkpoints").mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(run / "checkpoints")]
    # From now on beta's `checkpoints` is a full disk of its own.
    subprocess.run(["nsenter", "-t", sshd, "-m", *mount], check=True)
    try:
        assert process.wait(90) == 2, started.output()
    finally:
        subprocess.run(["nsenter", "-t", sshd, "-m", "umount", str(run / "checkpoints")], check=False)
    assert "rank 1" in started.output() or "cannot write" in started.output(), started.output()
    assert_nothing_is_left(cluster)


def test_a_taken_port_is_refused_by_name(cluster: SshCluster, work: Path, environment: dict[str, str]) -> None:
    code = "import socket, time; s = socket.create_server(('', 29555)); print('up', flush=True); time.sleep(60)"
    taken = subprocess.Popen([*cluster.hosts[0].host.prefix, "python3", "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert taken.stdout.readline() == "up\n"
        done = cluster.launch(
            "cluster", "check", "short.yaml", *HOSTS, "--set", "cluster.port=29555", cwd=work, env=environment
        )
    finally:
        taken.kill()
        taken.communicate()
    assert done.returncode == 75
    assert "alpha: port 29555 cannot be used: Address already in use" in done.stderr
    assert "cluster.port" in done.stderr


def test_hosts_that_fit_are_measured(cluster: SshCluster, work: Path, environment: dict[str, str]) -> None:
    done = cluster.launch("cluster", "check", *HOSTS, cwd=work, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GB/s" in done.stdout
    assert not list((work / "runs").iterdir())


def test_another_version_and_missing_data_are_refused_before_anything_starts(
    cluster: SshCluster, work: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    old = tmp_path / "old" / "transformers-4.0.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n", encoding="utf-8")
    python = tmp_path / "python of beta"
    python.write_text(f"#!/bin/sh\nPYTHONPATH='{old.parent}' exec '{ROOT}/.venv/bin/python' \"$@\"\n", encoding="utf-8")
    python.chmod(0o755)
    (work / "hosts.yaml").write_text(f"hosts:\n  - alpha\n  - {{host: beta, python: '{python}'}}\n", encoding="utf-8")
    sshd = str(cluster.hosts[1].daemon.pid)
    data = str(work / "data")
    subprocess.run(["nsenter", "-t", sshd, "-m", "mount", "-t", "tmpfs", "tmpfs", data], check=True)
    try:
        done = cluster.launch("short.yaml", "--hosts", "hosts.yaml", "--cpu", "1", cwd=work, env=environment)
    finally:
        subprocess.run(["nsenter", "-t", sshd, "-m", "umount", data], check=True)
    assert done.returncode == 2
    assert "--hosts beta: transformers 4.0.0, but 5." in done.stderr
    assert "pip install transformers==5." in done.stderr
    assert f"--hosts beta: {data}/example_chat.jsonl does not exist there" in done.stderr
    assert not list((work / "runs").iterdir())


def test_a_run_folder_that_is_not_shared_is_refused(
    cluster: SshCluster, work: Path, environment: dict[str, str]
) -> None:
    sshd = str(cluster.hosts[1].daemon.pid)
    (work / "runs").mkdir()
    subprocess.run(["nsenter", "-t", sshd, "-m", "mount", "-t", "tmpfs", "tmpfs", str(work / "runs")], check=True)
    try:
        done = cluster.launch("plan", "short.yaml", *HOSTS, cwd=work, env=environment)
    finally:
        subprocess.run(["nsenter", "-t", sshd, "-m", "umount", str(work / "runs")], check=True)
    assert done.returncode == 2
    assert f"--hosts beta: {work / 'runs'} is another folder there: what alpha wrote into it is not seen" in done.stderr
    assert "--run-dir, or run.dir" in done.stderr


def test_hosts_that_cannot_be_reached_are_told_together(
    cluster: SshCluster, work: Path, environment: dict[str, str]
) -> None:
    beta = cluster.hosts[1]
    beta.kill()
    try:
        done = cluster.launch("plan", "short.yaml", *HOSTS, "--hosts", "nowhere", cwd=work, env=environment)
    finally:
        beta.start()
    assert done.returncode == 75
    assert "beta: ssh: connect to host" in done.stderr
    assert "Connection refused" in done.stderr
    assert "nowhere: ssh: Could not resolve hostname nowhere" in done.stderr
