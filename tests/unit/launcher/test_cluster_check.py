"""`launch cluster check`: which flags go together, and that it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.job import JobSpec, JobState, JobStatus, Meeting
from launcher import cluster_check
from launcher.cluster_check import Check, check
from launcher.errors import LaunchError


def flags(**given: Any) -> Check:
    return Check(**{"recipe": None, "hosts": (), "gpus": None, "cpu": None, **given})


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({}, "which hosts?", "--backend ray --nodes 2"),
        ({"backend": "ssh"}, "which hosts?", "--hosts a:0,1 --hosts b:0,1"),
        ({"backend": "torchrun", "cpu": 1}, "--backend torchrun: it runs on this host", "launch doctor"),
        ({"backend": "ray", "hosts": ("a", "b")}, "--hosts goes with --backend ssh, not with ray", "--nodes M"),
        ({"backend": "ray", "gpus": "free:1", "cpu": 1}, "contradict each other", "Give one of them."),
        ({"hosts": ("a", "b"), "nodes": 3}, "--nodes 3: which ones?", "--hosts a:0,1"),
        ({"backend": "ray", "cpu": 1}, "no Ray cluster runs on this host", "RAY_ADDRESS=HEAD:6379"),
    ],
)
def test_flags_that_do_not_go_together(
    given: dict[str, Any], message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(LaunchError) as refused:
        check(flags(**given))
    assert message in refused.value.message
    assert hint in refused.value.hint
    assert refused.value.exit_code == 2


class Stuck:
    """A backend whose job never ends."""

    def __init__(self) -> None:
        self.killed = 0

    def start(self, job: JobSpec) -> JobSpec:
        return job

    def poll(self, handle: JobSpec) -> JobStatus:
        return JobStatus(JobState.RUNNING, None, None)

    def kill(self, handle: JobSpec) -> None:
        self.killed += 1


def test_ranks_that_do_not_come_to_an_end_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = Stuck()
    monkeypatch.setattr(cluster_check, "load", lambda name: stuck)
    monkeypatch.setattr(cluster_check, "CONNECT_WAIT_S", 0.05)
    job = JobSpec("connect", "w", (), 2, (), {}, str(tmp_path), str(tmp_path), "run", meeting=Meeting(wait_s=0.05))
    with pytest.raises(LaunchError, match="not come to an end within") as e:
        cluster_check._run(job, "ray")
    assert e.value.exit_code == 75
    assert stuck.killed == 1
