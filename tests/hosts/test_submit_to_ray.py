"""`launch submit` to a real Ray cluster of two hosts, from a third that has only the client. `make test-cluster`.

The cluster asks for a token, and its dashboard stands behind https. What Ray, the runs and the client write is searched for secrets.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.commands import LAUNCH, ROOT, wait_until, worker_pids
from support.hosts import Host, hosts
from support.ray_hosts import RayCluster, ray_cluster

TOKEN, IN_WORKER, IN_FILE, ON_CLIENT = (f"canary-{what}-6f2d90b1" for what in ("token", "worker", "file", "client"))
SECRETS = "secrets=[{name: HF_TOKEN}, {name: WANDB_API_KEY, path: ~/key}]"
# The head alone, where a test is about the way there and back, and not about what trains.
FLAGS = ("--backend", "torchrun", "--cpu", "1", "--set", SECRETS)
Client = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("submit")
    for name in ("cluster", "home", "client", "client/my 'work' 目录"):
        (found / name).mkdir()
    (found / "home" / "key").write_text(IN_FILE, encoding="utf-8")
    for name in ("tiny", "data"):
        shutil.copytree(ROOT / "recipes" / name, found / "client/my 'work' 目录" / name)
    shutil.copy(ROOT / "recipes" / "tiny_cpu.yaml", found / "client/my 'work' 目录")
    return found


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Host]]:
    with hosts(3) as found:
        yield found


@pytest.fixture(scope="module")
def cluster(machines: list[Host], folder: Path) -> Iterator[RayCluster]:
    extra = {"HOME": str(folder / "home"), "HF_TOKEN": IN_WORKER, "HF_HUB_OFFLINE": "1"}
    extra["TUNELAUNCH_CACHE"] = str(folder / "home" / "cache")
    with ray_cluster(machines[:2], folder / "cluster", TOKEN, **extra) as found:
        yield found


@pytest.fixture(scope="module")
def client_env(cluster: RayCluster, folder: Path) -> dict[str, str]:
    """A machine that has the token, secrets of its own, and nothing of the cluster."""
    names = ("RAY_", "HF_", "TUNELAUNCH_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    env |= {"PYTHONPATH": str(ROOT), "HOME": str(folder / "client"), "TUNELAUNCH_RUNS": str(folder / "client" / "runs")}
    return {**env, "RAY_AUTH_TOKEN_PATH": str(cluster.token_file), "HF_TOKEN": ON_CLIENT, "WANDB_API_KEY": ON_CLIENT}


@pytest.fixture(scope="module")
def client(client_env: dict[str, str], machines: list[Host], folder: Path) -> Client:
    def run(*argv: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*machines[2].prefix, str(LAUNCH), *argv],
            cwd=folder / "client/my 'work' 目录",
            env={**client_env, **extra},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def address(cluster: RayCluster) -> tuple[str, ...]:
    return ("--ray", cluster.url, "--ca", str(cluster.certificate))


def test_refusals_of_a_real_dashboard(client: Client, address: tuple[str, ...], machines: list[Host]) -> None:
    done = client("submit", "tiny_cpu.yaml", *address, *FLAGS, RAY_AUTH_TOKEN="canary-wrong-token")
    assert done.returncode == 2
    assert "refuses the token from RAY_AUTH_TOKEN (403)" in done.stderr
    assert "canary" not in done.stdout + done.stderr
    done = client("submit", "tiny_cpu.yaml", *address, *FLAGS, RAY_AUTH_TOKEN_PATH="")
    assert done.returncode == 2
    assert "no token" in done.stderr
    done = client("submit", "tiny_cpu.yaml", "--ray", address[1], *FLAGS)
    assert done.returncode == 2
    assert "is not trusted" in done.stderr
    done = client("submit", "tiny_cpu.yaml", "--ray", f"http://{machines[0].address}:8265", *FLAGS)
    assert done.returncode == 2
    assert "plain http to another machine" in done.stderr
    done = client("submit", "tiny_cpu.yaml", "--ray", "https://10.213.7.99", *FLAGS)
    assert done.returncode == 75
    assert "cannot be reached" in done.stderr


def test_a_run_from_submission_to_its_end(client: Client, address: tuple[str, ...], folder: Path) -> None:
    flags = ("--cpu", "1", "--nodes", "2", "--set", SECRETS, "--set", "train.epochs=1")
    done = client("submit", "tiny_cpu.yaml", *address, *flags, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 nodes x 1 processes" in done.stdout
    assert "data/example_chat.jsonl" in done.stdout
    assert "prepare      done" in done.stdout
    (run_id,) = [p.name for p in (folder / "client" / "runs").iterdir()]
    assert (folder / "home" / "runs" / run_id / "merged" / "config.json").is_file()
    page = client("runs", "show", run_id).stdout
    assert page.splitlines()[0] == f"{run_id}  succeeded"
    assert "evaluate      done" in page
    assert f"{folder}/home/runs/{run_id} (on the cluster)" in page
    assert "train        done" in client("runs", "logs", run_id, "-n", "1000").stdout


def test_it_outlives_the_session_that_submitted_it_and_stops_with_a_checkpoint(
    client: Client, address: tuple[str, ...], client_env: dict[str, str], machines: list[Host], folder: Path
) -> None:
    runs = folder / "client" / "runs"
    before = {p.name for p in runs.iterdir()} if runs.is_dir() else set()
    sets = ("--set", "train.max_steps=100000", "--set", "checkpoint.every_steps=100000")
    argv = [*machines[2].prefix, str(LAUNCH), "submit", "tiny_cpu.yaml", *address, *FLAGS, *sets, "--follow"]
    terminal = subprocess.Popen(
        argv, cwd=folder / "client/my 'work' 目录", env=client_env, stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_until(lambda: len({p.name for p in runs.iterdir()} - before) == 1, 60, "a record")
    (run_id,) = {p.name for p in runs.iterdir()} - before
    run = folder / "home" / "runs" / run_id
    wait_until(lambda: (run / "metrics.jsonl").is_file() and bool(worker_pids(run)), 120, "training")
    os.killpg(terminal.pid, signal.SIGKILL)
    terminal.wait()
    steps = (run / "metrics.jsonl").stat().st_size
    wait_until(lambda: (run / "metrics.jsonl").stat().st_size > steps + 10_000, 60, "more steps")
    assert f"{run_id:<48} running    train" in client("runs", "list").stdout
    assert "running" in client("runs", "show", run_id).stdout
    assert "unknown" in client("runs", "list", RAY_AUTH_TOKEN="canary-wrong-token").stdout
    done = client("runs", "stop", run_id)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{run_id} stopped\n")
    assert client("runs", "watch", run_id).returncode == 130
    assert len(list((run / "checkpoints").glob("step_*/manifest.json"))) == 1
    assert worker_pids(run) == []


def test_the_first_cause_of_a_failed_run_comes_back(client: Client, address: tuple[str, ...]) -> None:
    flags = ("--backend", "torchrun", "--cpu", "1", "--set", "secrets=[NOT_THERE]", "--follow")
    done = client("submit", "tiny_cpu.yaml", *address, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "NOT_THERE is not set in the workers' environment" in client("runs", "show", "last").stdout


def test_no_secret_is_written_or_shown_anywhere(
    client: Client, address: tuple[str, ...], cluster: RayCluster, folder: Path
) -> None:
    """After all of the above: run folders, records, Ray's session with its logs and uploads, and command lines."""
    flags = ("--set", "train.max_steps=100000", "--set", "run.name=seen")
    done = client("submit", "tiny_cpu.yaml", *address, *FLAGS, *flags)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: bool(cluster.processes("trainer.worker", "train")), 120, "training")
    commands = cluster.commands()
    assert "_submitted" in commands
    assert "canary" not in commands
    pid = cluster.processes("trainer.worker", "train")[0]
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
    # The worker has the cluster's secrets, and not the client's: so there was something to leak.
    assert IN_WORKER in environment
    assert ON_CLIENT not in environment
    assert client("runs", "stop", "last").returncode == 0
    holders = {cluster.token_file, folder / "home" / "key"}
    searched = 0
    for root in (folder, cluster.session):
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink() and path not in holders:
                searched += 1
                data = path.read_bytes()
                assert not any(s.encode() in data for s in (TOKEN, IN_WORKER, IN_FILE, ON_CLIENT)), path
    assert searched > 100
    assert list(cluster.session.rglob("job-driver-*.log"))
    assert list(cluster.session.rglob("working_dir_files/_ray_pkg_*"))
