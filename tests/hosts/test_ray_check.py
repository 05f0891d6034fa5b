"""What a run in a Ray cluster would meet, found before it starts: two nodes in network namespaces, one changed. `make test-cluster`."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import LAUNCH, ROOT
from support.hosts import Host, hosts
from support.ray_nodes import RayNodes, ray_nodes

ON_BOTH = ("--backend", "ray", "--cpu", "1", "--nodes", "2")


@dataclass(frozen=True)
class Cluster:
    """Two nodes that fit together, until a test changes the second."""

    hosts: list[Host]
    nodes: RayNodes
    second_path: Path
    """Comes first on the import path of the second node."""

    @contextlib.contextmanager
    def own_file_system(self, folder: Path) -> Iterator[None]:
        """The second node does not see what the others have in that folder."""
        inside = ["nsenter", "-t", str(self.nodes.nodes[1].pid), "-m"]
        subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
        try:
            yield
        finally:
            subprocess.run([*inside, "umount", str(folder)], check=True)


Launched = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    (folder / "second").mkdir()
    with hosts(2) as found, ray_nodes(folder, found, of_last=folder / "second") as nodes:
        yield Cluster(found, nodes, folder / "second")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "my 'work' 目录"
    shutil.copytree(ROOT / "recipes", folder)
    (folder / "runs").mkdir()
    return folder


@pytest.fixture
def launched(cluster: Cluster, work: Path, environment: dict[str, str]) -> Launched:
    """`launch ARGS` on the head, or on the other node, to its end."""
    env = {k: v for k, v in environment.items() if not k.startswith("RAY_")} | cluster.nodes.env

    def run(*args: str, on_head: bool = True) -> subprocess.CompletedProcess[str]:
        prefix = cluster.hosts[0].prefix if on_head else cluster.nodes.on_last(work)
        argv = [*prefix, str(LAUNCH), *args]
        return subprocess.run(argv, cwd=work, env=env, capture_output=True, text=True, timeout=140, check=False)

    return run


def check_nothing_began(cluster: Cluster, work: Path) -> None:
    """No run folder, no token in it, and no process of a rank."""
    assert list((work / "runs").iterdir()) == []
    commands = [Path(f"/proc/{p.pid}/cmdline").read_bytes() for i in (0, 1) for p in cluster.nodes.members(i)]
    assert not [command for command in commands if b"trainer.worker" in command]


def test_nodes_that_fit_are_shown_and_measured(cluster: Cluster, work: Path, launched: Launched) -> None:
    done = launched("cluster", "check", "tiny_cpu.yaml", *ON_BOTH, on_head=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    first, second = (host.address for host in cluster.hosts)
    assert rows[:4] == ["host", second, first, "this host"], "the node on which it is typed comes first"
    assert "2 ranks met in" in done.stdout
    assert "GB/s" in done.stdout
    check_nothing_began(cluster, work)


def test_another_version_and_missing_data_are_refused_before_anything_starts(
    cluster: Cluster, work: Path, launched: Launched
) -> None:
    old = cluster.second_path / "transformers-4.0.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n", encoding="utf-8")
    first, second = (host.address for host in cluster.hosts)
    try:
        with cluster.own_file_system(work / "data"):
            # One node, but Ray chooses which.
            done = launched("tiny_cpu.yaml", "--backend", "ray", "--cpu", "1")
    finally:
        shutil.rmtree(old)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"node {second}: transformers 4.0.0, but 5." in done.stderr
    assert f" on {first}\n" in done.stderr
    assert f"On {second}, with " in done.stderr
    assert "pip install transformers==5." in done.stderr
    assert f"node {second}: {work}/data/example_chat.jsonl does not exist there" in done.stderr
    assert f"node {first}:" not in done.stderr
    assert "this host:" not in done.stderr
    check_nothing_began(cluster, work)


def test_a_run_folder_that_is_not_shared_is_refused(cluster: Cluster, work: Path, launched: Launched) -> None:
    first, second = (host.address for host in cluster.hosts)
    with cluster.own_file_system(work / "runs"):
        done = launched("cluster", "check", *ON_BOTH)
    assert done.returncode == 2, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith(("error:", "node", "this host"))]
    assert told == [
        f"error: node {second}: {work}/runs is another folder there: what {first}, this host wrote into it is not seen"
    ]
    assert "--run-dir, or run.dir" in done.stderr
    check_nothing_began(cluster, work)


def test_amounts_are_asked_for_and_what_can_never_fit_is_refused(cluster: Cluster, launched: Launched) -> None:
    done = launched("cluster", "check", "--backend", "ray")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "say how much of it this run may use" in done.stderr
    assert f"  {cluster.hosts[1].address}: 2 CPU" in done.stderr
    done = launched("cluster", "check", "--backend", "ray", "--cpu", "1", "--nodes", "3")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "can never carry this: wanted 3 CPU" in done.stderr
