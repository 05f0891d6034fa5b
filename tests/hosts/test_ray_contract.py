"""What every backend promises, kept on a running Ray cluster. `make test-cluster`: each job takes Ray some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from contract.test_backends import HERE, TestEveryBackend, finish, job, members, read, run  # noqa: F401  # all of that class runs here
from support.commands import wait_until
from support.ray_nodes import RayNodes, ray_nodes

from cluster import logs
from cluster.job import JobSpec, JobState, Meeting, NodeShare, RayRequest
from cluster.processes import is_alive
from cluster.registry import load


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path_factory.mktemp("ray")) as found:
        yield found


class Joined:
    """The Ray backend, with every job asked to join the cluster."""

    name = "ray"

    def __init__(self, address: str) -> None:
        self.backend, self.address = load("ray"), address

    def start(self, spec: JobSpec):
        return self.backend.start(replace(spec, ray=spec.ray or RayRequest(self.address, 1, 0)))

    def __getattr__(self, name: str):
        return getattr(self.backend, name)


@pytest.fixture
def backend(nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> Joined:
    monkeypatch.syspath_prepend(str(HERE))
    for name, value in nodes.env.items():
        if name.startswith("RAY_"):
            monkeypatch.setenv(name, value)
    return Joined(nodes.address)


Make = Callable[..., JobSpec]


def test_a_job_that_finds_no_room_says_what_is_missing(backend: Joined, job: Make) -> None:  # noqa: F811
    first = backend.start(job("wait", ray=RayRequest(backend.address, 2, 0)))
    waiting = members(first.job, 1)
    second = replace(job("succeed", ray=RayRequest(backend.address, 1, 0)), log_dir=f"{first.job.log_dir}_2")
    second = replace(second, args=("succeed", second.log_dir), meeting=Meeting(wait_s=4))
    status = run(backend, second)
    assert (status.state, status.exit_code, status.failure.kind) == (JobState.FAILED, 75, "retry")
    assert status.failure.message == (
        "wanted 1 CPU (one node, 1 process(es), each 1 CPU), the cluster has nothing free of 2 CPU; missing 1 CPU for 4 s"
    )
    assert "cluster.wait_s" in status.failure.hint
    backend.kill(first)
    assert not any(is_alive(p) for p in waiting[:1])


def test_nodes_that_have_gone_since_the_plan_are_waited_for(backend: Joined, job: Make) -> None:  # noqa: F811
    """What can never fit is refused by the plan: here a node has gone, which may come back, also for a later attempt."""
    share = (NodeShare("", 1, ()), NodeShare("", 1, ()))
    spec = job("succeed", num_processes=2, nodes=share, ray=RayRequest(backend.address, 1, 0))
    handle = backend.start(replace(spec, meeting=Meeting(wait_s=4)))
    seen = set()
    while not (status := backend.poll(handle)).state.is_terminal:
        seen.add((status.state, bool(logs.waiting_for(spec.log_dir))))
        time.sleep(0.2)
    assert seen == {(JobState.PENDING, False), (JobState.PENDING, True)}
    assert (status.exit_code, status.failure.kind) == (75, "node_lost")
    assert status.failure.message == (
        "wanted 2 CPU (2 nodes x 1 processes, each 1 CPU), the cluster has 2 CPU free of 2 CPU; missing 1 of 2 nodes for 4 s"
    )


def test_a_job_that_waits_for_room_is_stopped_at_once(backend: Joined, job: Make) -> None:  # noqa: F811
    share = (NodeShare("", 1, ()), NodeShare("", 1, ()))
    spec = job("succeed", num_processes=2, nodes=share, ray=RayRequest(backend.address, 1, 0))
    handle = backend.start(spec)
    wait_until(lambda: bool(logs.waiting_for(spec.log_dir)), 60, "waiting for room")
    backend.stop(handle)
    began = time.monotonic()
    status = finish(backend, handle)
    assert (status.state, status.exit_code) == (JobState.STOPPED, 130)
    assert time.monotonic() - began < 10


def test_a_signal_while_it_joins_ray_stops_it(backend: Joined, job: Make) -> None:  # noqa: F811
    handle = backend.start(job("wait"))
    time.sleep(1.5)
    backend.stop(handle)
    status = finish(backend, handle)
    assert (status.state, status.exit_code, status.failure) == (JobState.STOPPED, 130, None)


def test_a_wrong_token_is_said_as_such(backend: Joined, job: Make, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # noqa: F811
    (tmp_path / "wrong").write_text("6" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "wrong"))
    status = run(backend, job("succeed"))
    assert status.state is JobState.FAILED
    assert status.exit_code in (2, 75)
    assert "RAY_AUTH_TOKEN" in f"{status.failure.message} {status.failure.hint}"


def test_stop_ends_a_job_politely(backend: Joined, job: Make) -> None:  # noqa: F811
    handle = backend.start(job("wait", num_processes=2))
    workers = members(handle.job, 2)[:2]
    backend.stop(handle)
    status = finish(backend, handle)
    assert (status.state, status.exit_code) == (JobState.STOPPED, 130)
    assert read(handle.job, "exit_rank_1.json")["code"] == -15
    assert not any(is_alive(p) for p in workers)
