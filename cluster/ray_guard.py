"""Outlives the driver of a Ray of our own by a moment and ends what that leaves behind: `-m cluster.ray_guard DRIVER_PID`.

When a driver is killed, the kernel ends the processes that it started, but not theirs: agents of Ray then wait for more
than a minute for a control store that has gone. They carry no tag (they write their title over their environment), and
nobody is their parent any more, so they have to be remembered while the driver lives.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

from . import processes, ray_local
from .processes import ProcessIdentity

_LOOK_S = 0.5
_KILL_S = 10.0


def start_guard() -> subprocess.Popen[bytes]:
    """From here on, everything that comes from this process ends when this process does, however that happens.

    Keep what is returned: its end of the pipe is closed with it.
    """
    argv = (sys.executable, "-P", "-m", "cluster.ray_guard", str(os.getpid()))
    # Its standard input is a pipe of which only this process has the other end: it is at its end when this process is.
    return subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)


def main(argv: list[str]) -> int:
    """Watch until standard input ends, then kill what the driver left, and remove its folder."""
    driver, seen = int(argv[0]), set[ProcessIdentity]()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while not select.select([0], [], [], _LOOK_S)[0]:
        seen.update(processes.descendants(driver))
    tag, deadline = os.environ.get(processes.TAG_VARIABLE, ""), time.monotonic() + _KILL_S
    while time.monotonic() < deadline:
        left = {*(p for p in seen if processes.is_alive(p)), *(processes.tagged(tag) if tag else ())}
        # The driver may have closed the pipe to say that all is well, and be about to end by itself.
        left = {p for p in left if p.pid not in (os.getpid(), driver)}
        if not left:
            break
        for process in left:
            processes.signal_process(process, signal.SIGKILL)
        time.sleep(0.05)
    ray_local.sweep()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
