"""Waiting until a job has room in a Ray cluster: in finite time, and saying what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from . import logs, ray_placement
from .failure import EXIT_RETRY
from .job import ClusterError, JobSpec
from .ray_nodes import alive_nodes
from .ray_placement import RayNode

BEGIN_S = 180.0
"""Ray and Ray Train may take this long beside `meeting.wait_s`, from a cluster that is large enough to the last process."""
WAIT_LINE_S = 5.0
_LOOK_S = 1.0


class NodesMissing(ClusterError):
    """The cluster was large enough when the run was planned; a node has gone since, and may come back."""


def wait_for_room(job: JobSpec) -> tuple[RayNode, ...]:
    """The nodes, once they are enough for the job. Raises NodesMissing or ClusterError after `meeting.wait_s`.

    Whether they have room now is left to Ray's own queue, except where the job's processes are to be pinned to nodes.
    """
    began = time.monotonic()
    tell = _Waiting(job)
    try:
        while True:
            nodes, waited_s = alive_nodes(), time.monotonic() - began
            fits = ray_placement.choose_nodes(nodes, job, free=False) is not None
            placement = ray_placement.place(nodes, job)
            if fits and (placement.strategy != "PACK" or placement.node_ids):
                return nodes
            if waited_s > job.meeting.wait_s:
                raise no_room(job) if fits else NodesMissing(*no_room(job).args)
            tell(nodes, waited_s)
            time.sleep(_LOOK_S)
    finally:
        tell.end()


class _Waiting:
    """Says what is missing, in agent.log now and then, and for the terminal in a file as long as it is so."""

    def __init__(self, job: JobSpec) -> None:
        self.job, self.path, self.next_line_s = job, Path(job.log_dir) / logs.WAITING, 0.0

    def __call__(self, nodes: tuple[RayNode, ...], waited_s: float) -> None:
        job = self.job
        text = f"waiting for {waited_s:.0f} of {job.meeting.wait_s:g} s: {ray_placement.shortage(nodes, job)}"
        self.path.write_text(text + "\n", encoding="utf-8")
        if waited_s >= self.next_line_s:
            print(text, flush=True)
            self.next_line_s = waited_s + WAIT_LINE_S

    def end(self) -> None:
        self.path.unlink(missing_ok=True)


def no_room(job: JobSpec) -> ClusterError:
    """What was wanted, what there is, what is missing, for how long it was waited for."""
    text = f"{ray_placement.shortage(alive_nodes(), job)} for {job.meeting.wait_s:g} s"
    return ClusterError(text, "Wait until others end, ask for less, or raise cluster.wait_s.", EXIT_RETRY)


def show_waiting(job: JobSpec, has_started: Callable[[], bool]) -> None:
    """While no worker has started and the cluster has no room: says what is missing."""
    tell, began = _Waiting(job), time.monotonic()
    try:
        while not has_started():
            waited_s = time.monotonic() - began
            nodes = alive_nodes()
            if _is_pending(job) and ray_placement.choose_nodes(nodes, job, free=True) is None:
                tell(nodes, waited_s)
            time.sleep(_LOOK_S)
    finally:
        tell.end()


def _is_pending(job: JobSpec) -> bool:
    """Whether a group of places like this job's is asked for and not given: then what is free does not count its own."""
    from ray.util import placement_group_table

    groups = placement_group_table().values()
    return any(g["state"] in ("PENDING", "RESCHEDULING") and len(g["bundles"]) == job.num_processes for g in groups)


def require_begun(job: JobSpec) -> None:
    """To be asked `meeting.wait_s` + BEGIN_S after `wait_for_room`. Raises ClusterError naming the ranks that have not begun."""
    missing = [rank for rank in range(job.num_processes) if not logs.rank_log(job.log_dir, rank).exists()]
    if missing:
        raise ClusterError(
            f"rank {', '.join(map(str, missing))} has not begun {job.meeting.wait_s + BEGIN_S:g} s after the Ray cluster "
            "was found large enough, and Ray does not say why",
            "See ray status, and Ray's own logs on that node (/tmp/ray/session_latest/logs). cluster.wait_s raises the limit.",
            EXIT_RETRY,
        )
