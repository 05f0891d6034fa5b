"""What a backend is asked to run, and what it answers. Standard library only."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol


class ClusterError(Exception):
    """A machine, device or process problem that the user can fix (`exit_code` 2) or retry (75)."""

    def __init__(self, message: str, hint: str = "", exit_code: int = 2) -> None:
        super().__init__(message, hint, exit_code)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class JobState(enum.Enum):
    PENDING = "pending"
    """Asked for, no process yet."""
    RUNNING = "running"
    UNKNOWN = "unknown"
    """It cannot be asked at the moment. It may well run: never taken for an end, and nothing is started beside it."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    """Ended because we asked for it (exit code 130)."""

    @property
    def is_terminal(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED)


@dataclass(frozen=True)
class NodeShare:
    """One host's part of a job that spans several."""

    host: str
    """As the backend knows it: an ssh destination, or the address of a Ray node ("" where Ray is to choose)."""
    num_processes: int
    devices: tuple[str, ...]
    """Device UUIDs of this host, one per process in rank order; empty on CPU, and where Ray is to choose."""
    python: str = ""
    """Its Python; "": the same path as here."""


@dataclass(frozen=True)
class Meeting:
    """How the hosts of a job come together, and when one of them counts as lost."""

    port: int = 0
    """TCP port of the first host at which the ranks meet; 0 takes a free one."""
    wait_s: float = 120.0
    """How long they may take to come together."""
    silence_s: float = 60.0
    """A host that is not heard for this long is lost, and ends its own processes."""


@dataclass(frozen=True)
class JobReport:
    """Where a job writes how far it is, for a backend that has a page of its own for that (Ray's dashboard)."""

    folder: str
    """Absolute; metrics and checkpoints lie below it."""
    metrics: str
    """JSON lines, one row a step, appended."""
    checkpoints: str
    """Folder of checkpoints, each a folder."""
    manifest: str
    """Name of the file that makes such a folder a whole checkpoint."""


@dataclass(frozen=True)
class RayRequest:
    """What a job asks of Ray."""

    address: str
    """Of the running cluster that it joins (host:port); "": it starts one of its own on this host."""
    cpus_per_process: int
    gpus_per_process: int
    """1, or 0 on CPU."""


@dataclass(frozen=True)
class JobSpec:
    """One stage of a run, as processes. Frozen: a retry is a new job."""

    name: str
    """Stage name: prepare, train, consolidate, merge, evaluate."""
    entrypoint: str
    """Module that is started with -m in every process, by name: "trainer.worker"."""
    args: tuple[str, ...]
    num_processes: int
    devices: tuple[str, ...]
    """Device UUIDs made visible to the job, one per process in rank order; empty on CPU."""
    env: dict[str, str]
    """Variables that we set for the job, on top of the inherited environment; shown in the plan."""
    log_dir: str
    """Absolute folder that receives rank_N.log, agent.log and failure_rank_N.json (see `Failure`)."""
    cwd: str
    run_id: str
    nodes: tuple[NodeShare, ...] = ()
    """The hosts that carry it, in rank order; empty: this host alone. `num_processes` and `devices` are over all of them."""
    meeting: Meeting = Meeting()
    report: JobReport | None = None
    ray: RayRequest | None = None
    """None under every other backend."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> JobSpec:
        """Inverse of dataclasses.asdict, also after a JSON round trip. Keys that are no fields are left out."""
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        nodes = tuple(NodeShare(**{**node, "devices": tuple(node["devices"])}) for node in values.get("nodes", ()))
        report, ray = values.get("report"), values.get("ray")
        values |= {"args": tuple(values["args"]), "devices": tuple(values["devices"]), "nodes": nodes}
        values |= {"report": JobReport(**report) if report else None, "ray": RayRequest(**ray) if ray else None}
        values |= {"meeting": Meeting(**values["meeting"])} if "meeting" in values else {}
        return cls(**values)


@dataclass(frozen=True)
class Failure:
    """Why a rank ended. A failing worker writes these keys (and `traceback`, `time_ns`) as failure_rank_N.json."""

    rank: int
    """-1 when no rank could be blamed (the agent itself failed)."""
    kind: str
    """user | bug | retry, as a worker says it; killed (by a signal) | preempted (by a SIGTERM that nobody here sent) |
    node_lost (its host went away), as the backend sees it; hang, as the launcher does. What follows from it: retry.py."""
    message: str
    hint: str
    traceback: str
    exit_code: int
    """2 user, 70 bug, 75 retry may help."""
    log_file: str
    """Absolute path of that rank's whole log."""
    noticed_s: float | None = None
    """Seconds from the last sign of life until it was noticed; None where nobody knows."""


@dataclass(frozen=True)
class JobStatus:
    state: JobState
    exit_code: int | None
    """0, 2, 70, 75 or 130 once terminal; the same codes for every backend."""
    failure: Failure | None
    """The first cause, once FAILED."""


class JobHandle(Protocol):
    """A started job. Which processes it is made of is the backend's own matter."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids that we created (the agent, or the single worker); empty when run in this process."""
        ...


class Backend(Protocol):
    """A place to run jobs. One file, one row in the registry, and the shared contract test class."""

    name: str

    def command(self, job: JobSpec) -> tuple[str, ...]:
        """The exact argv that `start` will use. Pure."""
        ...

    def start(self, job: JobSpec) -> JobHandle:
        """Start the processes and return at once. Raises ClusterError when they cannot be started."""
        ...

    def poll(self, handle: JobHandle) -> JobStatus:
        """Never blocks."""
        ...

    def stop(self, handle: JobHandle) -> None:
        """Ask politely (SIGTERM to the process groups that we created). Returns at once."""
        ...

    def kill(self, handle: JobHandle, wait_s: float = 10.0) -> None:
        """SIGKILL every process of the job; returns when none is left. Raises ClusterError after `wait_s`.

        Nothing else is started when it raises: a process that may still live would write into the same folder.
        """
        ...
