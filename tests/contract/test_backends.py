"""What every backend promises, with real processes."""

import json
import os
import pdb
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.job import ClusterError, JobReport, JobSpec, JobState, Meeting, NodeShare, RayRequest
from cluster.processes import ProcessIdentity, descendants, is_alive
from cluster.registry import load

CONTRACT_BACKENDS = ("torchrun", "ray", "debug", "ssh")
"""Ray as it carries jobs of one process on one host. On a running cluster: tests/hosts/test_ray_contract.py."""

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WEIRD = "a b'c\"d 微调\n$HOME"


@pytest.fixture(params=CONTRACT_BACKENDS)
def backend(request, monkeypatch):
    """Each backend in turn; the worker module can be imported here too, as `trainer` can."""
    monkeypatch.syspath_prepend(str(HERE))
    return load(request.param)


@pytest.fixture
def torchrun():
    return load("torchrun")


@pytest.fixture
def ray():
    return load("ray")


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    return load("debug")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of one CPU process, in a folder with a difficult name; an outer job's variables are around."""
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("PET_NNODES", "3")
    monkeypatch.setenv("PYTHONPATH", ".")
    folder = tmp_path / WEIRD
    folder.mkdir()
    log_dir = folder / "logs"

    def make(mode, num_processes=1, extra=(), **more):
        env = {"PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "TUNELAUNCH_TEST": WEIRD}
        args = (mode, str(log_dir), *extra)
        return JobSpec(
            "train", "contract_worker", args, num_processes, (), env, str(log_dir), str(folder), "run-1", **more
        )

    return make


def finish(backend, handle, seconds=60.0):
    """The terminal status. Every call of poll on the way must return at once."""
    deadline = time.monotonic() + seconds
    while True:
        before = time.monotonic()
        status = backend.poll(handle)
        assert time.monotonic() - before < 1
        if status.state.is_terminal:
            assert backend.poll(handle) == status
            return status
        assert status.state in (JobState.PENDING, JobState.RUNNING)
        assert status.state is JobState.RUNNING or backend.name in ("ssh", "ray")
        assert time.monotonic() < deadline, [
            p.read_text(encoding="utf-8") for p in Path(handle.job.log_dir).glob("*.log")
        ]
        time.sleep(0.05)


def start(backend, job):
    """Over ssh a job has hosts; here it is this one, which needs no sshd (tests/hosts has some)."""
    nodes = (NodeShare("localhost", job.num_processes, ()),) if backend.name == "ssh" else job.nodes
    return backend.start(replace(job, nodes=nodes))


def run(backend, job):
    return finish(backend, start(backend, job))


def read(job, name):
    return json.loads(Path(job.log_dir, name).read_text(encoding="utf-8"))


def wait_for(job, *names, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not all(Path(job.log_dir, name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} did not appear"
        time.sleep(0.05)


def members(job, num_processes):
    """Workers and their children, as they are now."""
    names = [f"told_{rank}.json" for rank in range(num_processes)]
    children = [f"child_{rank}.json" for rank in range(num_processes)]
    wait_for(job, *names, *children)
    pids = [read(job, name)["pid"] for name in names] + [read(job, name) for name in children]
    identities = [ProcessIdentity.of(pid) for pid in pids]
    assert all(identity is not None and is_alive(identity) for identity in identities)
    return identities


def start_elsewhere(name, spec):
    """A launcher in a process of its own, which prints the pids of the job's first processes and waits."""
    code = (
        "import json, sys, time\nfrom cluster.job import JobSpec\nfrom cluster.registry import load\n"
        f"handle = load('{name}').start(JobSpec.from_dict(json.loads(sys.argv[1])))\n"
        "print(*handle.pids, flush=True); time.sleep(120)"
    )
    argv = [sys.executable, "-P", "-c", code, json.dumps(asdict(spec))]
    return subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)


def describe(process):
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return f"{process.pid} has just gone"


class TestEveryBackend:
    def test_success_with_arguments_environment_and_folder_exactly_as_asked(self, backend, job):
        spec = job("succeed", extra=(WEIRD, "--flag", "", "x=1"))
        status = run(backend, spec)
        assert (status.state, status.exit_code, status.failure) == (JobState.SUCCEEDED, 0, None)
        told = read(spec, "told_0.json")
        assert told["args"] == list(spec.args)
        assert told["cwd"] == spec.cwd
        expected = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "PYTHONSAFEPATH": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **spec.env,
        }
        assert {name: told["env"].get(name) for name in expected} == expected
        assert "PET_NNODES" not in told["env"]

    def test_a_mistake_of_the_user(self, backend, job):
        status = run(backend, job("user"))
        assert (status.state, status.exit_code) == (JobState.FAILED, 2)
        assert (status.failure.rank, status.failure.kind) == (0, "user")
        assert (status.failure.message, status.failure.hint) == ("data/小薇.jsonl:3: 不是 JSON", "修好它")

    def test_a_bug(self, backend, job):
        status = run(backend, job("bug"))
        assert (status.state, status.exit_code) == (JobState.FAILED, 70)
        assert (status.failure.message, status.failure.kind) == ("KeyError: 'labels'", "bug")
        assert os.path.isabs(status.failure.log_file)

    def test_an_exception_that_nobody_caught(self, backend, job):
        status = run(backend, job("raise"))
        assert (status.state, status.exit_code) == (JobState.FAILED, 70)
        assert status.failure.message == "ValueError: 小薇 was not expected"
        assert "contract_worker.py" in status.failure.traceback

    def test_a_silent_end(self, backend, job):
        status = run(backend, job("exit"))
        assert (status.state, status.exit_code) == (JobState.FAILED, 70)
        assert status.failure.message == "rank 0 ended with exit code 3 and left no message"

    def test_a_worker_that_stops_early_on_request(self, backend, job):
        status = run(backend, job("stopped"))
        assert (status.state, status.exit_code, status.failure) == (JobState.STOPPED, 130, None)

    def test_an_earlier_failure_in_the_same_folder_is_not_taken_for_this_one(self, backend, job):
        assert run(backend, job("user")).exit_code == 2
        assert run(backend, job("exit")).failure.message.startswith("rank 0 ended with exit code 3")

    def test_a_folder_with_modules_of_the_same_names_is_harmless(self, backend, job):
        spec = job("succeed")
        for name in ("trainer", "types", "ray", "json", "cluster", "torch", "contract_worker"):
            Path(spec.cwd, f"{name}.py").write_text("raise SystemExit('the wrong module was imported')\n")
        assert run(backend, spec).state is JobState.SUCCEEDED

    def test_a_missing_module_is_named(self, backend, job):
        status = run(backend, replace(job("succeed"), entrypoint="no_such_worker"))
        assert (status.state, status.exit_code) == (JobState.FAILED, 2)
        assert "no_such_worker" in status.failure.message

    def test_a_missing_folder_is_refused(self, backend, job, tmp_path):
        spec = replace(job("succeed"), cwd=str(tmp_path / "missing"))
        if backend.name == "ssh":  # what a host cannot do is known when it has answered
            status = run(backend, spec)
            assert (status.exit_code, status.failure.kind) == (2, "user")
            assert status.failure.message.startswith("localhost: the working folder")
            return
        with pytest.raises(ClusterError, match="the working folder"):
            backend.start(spec)

    def test_stop_and_kill_after_the_end_do_nothing(self, backend, job):
        handle = start(backend, job("succeed"))
        status = finish(backend, handle)
        backend.stop(handle)
        backend.kill(handle)
        assert backend.poll(handle) == status


class TestTorchrun:
    def test_a_killed_rank_is_the_cause_and_not_the_peer_that_lost_it(self, torchrun, job):
        spec = job("kill_rank_1", num_processes=2)
        status = run(torchrun, spec)
        assert (status.state, status.exit_code) == (JobState.FAILED, 75)
        assert (status.failure.rank, status.failure.kind) == (1, "killed")
        assert status.failure.message.startswith("rank 1 was killed by SIGKILL (signal 9)")
        told = [read(spec, f"told_{rank}.json") for rank in (0, 1)]
        assert [(t["env"]["RANK"], t["env"]["WORLD_SIZE"], t["env"]["PYTHONSAFEPATH"]) for t in told] == [
            ("0", "2", "1"),
            ("1", "2", "1"),
        ]
        assert [t["args"] for t in told] == [list(spec.args)] * 2
        assert spec.cwd not in told[0]["path"]
        assert "" not in told[0]["path"]

    def test_a_killed_single_worker_is_named(self, torchrun, job):
        status = run(torchrun, job("kill"))
        assert (status.state, status.exit_code) == (JobState.FAILED, 75)
        assert status.failure.message.startswith("rank 0 was killed by SIGKILL")

    def test_stop_ends_all_ranks(self, torchrun, job):
        spec = job("wait", num_processes=2)
        handle = torchrun.start(spec)
        processes = members(spec, 2)
        torchrun.stop(handle)
        torchrun.stop(handle)
        status = finish(torchrun, handle)
        assert (status.state, status.exit_code, status.failure) == (JobState.STOPPED, 130, None)
        # The children in sessions of their own were stragglers, ended by poll.
        assert not any(is_alive(p) for p in processes)

    def test_kill_leaves_no_process(self, torchrun, job):
        spec = job("wait", num_processes=2)
        handle = torchrun.start(spec)
        processes = members(spec, 2)
        torchrun.kill(handle)
        assert not any(is_alive(p) for p in processes)
        assert not is_alive(handle.root.identity)
        assert finish(torchrun, handle).state is JobState.STOPPED

    def test_kill_minus_nine_of_the_launcher_ends_all_ranks(self, torchrun, job, tmp_path):
        spec = job("wait", num_processes=2)
        launcher = start_elsewhere("torchrun", spec)
        agent = ProcessIdentity.of(int(launcher.stdout.readline()))
        workers = members(spec, 2)[:2]
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        launcher.stdout.close()
        deadline = time.monotonic() + 10
        while any(is_alive(p) for p in (agent, *workers)):
            assert time.monotonic() < deadline, "a process outlived the launcher"
            time.sleep(0.05)
        for rank in (0, 1):
            os.kill(read(spec, f"child_{rank}.json"), signal.SIGKILL)

    def test_a_straggler_of_a_finished_job_is_ended(self, torchrun, job):
        spec = job("leave_child")
        handle = torchrun.start(spec)
        wait_for(spec, "child_0.json")
        child = ProcessIdentity.of(read(spec, "child_0.json"))
        assert finish(torchrun, handle).state is JobState.SUCCEEDED
        assert not is_alive(child)

    def test_start_returns_at_once_and_output_is_in_the_agents_log(self, torchrun, job):
        spec = job("succeed")
        handle = torchrun.start(spec)
        assert torchrun.poll(handle).state is JobState.RUNNING
        assert len(handle.pids) == 1
        finish(torchrun, handle)
        assert Path(spec.log_dir, "agent.log").read_text(encoding="utf-8") == "rank 0 完成\n"

    def test_the_command_is_exact(self, torchrun, job):
        assert torchrun.command(job("x", extra=("--a",))) == (
            *(sys.executable, "-P", "-m", "contract_worker"),
            *job("x", extra=("--a",)).args,
        )
        command = torchrun.command(job("x", num_processes=4))
        assert command[:4] == (sys.executable, "-P", "-m", "torch.distributed.run")
        assert "--nproc-per-node=4" in command
        assert "--max-restarts=0" in command
        assert command[-4:] == ("-m", "contract_worker", *job("x").args)


class TestRay:
    """A Ray of its own for the job: it takes some 20 s to start, so each test looks at several things."""

    OWN = RayRequest("", 1, 0)

    @pytest.fixture(params=["Ray Train", "actors"])
    def job(self, job, request, tmp_path):
        """Two ranks: as Ray Train workers, which report what they wrote, or as plain actors."""
        report = JobReport(
            str(tmp_path), str(tmp_path / "metrics.jsonl"), str(tmp_path / "checkpoints"), "manifest.json"
        )

        def make(mode, **changed):
            made = job(mode, **changed)
            return replace(made, report=report) if request.param == "Ray Train" and made.num_processes > 1 else made

        return make

    @staticmethod
    def folders():
        """Of each Ray of its own on this host; there may be others."""
        return set(Path("/tmp").glob("tl-ray-*"))

    @staticmethod
    def wait_for_end(processes, seconds):
        """A killed process of some hundred MB takes a moment to go, in which its environment can no longer be read."""
        deadline = time.monotonic() + seconds
        while left := [p for p in processes if is_alive(p)]:
            assert time.monotonic() < deadline, f"still there: {[describe(p) for p in left]}"
            time.sleep(0.05)

    def test_a_killed_rank_is_the_cause_and_nothing_of_ray_is_left(self, ray, job):
        before, spec = self.folders(), job("kill_rank_1", num_processes=2, ray=self.OWN)
        handle = ray.start(spec)
        wait_for(spec, "told_0.json", "told_1.json")
        started = descendants(handle.pids[0])
        commands = " ".join(Path(f"/proc/{p.pid}/cmdline").read_text(errors="replace") for p in started)
        assert "gcs_server" in commands
        assert "raylet" in commands
        status = finish(ray, handle)
        assert (status.state, status.exit_code) == (JobState.FAILED, 75)
        assert (status.failure.rank, status.failure.kind) == (1, "killed")
        assert status.failure.message.startswith("rank 1 was killed by SIGKILL (signal 9)")
        told = [read(spec, f"told_{rank}.json")["env"] for rank in (0, 1)]
        assert [(t["RANK"], t["LOCAL_RANK"], t["WORLD_SIZE"], t["LOCAL_WORLD_SIZE"]) for t in told] == [
            ("0", "0", "2", "2"),
            ("1", "1", "2", "2"),
        ]
        assert told[0]["MASTER_ADDR"] == "127.0.0.1"
        assert told[0]["MASTER_PORT"] == told[1]["MASTER_PORT"] != "0"
        assert not [name for name in told[0] if name.startswith("RAY_")]
        assert told[0]["TUNELAUNCH_TEST"] == WEIRD
        self.wait_for_end(started, 2)
        assert self.folders() <= before
        assert "RAY_AUTH_TOKEN_PATH" not in Path(spec.log_dir, "job.json").read_text(encoding="utf-8")

    def test_stop_ends_all_ranks_politely(self, ray, job):
        spec = job("wait", num_processes=2, ray=self.OWN)
        handle = ray.start(spec)
        processes = [*members(spec, 2), *descendants(handle.pids[0])]
        ray.stop(handle)
        ray.stop(handle)
        status = finish(ray, handle)
        assert (status.state, status.exit_code, status.failure) == (JobState.STOPPED, 130, None)
        assert [read(spec, f"exit_rank_{rank}.json")["code"] for rank in (0, 1)] == [-signal.SIGTERM] * 2
        self.wait_for_end(processes, 2)

    def test_kill_minus_nine_of_launcher_and_driver_at_once_leaves_nothing(self, ray, job):
        before, spec = self.folders(), job("wait", num_processes=2, ray=self.OWN)
        launcher = start_elsewhere("ray", spec)
        driver = ProcessIdentity.of(int(launcher.stdout.readline()))
        children = members(spec, 2)[2:]
        time.sleep(1.5)  # what has started in the meantime is remembered too
        started = [*descendants(driver.pid), driver]
        launcher.send_signal(signal.SIGKILL)
        os.kill(driver.pid, signal.SIGKILL)
        launcher.wait()
        launcher.stdout.close()
        self.wait_for_end([*started, *children], 10)
        assert self.folders() <= before

    def test_the_command_is_exact(self, ray, job):
        spec = job("x", num_processes=2, ray=self.OWN)
        assert ray.command(spec) == (sys.executable, "-P", "-m", "cluster.ray_driver", f"{spec.log_dir}/job.json")
        alone = job("x", ray=self.OWN)
        assert ray.command(alone) == load("torchrun").command(alone)
        joined = replace(alone, ray=RayRequest("head:6379", 1, 0))
        assert ray.command(joined) == ray.command(spec)


class TestSsh:
    """Two hosts that are both this one: what ssh itself does is in tests/hosts."""

    @pytest.fixture
    def ssh(self):
        return load("ssh")

    @pytest.fixture
    def spec(self, job):
        def make(mode, **changed):
            nodes = (NodeShare("localhost", 1, ()), NodeShare("localhost", 1, ()))
            return replace(job(mode, num_processes=2), nodes=nodes, **changed)

        return make

    def test_ranks_follow_the_order_of_the_hosts(self, ssh, spec):
        job = spec("succeed")
        assert finish(ssh, ssh.start(job)).state is JobState.SUCCEEDED
        told = [read(job, f"told_{rank}.json")["env"] for rank in (0, 1)]
        assert [(t["RANK"], t["GROUP_RANK"], t["LOCAL_RANK"], t["WORLD_SIZE"]) for t in told] == [
            ("0", "0", "0", "2"),
            ("1", "1", "0", "2"),
        ]
        assert told[0]["MASTER_PORT"] == told[1]["MASTER_PORT"]
        assert told[0]["GLOO_SOCKET_IFNAME"] == told[1]["NCCL_SOCKET_IFNAME"] != ""

    def test_a_killed_rank_is_the_cause_and_not_the_peer_that_lost_it(self, ssh, spec):
        status = finish(ssh, ssh.start(spec("kill_rank_1")))
        assert (status.state, status.exit_code) == (JobState.FAILED, 75)
        assert (status.failure.rank, status.failure.kind) == (1, "killed")

    @pytest.mark.parametrize("way", ["stop", "kill"])
    def test_stop_and_kill_leave_no_process(self, ssh, spec, way):
        job = spec("wait")
        handle = ssh.start(job)
        deadline = time.monotonic() + 60
        while not all(Path(job.log_dir, f"child_{rank}.json").exists() for rank in (0, 1)):
            assert not ssh.poll(handle).state.is_terminal
            assert time.monotonic() < deadline
            time.sleep(0.05)
        processes = members(job, 2)
        getattr(ssh, way)(handle)
        status = finish(ssh, handle)
        assert (status.state, status.exit_code, status.failure) == (JobState.STOPPED, 130, None)
        assert not any(is_alive(p) for p in processes)

    def test_a_host_that_never_answers_is_told_when_the_limit_has_passed(self, ssh, spec, tmp_path):
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
        python.chmod(0o755)
        nodes = (NodeShare("localhost", 1, ()), NodeShare("localhost", 1, (), str(python)))
        status = finish(ssh, ssh.start(replace(spec("succeed"), nodes=nodes, meeting=Meeting(wait_s=2.0))))
        assert (status.state, status.exit_code, status.failure.kind) == (JobState.FAILED, 75, "node_lost")
        assert "waiting for an answer of localhost: nothing for 2 s" in status.failure.message
        assert "cluster.wait_s" in status.failure.hint


class TestDebug:
    def test_it_runs_here_and_leaves_the_environment_and_folder_as_they_were(self, debug, job):
        environment, folder = dict(os.environ), os.getcwd()
        spec = job("succeed")
        assert run(debug, spec).state is JobState.SUCCEEDED
        assert read(spec, "told_0.json")["pid"] == os.getpid()
        assert dict(os.environ) == environment
        assert os.getcwd() == folder

    def test_an_exception_can_be_examined_where_it_was_raised(self, debug, job, monkeypatch):
        seen = []
        monkeypatch.setattr(pdb, "post_mortem", seen.append)
        spec = job("raise")
        assert run(debug, spec).exit_code == 70
        assert seen == []
        assert run(debug, replace(spec, env={**spec.env, "TUNELAUNCH_PDB": "1"})).exit_code == 70
        assert seen[0].tb_frame.f_code.co_name == "_run"

    def test_ctrl_c_stops_it(self, debug, job):
        status = run(debug, job("interrupt"))
        assert (status.state, status.exit_code, status.failure) == (JobState.STOPPED, 130, None)

    def test_several_processes_are_refused(self, debug, job):
        with pytest.raises(ClusterError, match="runs one process, and 2"):
            debug.start(job("succeed", num_processes=2))
