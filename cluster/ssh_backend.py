"""Jobs over several hosts by plain ssh: one agent on each, under it torch.distributed.run, all tied to this process.

Coming together, in the order of `_Step`: every host answers; the first one opens a port, and the others try its addresses;
then each starts its share, with the address that all of them reached. A host whose link is cut, or that stays silent, ends
its own processes, and so nothing outlives the launcher anywhere.
"""

from __future__ import annotations

import enum
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import logs
from .environment import SINGLE_RANK, travelling
from .failure import EXIT_RETRY, is_secondary
from .job import ClusterError, Failure, JobHandle, JobSpec, JobState, JobStatus, NodeShare
from .node_agent import BEAT_S, POLITE_S
from .node_link import RAISE_HINT, NodeLink, close_all, log_of, node_log
from .torchrun_backend import AGENT_LOG_LINES, ended_status, worker_command

_RECONNECT_S = 2.0
_REACH_S = 5.0
_GRACE_S = 6.0
"""When one host's share has failed, the others may take this long to fail of it themselves, and say so in their logs."""
_LEASE_MARGIN_S = 5.0
"""A host is lost only when its agent has surely ended its processes: it stops hearing us when we stop hearing it."""
_SILENT_BEATS = 3
_END_S = POLITE_S + 10.0


class _Step(enum.Enum):
    CONNECT = "waiting for an answer of"
    LISTEN = "opening a port on"
    REACH = "trying to reach the first host from"
    START = "starting the processes on"
    RUN = "running"
    END = "ending the processes on"


@dataclass
class SshHandle:
    """A job, one link a host in the order of `job.nodes`, and how far it has come."""

    job: JobSpec
    links: list[NodeLink]
    step: _Step = _Step.CONNECT
    step_began_s: float = field(default_factory=time.monotonic)
    asked: list[int] = field(default_factory=list)
    """Numbers of the requests that this step waits for, one a link."""
    closed_s: dict[int, float] = field(default_factory=dict)
    """Link -> time.monotonic() at which a failed attempt to connect was seen."""
    port: int = 0
    offered: dict[str, str] = field(default_factory=dict)
    """Addresses of the first host -> its interface."""
    address: str = ""
    interfaces: list[str] = field(default_factory=list)
    """Of each host, on the way to the first."""
    failed_s: float | None = None
    cause: Failure | None = None
    """Of something that no worker could write down."""
    stop_requested: bool = False
    status: JobStatus | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        """The ssh clients."""
        return tuple(link.process.pid for link in self.links)

    def enter(self, step: _Step) -> None:
        self.step, self.step_began_s = step, time.monotonic()

    @property
    def in_step_s(self) -> float:
        return time.monotonic() - self.step_began_s


class SshBackend:
    """Processes on hosts that an OpenSSH client reaches without a password. They end when this process ends."""

    name = "ssh"

    def command(self, job: JobSpec) -> tuple[str, ...]:
        """The argv of the first host's share; address and port are found when the hosts have come together."""
        return share_command(job, 0, "ADDRESS", job.meeting.port)

    def start(self, job: JobSpec) -> SshHandle:
        """Starts to connect and returns at once: PENDING until all hosts have started their share."""
        logs.remove_failures(job.log_dir)
        return SshHandle(job, [_link(job, number) for number in range(len(job.nodes))])

    def poll(self, handle: JobHandle) -> JobStatus:
        """Never blocks. The job is over when every host has said so, or is lost."""
        assert isinstance(handle, SshHandle)
        if handle.status is not None:
            return handle.status
        for link in handle.links:
            link.pump()
        try:
            _STEPS[handle.step](handle)
        except ClusterError as e:
            _fail(handle, e)
        if handle.status is not None:
            for link in handle.links:
                link.hang_up()
            return handle.status
        return JobStatus(_unfinished_state(handle), None, None)

    def stop(self, handle: JobHandle) -> None:
        """SIGTERM to each host's share, once; returns at once."""
        assert isinstance(handle, SshHandle)
        if not handle.stop_requested and handle.status is None:
            handle.stop_requested = True
            _end_all(handle)

    def kill(self, handle: JobHandle, wait_s: float = 10.0) -> None:
        """SIGKILL on every host that can be reached, and hang up, upon which each ends what is left.

        Does not raise for a host that cannot be reached: its agent ends its share when it has heard nothing for
        `meeting.silence_s`, and ends what may be left before it starts another attempt's.
        """
        assert isinstance(handle, SshHandle)
        if handle.status is not None:
            close_all(handle.links)
            return
        handle.stop_requested = True
        waiting = [link for link in handle.links if link.is_up and not link.is_closed]
        numbers = [link.ask("kill") for link in waiting]
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and any(
            link.answers.get(number) is None and not link.is_closed
            for link, number in zip(waiting, numbers, strict=True)
        ):
            for link in waiting:
                link.pump()
            time.sleep(0.02)
        close_all(handle.links)
        handle.status = JobStatus(JobState.STOPPED, 130, None)


def _unfinished_state(handle: SshHandle) -> JobState:
    if handle.step not in (_Step.RUN, _Step.END):
        return JobState.PENDING
    return JobState.UNKNOWN if any(_is_silent(link) for link in _living(handle)) else JobState.RUNNING


def share_command(job: JobSpec, number: int, address: str, port: int) -> tuple[str, ...]:
    """The exact argv of host `number`. Pure.

    The static rendezvous: ranks are numbered in the order of the hosts, and the first one holds the store. With c10d they
    would be sorted by address, and which host holds the store would be a guess (pytorch/pytorch, dynamic_rendezvous.py).
    """
    node = job.nodes[number]
    meeting = ("--standalone", "--local-addr=127.0.0.1")
    if len(job.nodes) > 1:
        meeting = (
            f"--nnodes={len(job.nodes)}",
            f"--node-rank={number}",
            "--rdzv-backend=static",
            f"--master-addr={address}",
            f"--master-port={port}",
            f"--rdzv-id={job.run_id}",
            f"--rdzv-conf=timeout={job.meeting.wait_s:g}",
        )
    return worker_command(job, node.python or sys.executable, node.num_processes, meeting)


def share_env(job: JobSpec, interface: str) -> dict[str, str]:
    """What a host's processes are told on top of that host's own environment."""
    env = {**travelling(os.environ), **job.env}
    if interface:
        # Both would guess by the host's name or take the first interface that is up.
        env = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, **env}
    return env | SINGLE_RANK if job.num_processes == 1 else env


def _link(job: JobSpec, number: int) -> NodeLink:
    node = job.nodes[number]
    return NodeLink(node.host, node.python, log_of(job.log_dir, number), job.meeting.silence_s)


def _connect(handle: SshHandle) -> None:
    """Until every host answers. One that is just starting again is tried until `meeting.wait_s` has passed."""
    for number, link in enumerate(handle.links):
        if link.is_up or not link.is_closed:
            continue
        trouble = link.trouble()
        if trouble.exit_code != EXIT_RETRY or handle.in_step_s > handle.job.meeting.wait_s:
            raise trouble
        seen_s = handle.closed_s.setdefault(number, time.monotonic())
        if time.monotonic() - seen_s >= _RECONNECT_S:
            del handle.closed_s[number]
            link.close()  # at once: its client has ended
            handle.links[number] = _link(handle.job, number)
    _require_in_time(handle, [link for link in handle.links if not link.is_up])
    if all(link.is_up for link in handle.links):
        if len(handle.links) == 1:
            handle.interfaces = [""]
            _start_shares(handle)
            return
        handle.asked = [handle.links[0].ask("listen", port=handle.job.meeting.port)]
        handle.enter(_Step.LISTEN)


def _listen(handle: SshHandle) -> None:
    answer = _answers(handle, handle.links[:1])
    if answer is None:
        return
    handle.port = answer[0]["port"]
    handle.interfaces = [""] * len(handle.links)
    handle.offered = {address: interface for interface, address in answer[0]["addresses"]}
    handle.asked = [
        link.ask("reach", addresses=list(handle.offered), port=handle.port, wait_s=_REACH_S)
        for link in handle.links[1:]
    ]
    handle.enter(_Step.REACH)


def _reach(handle: SshHandle) -> None:
    answers = _answers(handle, handle.links[1:])
    if answers is None:
        return
    address = next((a for a in handle.offered if all(a in reached for reached in answers)), None)
    if address is None:
        rows = [
            f"  {link.host} reaches: {', '.join(r) or 'none'}"
            for link, r in zip(handle.links[1:], answers, strict=True)
        ]
        raise ClusterError(
            f"no address of {handle.links[0].host} is reached by all other hosts at port {handle.port} "
            f"(tried {', '.join(handle.offered)})\n" + "\n".join(rows),
            "A firewall or a separate network is between them. Open the port and set cluster.port to it, or use other hosts.",
        )
    handle.address = address
    handle.interfaces = [handle.offered[address], *(reached[address] for reached in answers)]
    _start_shares(handle)


def _start_shares(handle: SshHandle) -> None:
    job = handle.job
    handle.asked = [
        link.ask(
            "start",
            argv=list(share_command(job, number, handle.address, handle.port)),
            env=share_env(job, handle.interfaces[number]),
            devices=list(node.devices),
            cwd=job.cwd,
            log_file=node_log(job.log_dir, number),
            tag=f"{job.run_id}/node_{number}",
        )
        for number, (link, node) in enumerate(zip(handle.links, job.nodes, strict=True))
    ]
    handle.enter(_Step.START)


def _started(handle: SshHandle) -> None:
    if _answers(handle, handle.links) is not None:
        handle.enter(_Step.RUN)


def _run(handle: SshHandle) -> None:
    """Until every share has ended, or one has failed and the others had their time to notice."""
    for link, node in zip(handle.links, handle.job.nodes, strict=True):
        if link.ended is None and (lost := _lost(handle, link, node)) is not None:
            handle.cause = handle.cause or lost
            handle.failed_s = handle.failed_s or time.monotonic()
    if all(link.ended == 0 for link in handle.links):
        handle.status = JobStatus(JobState.SUCCEEDED, 0, None)
        return
    if handle.failed_s is None and any(link.ended for link in handle.links):
        handle.failed_s = time.monotonic()
    if handle.failed_s is None or _may_still_be_lost(handle):
        return
    if time.monotonic() - handle.failed_s > _GRACE_S or not _living(handle):
        _end_all(handle)


def _lost(handle: SshHandle, link: NodeLink, node: NodeShare) -> Failure | None:
    """Why the host counts as lost; None while it does not."""
    log_file = node_log(handle.job.log_dir, handle.links.index(link))
    if link.is_closed:
        trouble = link.trouble()
        message, hint = f"the link to {trouble.message}", trouble.hint
    elif link.silent_s > handle.job.meeting.silence_s + _LEASE_MARGIN_S:
        message = f"host {node.host} has not been heard for {link.silent_s:.0f} s"
        hint = "Is it up, and the network to it? cluster.silence_s sets how long a host may be silent."
    else:
        return None
    return Failure(-1, "node_lost", message, hint, "", EXIT_RETRY, log_file)


def _may_still_be_lost(handle: SshHandle) -> bool:
    """Others only say that they lost a peer, and a host is silent: whether it is lost will be known soon."""
    if handle.cause is not None or not any(map(_is_silent, _living(handle))):
        return False
    return all(is_secondary(str(f.get("message", ""))) for f in logs.read_failures(handle.job.log_dir))


def _living(handle: SshHandle) -> list[NodeLink]:
    """Links to hosts that have not ended their share, and that can still be told something."""
    return [link for link in handle.links if link.is_up and link.ended is None and not link.is_closed]


def _is_silent(link: NodeLink) -> bool:
    """It should have been heard by now; nobody can say how its share is."""
    return link.silent_s > _SILENT_BEATS * BEAT_S


def _end_all(handle: SshHandle) -> None:
    if handle.step is not _Step.END:
        for link in _living(handle):
            link.ask("stop")
        handle.enter(_Step.END)


def _end(handle: SshHandle) -> None:
    """Until every share has ended, or has had the time for it: what cannot be told ends itself when the link closes."""
    if handle.in_step_s < _END_S and not all(map(_is_silent, _living(handle))):
        return
    handle.status = _ended(handle)


def _ended(handle: SshHandle) -> JobStatus:
    job = handle.job
    told = [f for f in logs.read_failures(job.log_dir) if not is_secondary(str(f.get("message", "")))]
    if handle.cause is not None and not told and not handle.stop_requested:
        return JobStatus(JobState.FAILED, handle.cause.exit_code, handle.cause)
    agent_logs = [logs.tail(Path(node_log(job.log_dir, n)), AGENT_LOG_LINES) for n in range(len(handle.links))]
    # The share that failed first is read first: its report begins with its own first failure.
    order = sorted(range(len(handle.links)), key=lambda n: handle.links[n].ended_s or time.monotonic())
    code = next((handle.links[n].ended for n in order if handle.links[n].ended), 70) or 70
    return ended_status(job, code, "\n".join(agent_logs[n] for n in order), handle.stop_requested)


def _fail(handle: SshHandle, error: ClusterError) -> None:
    """The hosts did not come together: end what has begun, and say why."""
    kind = "retry" if error.exit_code == EXIT_RETRY else "user"
    if kind == "retry" and handle.step is _Step.CONNECT:
        kind = "node_lost"  # it may still be starting again, and that is the same failure at the same step each time
    log_file = log_of(handle.job.log_dir, 0)
    handle.cause = Failure(-1, kind, error.message, error.hint, "", error.exit_code, log_file)
    if handle.step is _Step.START:
        _end_all(handle)  # some hosts may have started their share
    else:
        handle.status = JobStatus(JobState.FAILED, error.exit_code, handle.cause)


def _answers(handle: SshHandle, links: list[NodeLink]) -> list[Any] | None:
    """The answers that this step waits for; None until all are there. Raises ClusterError for a host that fails or is late."""
    found = [link.answer(number) for link, number in zip(links, handle.asked, strict=True)]
    missing = [link for link, answer in zip(links, found, strict=True) if answer is None]
    for link in missing:
        if link.is_closed:
            raise link.trouble()
    _require_in_time(handle, missing)
    return None if missing else [answer[0] for answer in found if answer is not None]


def _require_in_time(handle: SshHandle, missing: list[NodeLink]) -> None:
    wait_s = handle.job.meeting.wait_s
    if missing and handle.in_step_s > wait_s:
        names = ", ".join(link.host for link in missing)
        raise ClusterError(f"{handle.step.value} {names}: nothing for {wait_s:g} s", RAISE_HINT, EXIT_RETRY)


_STEPS = {
    _Step.CONNECT: _connect,
    _Step.LISTEN: _listen,
    _Step.REACH: _reach,
    _Step.START: _started,
    _Step.RUN: _run,
    _Step.END: _end,
}
