"""One recipe on every backend: one process in the launcher, torchrun, two hosts by ssh, two nodes of a Ray cluster. `make test-cluster`.

The hosts are network namespaces with a real sshd and a real Ray, which asks for a token. The run by ssh goes through all stages; that
one under Ray does too: test_submit_to_ray.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import LAUNCH_TRAINING, Launch, losses
from support.ray_nodes import RayNodes, ray_nodes
from support.ray_results import check_told_to_ray
from support.short_run import RELATIVE, SHORT, STEPS, loss_table
from support.ssh_hosts import SshCluster, ssh_cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshCluster]:
    with ssh_cluster(tmp_path_factory.mktemp("ssh"), 2) as found:
        yield found


@pytest.fixture(scope="module")
def nodes(cluster: SshCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """A Ray over the same two hosts."""
    with ray_nodes(tmp_path_factory.mktemp("ray"), [host.host for host in cluster.hosts]) as found:
        yield found


@pytest.fixture(scope="module")
def by_debug(folder: Path, launch: Launch) -> Path:
    done = launch("tiny_cpu.yaml", "--cpu", "1", "--backend", "debug", "--run-dir", "debug", *SHORT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "debug"


@pytest.fixture(scope="module")
def by_ssh(cluster: SshCluster, folder: Path, environment: dict[str, str]) -> Path:
    """Two hosts with one process each."""
    flags = ("--hosts", "alpha", "--hosts", "beta", "--cpu", "1", "--run-dir", "ssh")
    done = cluster.launch("tiny_cpu.yaml", *flags, *SHORT, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks met" in done.stdout
    return folder / "ssh"


@pytest.fixture(scope="module")
def by_ray(cluster: SshCluster, nodes: RayNodes, folder: Path, environment: dict[str, str]) -> Path:
    """Two nodes with one process each. The steps' traffic crosses between them."""
    alpha, beta = (host.host for host in cluster.hosts)
    before = beta.received_bytes()
    args = ("tiny_cpu.yaml", "--cpu", "1", "--nodes", "2", "--run-dir", "ray", *SHORT)
    process = nodes.launch(alpha, args, folder, environment, LAUNCH_TRAINING)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    assert "2 nodes x 1 processes" in output
    assert beta.received_bytes() - before > 1e6
    return folder / "ray"


def test_the_losses_of_four_backends_agree(by_debug: Path, torchrun_run: Path, by_ssh: Path, by_ray: Path) -> None:
    runs = {"debug x1": by_debug, "torchrun x2": torchrun_run, "ssh 2x1": by_ssh, "Ray 2x1": by_ray}
    table, apart = loss_table(runs)
    print(f"\n{table}")
    steps = losses(by_debug)
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert steps[STEPS] < steps[1] - 0.1, "nothing was learnt, so there was nothing to compare"
    assert apart <= RELATIVE


def test_a_run_by_ssh_went_through_every_stage_and_left_every_log(by_ssh: Path, cluster: SshCluster) -> None:
    assert json.loads((by_ssh / "merged" / "merge_report.json").read_text())["verified"] is True
    logs = by_ssh / "logs" / "attempt_1" / "train"
    assert {p.name for p in logs.iterdir()} >= {"rank_0.log", "rank_1.log", "node_0.agent.log", "node_1.agent.log"}
    assert not [pid for host in cluster.hosts for pid in host.host.jobs()]


def test_a_run_under_ray_is_told_to_ray_and_keeps_no_token(by_ray: Path, nodes: RayNodes) -> None:
    plan = json.loads((by_ray / "plan.json").read_text(encoding="utf-8"))
    assert all(job["ray"]["address"] == nodes.address for job in plan["jobs"])
    token = Path(nodes.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert not [p for p in by_ray.rglob("*") if p.is_file() and token.encode() in p.read_bytes()]
    check_told_to_ray(by_ray)
