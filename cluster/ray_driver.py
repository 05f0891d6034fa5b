"""The driver of a job under Ray: `-m cluster.ray_driver JOB_FILE`. It starts or joins Ray, runs the job, and says how it ended.

A job that reports to Ray is a TorchTrainer, any other a plain actor per rank. Exit codes are those of every backend.
Metrics and checkpoints are reported as they lie on disk, so the folder of the job's report is Ray's experiment folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from . import logs, processes, ray_actors, ray_guard, ray_local, ray_placement, ray_worker
from .environment import travelling
from .explain import explain
from .failure import EXIT_BUG, EXIT_RETRY, EXIT_STOPPED, EXIT_USER
from .job import ClusterError, JobReport, JobSpec
from .outcome import job_status, lost_rank
from .ray_nodes import alive_nodes, lost_nodes
from .ray_placement import RayNode
from .ray_report import forget_missing
from .ray_room import BEGIN_S, NodesMissing, no_room, require_begun, show_waiting, wait_for_room

SHARED_DISK_S = 90.0
"""Until a file of another node shows: NFS keeps for up to a minute that there is none."""
_POLL_S = 0.1
_DISCONNECT_S = 3.0
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(ray_worker.GROUP_TIMEOUT_S),
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


def main(argv: list[str]) -> int:
    """Run the job of `argv[0]`. Returns 0, 2, 70, 75 or 130."""
    job = JobSpec.from_dict(json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    stop = threading.Event()

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        # Nothing is raised from here: it would come up inside of Ray's own code, which does not bear it.
        stop.set()
        (Path(job.log_dir) / ray_worker.STOP_FILE).touch()

    signal.signal(signal.SIGTERM, on_sigterm)
    os.environ.update(_SETTINGS)
    try:
        with _ray(job):
            return _run(job, stop)
    except ClusterError as e:
        return _fail(job, -1, _kind(e), e.message, e.hint, e.exit_code)
    finally:
        (Path(job.log_dir) / logs.WAITING).unlink(missing_ok=True)


def _run(job: JobSpec, stop: threading.Event) -> int:
    """Fit in a thread, so that this one hears signals. Returns the exit code."""
    errors: list[Exception] = []
    nodes, begin_by_s = alive_nodes(), math.inf

    def fit() -> None:
        nonlocal nodes, begin_by_s
        try:
            nodes = wait_for_room(job)
            begin_by_s = time.monotonic() + job.meeting.wait_s + BEGIN_S
            threading.Thread(target=show_waiting, args=(job, lambda: _has_started(job)), daemon=True).start()
            if job.report is None:
                ray_actors.run_actors(job, nodes, _config(job))
            else:
                _fit(job, job.report, nodes)
        except (
            Exception
        ) as e:  # the border of the job: Ray ends in many ways; `_ended` says which, and what workers left
            errors.append(e)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    while thread.is_alive() and not stop.is_set():
        thread.join(_POLL_S)
        if time.monotonic() > begin_by_s:
            begin_by_s = math.inf
            require_begun(job)
    if stop.is_set():
        deadline = time.monotonic() + ray_worker.STOP_LOOK_S + ray_worker.GRACEFUL_S + _POLL_S
        while _has_started(job) and len(logs.read_exits(job.log_dir)) < job.num_processes:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        return EXIT_STOPPED
    if errors:
        return _ended(job, errors[0], nodes)
    exits = _all_exits(job)
    return job_status(max(exits.values(), default=0), exits, "", False, job.log_dir).exit_code or 0


def _all_exits(job: JobSpec) -> dict[int, int]:
    """rank -> exit code, of all ranks. Other nodes wrote them, and a shared disk may show that late. Raises ClusterError."""
    deadline = time.monotonic() + SHARED_DISK_S
    while len(exits := logs.read_exits(job.log_dir)) < job.num_processes:
        if time.monotonic() > deadline:
            missing = sorted(set(range(job.num_processes)) - exits.keys())
            raise ClusterError(
                f"how rank {', '.join(map(str, missing))} ended is not known: {job.log_dir} does not show it",
                "Is it the same folder on all nodes? What was saved is whole: launch runs resume RUN",
                EXIT_RETRY,
            )
        time.sleep(_POLL_S)
    return exits


@contextlib.contextmanager
def _ray(job: JobSpec) -> Iterator[None]:
    """Ray, connected: the cluster at the job's address, or one of our own, which ends with this process however it ends."""
    assert job.ray is not None
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "WARNING",
        "runtime_env": runtime_env(job),
    }
    if job.ray.address:
        os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] = (
            "1"  # the run, its workers and their logs on the cluster's dashboard
        )
        _init(f"the Ray cluster at {job.ray.address} cannot be joined", address=job.ray.address, **options)
        try:
            yield
        finally:
            _disconnect()
        return
    guard = ray_guard.start_guard()
    with ray_local.local_folder() as folder:
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update(ray_local.local_env(ray_local.write_token(folder)))
        _init(  # imports ray, which reads them then
            "a Ray of our own does not start",
            address="local",
            num_cpus=job.num_processes * job.ray.cpus_per_process,
            num_gpus=job.num_processes * job.ray.gpus_per_process,
            include_dashboard=False,
            object_store_memory=ray_local.OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
            **options,
        )
        try:
            yield
        finally:
            _disconnect()
    assert guard.stdin is not None
    guard.stdin.close()


def runtime_env(job: JobSpec) -> dict[str, Any]:
    """What Ray starts the job's processes with. Pure.

    By itself Ray closes a connection between two workers on which nothing came for 20 s, and takes the worker behind it for
    lost, while its node is not given up for a minute: a cable that was out for 20 s would end the attempt.
    """
    return {
        # Of the job and not of the workers alone: Ray runs such a hook for whole jobs only.
        "worker_process_setup_hook": "cluster.ray_worker.choose_interface",
        "env_vars": {"RAY_grpc_keepalive_timeout_ms": str(int(job.meeting.silence_s * 1000))},
    }


def _init(problem: str, **options: Any) -> None:
    """ray.init, in a thread: in the main one it takes SIGTERM for itself at once, and ends the process by it. Raises ClusterError.

    The thread stays: processes of a Ray of our own end with the thread that started them.
    """
    errors: list[Exception] = []
    is_done = threading.Event()

    def init() -> None:
        try:
            import ray

            ray.init(**options)
        except Exception as e:  # none is lost: the thread that waits raises it again
            errors.append(e)
        is_done.set()
        threading.Event().wait()

    threading.Thread(target=init, name="ray.init", daemon=True).start()
    is_done.wait()
    if not errors:
        return
    from ray.exceptions import AuthenticationError, RayError

    error = errors[0]
    # Where its own processes do not come up within 30 s, as on a machine that is too busy, Ray raises a bare Exception.
    expected = (ConnectionError, RuntimeError, TimeoutError, RayError)
    if not isinstance(error, expected) and type(error) is not Exception:
        raise error
    raise ClusterError(
        f"{problem}: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
        "Check ray status there, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH here.",
        EXIT_USER if isinstance(error, AuthenticationError) else EXIT_RETRY,
    ) from error


def _disconnect() -> None:
    """ray.shutdown, which waits for a minute where Ray has died. This process ends next, and with it all that is left."""
    import ray

    thread = threading.Thread(target=ray.shutdown, daemon=True)
    thread.start()
    thread.join(_DISCONNECT_S)


def _config(job: JobSpec) -> dict[str, Any]:
    """What a worker has to know."""
    tag = os.environ.get(processes.TAG_VARIABLE, "")
    return {"job": dataclasses.asdict(job), "travelling": travelling(os.environ), "tag": tag}


def _fit(job: JobSpec, report: JobReport, nodes: tuple[RayNode, ...]) -> None:
    """Train until all workers have ended. Raises what Ray raises."""
    import ray
    from pyarrow.fs import LocalFileSystem
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    folder = Path(report.folder)
    # Read by the controller, to which Ray Train passes it on.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(job.meeting.wait_s)
    forget_missing(folder, ray.__version__)
    trainer = TorchTrainer(
        ray_worker.train,
        train_loop_config=_config(job),
        torch_config=_shared_devices(),
        scaling_config=_scaling(job, ray_placement.place(nodes, job)),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            storage_filesystem=LocalFileSystem(),
            # Whether to try again is decided by the launcher, in one place for every backend.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            # Never deletes: the saver of the job keeps as many as the recipe says.
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )
    try:
        trainer.fit()
    finally:
        with contextlib.suppress(OSError):  # a full disk: how it ended counts more
            forget_missing(folder, ray.__version__)


def _shared_devices() -> Any:
    """In a TorchConfig's place: the devices of all workers of a node are visible to each, without a process group of Ray's.

    TorchConfig has the controller and each worker import torch before a worker starts; the watchers make a group of their own.
    """
    from ray.train.backend import Backend, BackendConfig

    class SharingBackend(Backend):
        share_cuda_visible_devices = True

    class SharedDevices(BackendConfig):
        backend = "gloo"  # asked for by TorchTrainer, which would choose one by the device

        @property
        def backend_cls(self) -> type[Backend]:
            return SharingBackend

    return SharedDevices()


def _scaling(job: JobSpec, placement: ray_placement.Placement) -> Any:
    from ray.train import ScalingConfig

    assert job.ray is not None
    return ScalingConfig(
        num_workers=job.num_processes,
        use_gpu=job.ray.gpus_per_process > 0,
        resources_per_worker=ray_placement.resources(job),
        placement_strategy=placement.strategy,
        label_selector=placement.labels or None,
    )


def _has_started(job: JobSpec) -> bool:
    return any(Path(job.log_dir).glob("rank_*.log"))


def _ended(job: JobSpec, error: Exception, nodes: tuple[RayNode, ...]) -> int:
    """Fit has failed. Writes down what no worker could, and returns the exit code of the first cause."""
    if isinstance(error, ClusterError):
        raise error
    traceback.print_exception(error)
    exits = logs.read_exits(job.log_dir)
    _tell_what_ray_knows(job, error, exits, nodes)
    exits = exits if any(exits.values()) else {-1: EXIT_BUG}
    return job_status(EXIT_BUG, exits, "", False, job.log_dir).exit_code or EXIT_BUG


def _tell_what_ray_knows(job: JobSpec, error: Exception, exits: Mapping[int, int], nodes: tuple[RayNode, ...]) -> None:
    """`nodes`: those that lived when the job began."""
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
    from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

    assert job.ray is not None
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(cause, WorkerGroupStartupTimeoutError):
        raise no_room(job)
    if isinstance(error, (WorkerGroupError, ray_actors.RanksFailed)):
        failures = error.worker_failures
        for failure in (e for rank, e in failures.items() if exits.get(rank, 0) == 0):
            base = getattr(failure, "_base_exc", failure)
            if isinstance(base, ClusterError):
                _fail(job, -1, _kind(base), base.message, base.hint, base.exit_code)
                return
        died = {rank for rank, e in failures.items() if isinstance(e, (WorkerHealthCheckFailedError, RayError))}
        is_told = len(exits) == job.num_processes and all(code > 0 for code in exits.values())
        gone = () if is_told else lost_nodes(nodes)
        rank = lost_rank(job.num_processes, failures, died, exits, bool(gone))
        if rank is not None:
            how = f" with the node {', '.join(gone)}" if gone else f": {_why(failures[rank])}"
            message = f"rank {rank} was lost{how}"
            _fail(job, rank, "node_lost" if gone else "retry", message, _LOST_HINT, EXIT_RETRY)
    elif isinstance(error, PreemptionError):
        _fail(job, -1, "preempted", "Ray takes a node of this job away (preemption)", _LOST_HINT, EXIT_RETRY)
    elif not any(exits.values()):
        if gone := ", ".join(lost_nodes(nodes)):
            _fail(job, -1, "node_lost", f"lost with the node {gone}: {cause}", _LOST_HINT, EXIT_RETRY)
            return
        known = explain(str(cause))
        kind, hint = (known.kind, known.hint) if known else ("retry", _LOST_HINT)
        lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        _fail(job, -1, kind, f"Ray ended the job: {lines[-1].strip()}", hint, _EXIT_CODES[kind])


def _kind(error: ClusterError) -> str:
    if isinstance(error, NodesMissing):
        return "node_lost"
    return "user" if error.exit_code == EXIT_USER else "retry"


_EXIT_CODES = {"user": EXIT_USER, "retry": EXIT_RETRY, "bug": EXIT_BUG}
_LOST_HINT = "Its node may be down, or Ray on it: ray status. What was saved is whole: launch runs resume RUN"


def _why(failure: Exception) -> str:
    """The end of Ray's report on a dead actor, after what it was."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return (lines or [type(failure).__name__])[-1][:300]


def _fail(job: JobSpec, rank: int, kind: str, message: str, hint: str, exit_code: int) -> int:
    print(f"{message}\n{hint}", flush=True)
    logs.write_agent_failure(job.log_dir, rank, kind, message, hint, exit_code)
    return exit_code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of Ray must not hold back the result. Processes of a Ray of our own end with this one.
    os._exit(code)
