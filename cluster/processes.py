"""Processes that we start: how they begin, how they are recognised, and how all of them end.

Nothing here searches by program name. A process is ours when it descends from one that we started, or when it carries
the tag that we put into its environment; and a pid counts only together with its start time, because pids are reused.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .job import ClusterError

TAG_VARIABLE = "TUNELAUNCH_JOB"
"""Environment variable that every process of a job inherits; its value is unique to the job."""

_ON_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG = 1
# Loaded before any fork: a forked child must not load libraries.
_LIBC = ctypes.CDLL(None, use_errno=True) if _ON_LINUX else None


@dataclass(frozen=True)
class ProcessIdentity:
    """A pid that cannot be mistaken for a later process with the same number."""

    pid: int
    start_ticks: int
    """Start time in clock ticks since boot; 0 where /proc does not exist."""

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """None when there is no such process."""
        stat = _read_stat(pid)
        return None if stat is None else cls(pid, stat.start_ticks)


@dataclass(frozen=True)
class _Stat:
    state: str
    parent_pid: int
    start_ticks: int


def _read_stat(pid: int) -> _Stat | None:
    """Fields of /proc/PID/stat (proc_pid_stat(5)); the program name in it may hold spaces and brackets."""
    if not _ON_LINUX:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        return _Stat("R", 0, 0)
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return _Stat(fields[0].decode(), int(fields[1]), int(fields[19]))


def is_alive(identity: ProcessIdentity) -> bool:
    """A zombie is dead: it holds no memory, no device and no file."""
    stat = _read_stat(identity.pid)
    return stat is not None and stat.start_ticks == identity.start_ticks and stat.state not in "ZX"


def signal_process(identity: ProcessIdentity, signum: int) -> bool:
    """Sends `signum` to this very process; False when it is gone."""
    if not is_alive(identity):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(identity.pid, signum)
    return True


def signal_group(identity: ProcessIdentity, signum: int) -> bool:
    """Sends `signum` to the process group that this process leads; False when it is gone or leads none."""
    if not is_alive(identity):
        return False
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(identity.pid) == identity.pid:
            os.killpg(identity.pid, signum)
            return True
    return False


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()] if _ON_LINUX else []


def descendants(pid: int) -> tuple[ProcessIdentity, ...]:
    """Living children, grandchildren and so on, across sessions and process groups. Empty where /proc does not exist."""
    children: dict[int, list[ProcessIdentity]] = {}
    for candidate in _all_pids():
        stat = _read_stat(candidate)
        if stat is not None and stat.state not in "ZX":
            children.setdefault(stat.parent_pid, []).append(ProcessIdentity(candidate, stat.start_ticks))
    found: list[ProcessIdentity] = []
    pending = [pid]
    while pending:
        for child in children.get(pending.pop(), []):
            found.append(child)
            pending.append(child.pid)
    return tuple(found)


def tagged(tag: str) -> tuple[ProcessIdentity, ...]:
    """Living processes, other than this one, that were started with TAG_VARIABLE=`tag`; with a tag that begins so, if it ends in "/".

    Finds workers whose parent died before them: they have a new parent, but their environment stays.
    """
    entry = f"{TAG_VARIABLE}={tag}".encode()

    def is_meant(variable: bytes) -> bool:
        return variable == entry or (tag.endswith("/") and variable.startswith(entry))

    found: list[ProcessIdentity] = []
    for pid in _all_pids():
        identity = ProcessIdentity.of(pid)
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or another user's
        if (
            any(map(is_meant, environ.split(b"\0")))
            and identity is not None
            and pid != os.getpid()
            and is_alive(identity)
        ):
            found.append(identity)
    return tuple(found)


def kill_tree(root: ProcessIdentity, tag: str, wait_s: float) -> tuple[ProcessIdentity, ...]:
    """SIGKILL to `root`, its descendants and all processes tagged `tag`, until none is left or `wait_s` seconds passed.

    Returns the survivors (processes that hang inside the kernel). Descendants are collected before their parent is
    killed, because afterwards nothing leads to them; torch.distributed.run gives each worker a session of its own, so
    that killing the agent's process group would miss them.
    """
    deadline = time.monotonic() + wait_s
    seen: set[ProcessIdentity] = {root}
    while True:
        if is_alive(root):
            seen.update(descendants(root.pid))
        seen.update(tagged(tag))
        alive = tuple(member for member in seen if is_alive(member))
        if not alive or time.monotonic() >= deadline:
            return alive
        for member in alive:
            signal_process(member, signal.SIGKILL)
        time.sleep(0.02)


def kill_tagged(tag: str, wait_s: float) -> None:
    """SIGKILL to all processes tagged so (see `tagged`). Raises ClusterError when some are left after `wait_s`."""
    deadline = time.monotonic() + wait_s
    while alive := tagged(tag):
        if time.monotonic() >= deadline:
            pids = ", ".join(str(member.pid) for member in alive)
            raise ClusterError(f"an earlier attempt's processes do not end: pid {pids}", "Restart the host.", 75)
        for member in alive:
            signal_process(member, signal.SIGKILL)
        time.sleep(0.02)


def die_with_parent(signum: int = signal.SIGTERM, parent_pid: int | None = None) -> None:
    """Asks the kernel to send `signum` to the calling process when the thread that created it ends. Linux only.

    The request does not reach back: when `parent_pid` is given and is no longer the parent, the process ends at once.
    """
    if _LIBC is None:
        return
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(128 + signum)


def start_piped(argv: Sequence[str], log_file: str) -> subprocess.Popen[bytes]:
    """Starts `argv` in a session of its own, with pipes as stdin and stdout, and stderr appended to `log_file`.

    It ends when the calling thread does (see `start_process`). Raises ClusterError when it cannot be started.
    """
    try:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        with open(log_file, "ab") as log:
            return subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                preexec_fn=_on_start(outlives_us=False),
            )
    except (OSError, subprocess.SubprocessError) as e:
        raise ClusterError(f"cannot start {argv[0]}: {e}", "Install it, or put it on PATH.") from e


def _on_start(outlives_us: bool) -> Callable[[], None] | None:
    """What the child does between fork and exec: kill -9 of this process must end the job, and no `finally` runs then."""
    if outlives_us or not _ON_LINUX:
        return None
    parent_pid = os.getpid()
    return lambda: die_with_parent(signal.SIGTERM, parent_pid)


def require_folder(cwd: str) -> None:
    """Raises ClusterError when a job's working folder does not exist."""
    if not Path(cwd).is_dir():
        raise ClusterError(
            f"the working folder {cwd} does not exist", "Start the command again from an existing folder."
        )


def start_process(
    argv: Sequence[str], env: Mapping[str, str], cwd: str, log_file: str, outlives_us: bool = False
) -> subprocess.Popen[bytes]:
    """Starts `argv` as leader of a new session, with stdout and stderr in `log_file` and nothing on stdin.

    A session of its own keeps the terminal's Ctrl-C away from it: the launcher decides when it stops. Unless
    `outlives_us`, it receives SIGTERM when the calling THREAD ends, so call this from the main thread or from one that
    lives as long as the job. Raises ClusterError when the folder, the log or the program is not usable.
    """
    require_folder(cwd)
    try:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        log = open(log_file, "wb")  # noqa: SIM115 - closed below, in another try
    except OSError as e:
        raise ClusterError(
            f"cannot write the log {log_file}: {e.strerror}", "Free some space, or give another --run-dir."
        ) from e
    with log:
        try:
            return subprocess.Popen(
                argv,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_on_start(outlives_us),
            )
        except (OSError, subprocess.SubprocessError) as e:
            raise ClusterError(
                f"cannot start {argv[0]}: {e}", "Check that this Python environment is intact: launch doctor", 75
            ) from e
