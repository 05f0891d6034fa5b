"""What runs in each worker of Ray: it starts the very process that torchrun would, watches it, and tells Ray how far it is.

The process is a child of the thread in which Ray runs `train` or `RankActor.run`, and dies with it: with the actor, the node, or the job.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import logs, processes
from .environment import job_env
from .failure import EXIT_RETRY, EXIT_STOPPED
from .job import ClusterError, JobSpec
from .processes import ProcessIdentity
from .ray_report import Reporter

STOP_FILE = "stop_workers"
"""In the log folder, which all nodes see: workers that find it end politely. It needs nothing of Ray, which may be what fails."""
GRACEFUL_S = 5.0
"""From SIGTERM to SIGKILL; with what Ray needs to end, nothing outlives a killed launcher by more than 10 s."""
WATCH_S = 0.1
STOP_LOOK_S = 0.5
"""How often each rank asks the shared disk for the stop file."""
REPORT_S = 1.0
GROUP_TIMEOUT_S = 600
"""Limit of each step that the watchers of all ranks take together; they take one a second."""
SETTLE_S = 1.0
"""A failed rank waits this long before Ray hears of it: Ray then ends all others, and they may hold the first cause."""
_SIOCGIFADDR = 0x8915


class WorkerEnded(Exception):
    """The process of a rank ended with an error; what it was stands in the log folder."""


def train(config: dict[str, Any]) -> None:
    """The train function: one worker process from its start to its end. Raises WorkerEnded or ClusterError when it fails.

    `config`: the job as a dictionary, the environment that travels, and the tag of the job's processes.
    Collective: every rank of the job runs it.
    """
    from ray.train import get_context

    job, context = JobSpec.from_dict(config["job"]), get_context()
    rank = context.get_world_rank()
    address, port, port_of_watchers = _meeting_point(context.get_local_world_size() == context.get_world_size())
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": context.get_local_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    env = worker_env(job, os.environ, config["travelling"], {name: str(value) for name, value in ranks.items()})
    watcher = Watcher(job, rank, _start(job, rank, {**env, processes.TAG_VARIABLE: config["tag"]}))
    watcher.start()
    _join_watchers(f"tcp://{address}:{port_of_watchers}", rank, context.get_world_size())
    _follow(job, rank, context.get_world_size(), watcher)


class RankActor:
    """One rank of a job that reports nothing (see `ray_actors`)."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.job, self.config = JobSpec.from_dict(config["job"]), config

    def place(self) -> dict[str, Any]:
        """Where it is, as the fields of `ray_actors.Place`. Raises ClusterError when Ray gave it no GPU."""
        import ray
        from ray.util import get_node_ip_address

        context = ray.get_runtime_context()
        devices = context.get_accelerator_ids().get("GPU", [])
        if self.job.ray is not None and self.job.ray.gpus_per_process and not devices:
            raise ClusterError(
                f"Ray names no GPU for this process on {socket.gethostname()}", "Check ray status.", EXIT_RETRY
            )
        address, (port,) = get_node_ip_address(), _free_ports("", 1)
        return {"node_id": context.get_node_id(), "address": address, "port": port, "devices": tuple(devices)}

    def run(self, ranks: dict[str, str], devices: tuple[str, ...]) -> None:
        """Its worker process from start to end. Raises WorkerEnded or ClusterError when it fails."""
        # On nodes where Ray was told to leave CUDA_VISIBLE_DEVICES alone too.
        inherited = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(devices)}
        env = worker_env(self.job, inherited, self.config["travelling"], ranks)
        rank = int(ranks["RANK"])
        watcher = Watcher(self.job, rank, _start(self.job, rank, {**env, processes.TAG_VARIABLE: self.config["tag"]}))
        watcher.run()
        if watcher.code not in (0, EXIT_STOPPED):
            time.sleep(SETTLE_S if self.job.num_processes > 1 else 0)
            raise WorkerEnded(f"rank {rank} ended with exit code {watcher.code}")


def worker_env(
    job: JobSpec, inherited: Mapping[str, str], travelling: Mapping[str, str], ranks: Mapping[str, str]
) -> dict[str, str]:
    """The environment of the worker process: as under torchrun, without anything of Ray's, its token least of all. Pure."""
    assert job.ray is not None
    of_ray = ("RAY_", "ACCELERATE_TORCH_DEVICE")
    env = job_env(job, {**{k: v for k, v in inherited.items() if not k.startswith(of_ray)}, **travelling})
    if job.num_processes > 1:
        env |= ranks
    if job.ray.gpus_per_process and not job.devices:
        # Ray Train makes the devices of all workers on this node visible to each (share_cuda_visible_devices):
        # LOCAL_RANK counts among them. Ray numbers devices as NVML does, in PCI bus order.
        env |= {"CUDA_VISIBLE_DEVICES": inherited["CUDA_VISIBLE_DEVICES"], "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        env.pop("DS_ACCELERATOR", None)
    return env


def choose_interface() -> None:
    """Set-up hook of each Ray worker process: gloo uses the interface by which Ray's nodes know this one.

    By itself gloo looks the host's name up, which on many hosts means 127.0.0.1.
    """
    from ray.util import get_node_ip_address

    name = interface_of(get_node_ip_address())
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str:
    """The name of the network interface that has this IPv4 address; "" when none has. Linux."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without address
                if _address(s, name) == address:
                    return name
    return ""


def _address(s: socket.socket, interface: str) -> str:
    """netdevice(7): SIOCGIFADDR fills a struct ifreq, 16 bytes name, then a sockaddr_in."""
    import fcntl

    reply = fcntl.ioctl(s.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(reply[20:24])


def _meeting_point(is_one_node: bool) -> list[str]:
    """[address, port, port]: where the ranks meet, and those who watch them; free ports of rank 0's node. Collective."""
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero
    from ray.util import get_node_ip_address

    told: list[str] = []
    if get_context().get_world_rank() == 0:
        address = "127.0.0.1" if is_one_node else get_node_ip_address()
        told = [address, *map(str, _free_ports(address, 2))]
    return broadcast_from_rank_zero(told)


def _free_ports(address: str, count: int) -> list[int]:
    """Different TCP ports of this host that nothing listens on at this moment. `address` "": on all of its addresses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind((address, 0))
        return [s.getsockname()[1] for s in sockets]


def _start(job: JobSpec, rank: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    if not Path(job.cwd).is_dir():
        raise ClusterError(
            f"rank {rank}: the run folder {job.cwd} does not exist on {socket.gethostname()}",
            "A run on several nodes needs a folder that all of them see under the same path: --run-dir, or run.dir.",
        )
    argv = (sys.executable, "-P", "-m", job.entrypoint, *job.args)
    return processes.start_process(argv, env, job.cwd, str(logs.rank_log(job.log_dir, rank)))


class Watcher(threading.Thread):
    """Waits for the worker process, ends it when the job is to stop, and writes down how it ended. Never calls Ray."""

    def __init__(self, job: JobSpec, rank: int, process: subprocess.Popen[bytes]) -> None:
        super().__init__(name="worker watcher", daemon=True)
        self.job, self.rank, self.process = job, rank, process
        self.code: int | None = None
        """Its exit code (negative: by a signal), once it has ended and that is written down."""

    def run(self) -> None:
        stop = Path(self.job.log_dir) / STOP_FILE
        asked_at = next_look = 0.0
        while (code := self.process.poll()) is None:
            now = time.monotonic()
            if asked_at and now - asked_at > GRACEFUL_S:
                self._signal(signal.SIGKILL)
            elif not asked_at and now >= next_look:
                next_look = now + STOP_LOOK_S
                if stop.exists():
                    asked_at = now
                    self._signal(signal.SIGTERM)
            time.sleep(WATCH_S)
        try:
            logs.write_exit(self.job.log_dir, self.rank, code)
        finally:  # a full disk: the ranks must not wait for each other for ever
            self.code = code

    def _signal(self, signum: int) -> None:
        identity = ProcessIdentity.of(self.process.pid)
        if identity is not None:
            processes.signal_group(identity, signum)


def _join_watchers(address: str, rank: int, num_ranks: int) -> None:
    """A gloo group of all watchers. Collective. While the worker process starts: Ray Train's own would come before it, and need torch too."""
    import torch.distributed as dist

    limit = timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=num_ranks, timeout=limit)


def _follow(job: JobSpec, rank: int, num_ranks: int, watcher: Watcher) -> None:
    """Until the processes of all ranks have ended well. Collective, in step: Ray wants the same reports of all workers."""
    import ray.train
    import torch
    import torch.distributed as dist
    from pyarrow.fs import LocalFileSystem
    from ray.train import Checkpoint
    from ray.train.v2.api.report_config import CheckpointUploadMode

    reporter = Reporter(job.report) if job.report is not None and rank == 0 else None
    while True:
        watcher.join(REPORT_S)
        if watcher.code not in (None, 0, EXIT_STOPPED):
            time.sleep(SETTLE_S)
            raise WorkerEnded(f"rank {rank} ended with exit code {watcher.code}")
        news = reporter.news() if reporter else None
        counts = torch.tensor([watcher.code is not None, news is not None], dtype=torch.int64)
        dist.all_reduce(counts)
        if counts[1]:
            metrics, path = news or ({}, None)
            checkpoint = Checkpoint(str(path), LocalFileSystem()) if path else None
            # Where it lies is where Ray wants it (see `ray_driver`): a pointer, and no copy.
            ray.train.report(metrics, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
        if counts[0] == num_ranks:
            return
