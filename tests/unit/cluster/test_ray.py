"""The parts of the Ray backend that need no Ray: environment of workers, reports, snapshots, folders, the cluster's address."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import logs, ray_driver, ray_local
from cluster.job import ClusterError, JobReport, JobSpec, Meeting, NodeShare, RayRequest
from cluster.outcome import job_status, lost_rank
from cluster.preflight import HostReport
from cluster.ray_actors import Place, seated
from cluster.ray_driver import runtime_env
from cluster.ray_nodes import ClusterNode, Survey, clock_offset, find_cluster, survey_from_json
from cluster.ray_placement import RayNode
from cluster.ray_report import SNAPSHOT, Reporter, forget_missing
from cluster.ray_room import require_begun
from cluster.ray_worker import interface_of, worker_env

JOB = JobSpec("train", "w", (), 2, (), {"OMP_NUM_THREADS": "3"}, "L", "C", "run", ray=RayRequest("h:1", 1, 1))
RANKS = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}


def test_a_job_for_ray_survives_its_file() -> None:
    spec = dataclasses.replace(
        JOB, nodes=(NodeShare("", 2, ()),), report=JobReport("/r", "/r/m", "/r/c", "manifest.json")
    )
    assert JobSpec.from_dict(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


def test_a_worker_gets_its_ranks_and_devices_and_nothing_of_ray() -> None:
    inherited = {
        "PATH": "/bin",
        "RAY_AUTH_TOKEN": "secret",
        "RAY_JOB_ID": "1",
        "ACCELERATE_TORCH_DEVICE": "cuda:1",
        "RANK": "7",
        "CUDA_VISIBLE_DEVICES": "3,5",
        "HF_HUB_OFFLINE": "0",
    }
    env = worker_env(JOB, inherited, {"HF_HUB_OFFLINE": "1"}, RANKS)
    assert env.items() >= {**RANKS, "PATH": "/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "3"}.items()
    # The devices that Ray assigned to all workers of this node; LOCAL_RANK counts among them.
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("3,5", "PCI_BUS_ID")
    assert "DS_ACCELERATOR" not in env
    assert not [name for name in env if name.startswith(("RAY_", "ACCELERATE_"))]


def test_a_link_between_workers_may_be_silent_for_as_long_as_a_host() -> None:
    """tests/chaos/test_many_machines.py cuts a real one."""
    job = dataclasses.replace(JOB, meeting=Meeting(silence_s=45.0))
    env = runtime_env(job)["env_vars"]
    assert env == {"RAY_grpc_keepalive_timeout_ms": "45000"}
    # It is Ray's, and not for what the worker starts.
    assert not env.keys() & worker_env(JOB, {**env, "CUDA_VISIBLE_DEVICES": "0"}, {}, RANKS).keys()


def test_ranks_of_actors_go_node_by_node() -> None:
    places = [
        Place("b", "10.0.0.2", 11, ("1",)),
        Place("a", "10.0.0.1", 12, ("0",)),
        Place("b", "10.0.0.2", 13, ("0",)),
    ]
    seats = seated(places)
    assert [seat.actor for seat in seats] == [0, 2, 1]
    assert [(s.ranks["RANK"], s.ranks["LOCAL_RANK"], s.ranks["LOCAL_WORLD_SIZE"]) for s in seats] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
        ("2", "0", "1"),
    ]
    # LOCAL_RANK counts among the devices of all ranks of the node: each finds the one that Ray gave it.
    assert [seat.devices for seat in seats] == [("1", "0"), ("1", "0"), ("0",)]
    meeting = {(s.ranks["WORLD_SIZE"], s.ranks["MASTER_ADDR"], s.ranks["MASTER_PORT"]) for s in seats}
    assert meeting == {("3", "10.0.0.2", "11")}
    assert seated(places[:1])[0].ranks["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("failed", "died", "exits", "node_is_gone", "rank"),
    [
        ([0, 1], {1}, {}, True, 1),  # the other one only lost its connection
        ([1], set(), {}, False, 1),
        ([0, 1], {1}, {0: 75}, True, 1),
        ([0, 1], {1}, {0: 75, 1: -9}, True, 1),  # its watcher outlived it by a moment
        ([0, 1], {1}, {0: 75, 1: -9}, False, None),  # killed, on a node that is well
        ([0, 1], set(), {0: 75, 1: -9}, True, None),  # killed, and some other node has gone
        ([0, 1], set(), {0: 70, 1: 75}, True, None),
        ([1], set(), {1: 70}, True, 0),  # it failed of what Ray has not heard of yet
        ([1], set(), {1: 70}, False, None),
    ],
)
def test_who_went_with_a_node(
    failed: list[int], died: set[int], exits: dict[int, int], node_is_gone: bool, rank: int | None
) -> None:
    assert lost_rank(2, failed, died, exits, node_is_gone) == rank


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(Exception("The current node timed out during startup."), 75), (ConnectionError("no answer"), 75)],
)
def test_a_ray_that_does_not_start_may_start_later(
    error: Exception, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ClusterError, match=f"a Ray of our own does not start: {error}") as caught:
        ray_driver._init("a Ray of our own does not start", address="local")
    assert caught.value.exit_code == exit_code


def test_an_error_of_ours_while_ray_starts_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**options: object) -> None:
        raise TypeError("no such option")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(TypeError):
        ray_driver._init("a Ray of our own does not start", address="local")


def test_exact_devices_of_a_ray_of_our_own_stay_in_rank_order() -> None:
    own = dataclasses.replace(JOB, devices=("GPU-b", "GPU-a"), ray=RayRequest("", 1, 1))
    env = worker_env(own, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, {}, RANKS)
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
    cpu = dataclasses.replace(JOB, ray=RayRequest("h:1", 1, 0), num_processes=1)
    env = worker_env(cpu, {"CUDA_VISIBLE_DEVICES": "0"}, {}, {})
    assert (env["CUDA_VISIBLE_DEVICES"], env["DS_ACCELERATOR"], env["MASTER_PORT"]) == ("", "cpu", "0")


def test_news_are_the_newest_row_and_each_whole_checkpoint_once(tmp_path: Path) -> None:
    report = JobReport(str(tmp_path), str(tmp_path / "m.jsonl"), str(tmp_path / "c"), "manifest.json")
    reporter = Reporter(report)
    assert reporter.news() is None
    (tmp_path / "m.jsonl").write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25, "parts": [1]}\n{"step": 3, "lo'
    )
    assert reporter.news() == ({"step": 2, "loss": 2.25}, None)
    assert reporter.news() is None
    half = tmp_path / "c" / "step_000002"
    half.mkdir(parents=True)
    assert reporter.news() is None
    (half / "manifest.json").write_text("{}")
    assert reporter.news() == ({"step": 2, "loss": 2.25}, half)
    assert reporter.news() is None


def test_ray_forgets_checkpoints_that_were_deleted(tmp_path: Path) -> None:
    (tmp_path / "c" / "2").mkdir(parents=True)
    results = [{"checkpoint_dir_name": f"c/{n}", "metrics": {}} for n in (1, 2)]
    state = {"ray_version": "2.60.0", "checkpoint_results": results, "checkpoint_report_indices": [0, 4]}
    state |= {"latest_checkpoint_result": results[1], "pending_training_results": []}
    (tmp_path / SNAPSHOT).write_text(json.dumps(state))
    forget_missing(tmp_path, "2.60.0")
    kept = json.loads((tmp_path / SNAPSHOT).read_text())
    assert (kept["checkpoint_results"], kept["checkpoint_report_indices"]) == ([results[1]], [4])
    assert kept["latest_checkpoint_result"] == results[1]
    (tmp_path / "c" / "2").rmdir()
    forget_missing(tmp_path, "2.60.0")
    assert json.loads((tmp_path / SNAPSHOT).read_text())["latest_checkpoint_result"] is None
    forget_missing(tmp_path, "2.61.0")
    assert not (tmp_path / SNAPSHOT).exists()
    forget_missing(tmp_path, "2.61.0")


@pytest.mark.parametrize("left", ["", '{"ray_version": "2.60.0", "check', "[]", "{}"])
def test_a_list_that_ray_was_killed_in_is_forgotten(tmp_path: Path, left: str) -> None:
    (tmp_path / SNAPSHOT).write_text(left)
    forget_missing(tmp_path, "2.60.0")
    assert not (tmp_path / SNAPSHOT).exists()


def test_the_token_and_the_folder_are_private_and_go(tmp_path: Path) -> None:
    with ray_local.local_folder() as folder:
        token = ray_local.write_token(folder)
        assert token.stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(token.read_text()) == 64
        assert token.read_text() not in str(ray_local.local_env(token))
        # Room for "/session_2026-11-25_04-30-48_123456_1234567/sockets/plasma_store" within 107 bytes.
        assert len(str(folder)) < 25
        ray_local.sweep()
        assert folder.is_dir()
    assert not folder.exists()


def test_the_folder_of_a_killed_job_is_swept() -> None:
    code = "import os\nfrom cluster import ray_local\nwith ray_local.local_folder() as f:\n print(f, flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    left = Path(done.stdout.strip())
    assert left.is_dir()
    ray_local.sweep()
    assert not left.exists()


def test_the_cluster_is_found_as_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"RAY_TMPDIR": str(tmp_path)}
    assert find_cluster(env) == ""
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert find_cluster(env) == address
        assert find_cluster({**env, "RAY_ADDRESS": "auto"}) == address
        assert find_cluster({**env, "RAY_ADDRESS": "local"}) == ""
        assert find_cluster({**env, "RAY_ADDRESS": "head:6379"}) == "head:6379"
        with monkeypatch.context() as other:
            other.setattr(os, "fstat", lambda fd: SimpleNamespace(st_uid=os.getuid() + 1))
            assert find_cluster(env) == "", "another user wrote it"
    # The file outlives a cluster that was killed.
    assert find_cluster(env) == ""
    with pytest.raises(ClusterError, match="no Ray runs"):
        find_cluster({**env, "RAY_ADDRESS": "auto"})
    with pytest.raises(ClusterError, match="no address that a job can join"):
        find_cluster({**env, "RAY_ADDRESS": "ray://head:10001"})


def test_what_the_nodes_say_is_read_back_and_errors_are_raised() -> None:
    ray = RayNode("i", "a", 2.0, 0.0, 1.0, 0.0)
    inventory = {"kind": "cpu", "devices": [], "cpu_count": 2, "memory_gb": 4.0, "problem": ""}
    report = HostReport("a", {"inventory": inventory}, 0.25, {}, {"/runs": ["b"]})
    here = dataclasses.replace(report, host="this host", computes=False)
    survey = Survey((ClusterNode(ray, report), ClusterNode(ray, None)), here, ("b",))
    assert survey_from_json(json.dumps(dataclasses.asdict(survey))) == survey
    assert [r.host for r in survey.reports] == ["a", "this host"]
    assert survey.reports[0].inventory.memory_gb == 4.0
    with pytest.raises(ClusterError, match="gone") as e:
        survey_from_json(json.dumps({"error": {"message": "gone", "hint": "look", "exit_code": 75}}))
    assert (e.value.hint, e.value.exit_code) == ("look", 75)


def test_the_offset_of_a_clock_and_how_exact_it_is() -> None:
    # 2 s there, 10 s ahead; 0.5 s on the way to it and 1.5 s back.
    error_s, ahead_s = clock_offset(100.0, 110.5, 112.5, 104.0)
    assert (error_s, ahead_s) == (1.0, 9.5)
    assert clock_offset(100.0, 100.1, 103.1, 103.2) == pytest.approx((0.1, 0.0))


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") == ""


def test_exit_files_and_the_agents_failure_decide_the_status(tmp_path: Path) -> None:
    folder = str(tmp_path)
    logs.write_exit(folder, 1, -9)
    logs.write_exit(folder, 0, 70)
    assert list(logs.read_exits(folder).items()) == [(1, -9), (0, 70)]
    assert job_status(70, logs.read_exits(folder), "", False, folder).failure.rank == 1
    logs.write_agent_failure(folder, 1, "node_lost", "rank 1 was lost with the node b", "ray status", 75)
    status = job_status(70, {0: 70}, "", False, folder)
    assert (status.exit_code, status.failure.kind, status.failure.rank) == (75, "node_lost", 1)
    assert status.failure.log_file.endswith("rank_1.log")
    logs.remove_failures(folder)
    logs.remove_exits(folder)
    assert not list(tmp_path.glob("*.json"))
    assert logs.waiting_for(folder) == ""
    (tmp_path / logs.WAITING).write_text("waiting for 3 of 120 s: wanted 4 GPU\n")
    assert logs.waiting_for(folder) == "waiting for 3 of 120 s: wanted 4 GPU"


def test_ranks_that_never_begin_are_named_and_not_waited_for_for_ever(tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, log_dir=str(tmp_path), meeting=Meeting(wait_s=5))
    logs.rank_log(str(tmp_path), 0).touch()
    with pytest.raises(ClusterError, match="rank 1 has not begun 185 s after") as told:
        require_begun(job)
    assert told.value.exit_code == 75
    logs.rank_log(str(tmp_path), 1).touch()
    require_begun(job)
