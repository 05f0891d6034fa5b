"""A run over three hosts by real ssh: what one process computes; and one host of the three dies while it trains. `make test-cluster`."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from support.commands import FP32, ROOT, Launch, losses, wait_until
from support.ssh_hosts import ssh_cluster

STEPS = 8
NO_RETRY = ("--set", "retry.crashes=0", "--set", "retry.node_losses=0")
# A rate that does not depend on the number of steps: the run over three hosts is longer than what it is compared with.
SAME = (*FP32, "--set", "train.global_batch=6", "--set", "train.schedule=constant", "--set", "train.warmup_ratio=0")


def test_three_hosts_compute_what_one_process_does_and_a_dead_one_is_named(
    tmp_path: Path, environment: dict[str, str], launch: Launch
) -> None:
    folder = tmp_path / "recipes"
    shutil.copytree(ROOT / "recipes", folder)
    alone = launch("tiny_cpu.yaml", "--cpu", "1", *SAME, *steps(STEPS), "--run-dir", "alone", cwd=folder)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    names = ("alpha", "beta", "gamma")
    devices = [word for name in names for word in ("--hosts", name)]
    with ssh_cluster(tmp_path, 3) as cluster:
        log, run = folder / "launch.log", folder / "three"
        args = ["tiny_cpu.yaml", *devices, "--cpu", "1", *SAME, *steps(2000), *NO_RETRY, "--run-dir", "three"]
        process = cluster.popen(args, folder, environment, log)
        try:
            done = lambda: (run / "metrics.jsonl").is_file() and max(losses(run), default=0) >= STEPS  # noqa: E731
            wait_until(lambda: done() or process.poll() is not None, 150, f"step {STEPS}")
            assert process.poll() is None, log.read_text()
            alpha, beta, gamma = (host.host for host in cluster.hosts)
            assert all(host.jobs() for host in (alpha, beta, gamma))
            cluster.hosts[1].kill()
            since = time.monotonic()
            assert process.wait(60) == 75, log.read_text()
            assert time.monotonic() - since < 25
            wait_until(lambda: not [*alpha.jobs(), *gamma.jobs()], 15, "nothing left on the other two")
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    said = log.read_text(encoding="utf-8")
    assert "3 ranks met" in said
    assert "the link to beta:" in said
    expected, got = losses(folder / "alone"), losses(run)
    assert sorted(expected) == list(range(1, STEPS + 1))
    worst = max(abs(got[step] / loss - 1) for step, loss in expected.items())
    print(f"worst relative deviation of three hosts from one process: {worst:.1e}")
    assert {step: got[step] for step in expected} == pytest.approx(expected, rel=1e-4)


def steps(number: int) -> tuple[str, ...]:
    return ("--set", f"train.max_steps={number}", "--set", "checkpoint.every_steps=5")
