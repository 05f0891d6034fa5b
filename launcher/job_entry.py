"""A submitted run on the cluster: what Ray starts there (`launch _submitted`), around the same `start` as everywhere.

Ray's stop signals every descendant of the command, workers too, so none could save. Therefore the command is two processes:

    A, which Ray knows: passes a stop on as ONE SIGTERM to B, and ends with B's exit code
    B, no descendant of A: the launcher, which saves a checkpoint and ends its workers; it stops by itself when A dies
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.job import ClusterError
from trainer.spec import EXIT_BUG, EXIT_RETRY, TrainError

from .errors import LaunchError
from .run_dir import RunDir, read_json
from .start import Request, start
from .submission import STATUS_MARK
from .submit import own_version

B_ENDS_S = 30.0
"""From B's exit code to its end."""
ALONE_S = 60.0
"""How long B goes on saving once A has been killed."""
STATUS_POLL_S = 0.5
TRACEBACK_LINES = 20


def run_submitted(request: Request, expects: str, package: str) -> int:
    """Run a recipe of the uploaded folder, which is the current one. Returns the run's exit code.

    `expects`: the version of the tunelaunch that submitted it. `package`: name of the upload.
    """
    # Ray blocks SIGINT in all that it starts; `launch runs stop` on this machine sends one.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    assert request.run_dir is not None
    run = RunDir(request.run_dir.expanduser().absolute())
    pipe = _split()
    if isinstance(pipe, int):
        return pipe
    code = EXIT_BUG
    try:
        _require_version(expects)
        threading.Thread(target=_report_status, args=(run,), daemon=True).start()
        inputs = _keep_inputs(Path.cwd(), run.root.parent / ".inputs" / Path(package).stem)
        code = start(replace(request, recipe=str(inputs / request.recipe), run_dir=run.root), detached=False)
        _print_status(run, {})
        return code
    except (LaunchError, ClusterError, TrainError) as e:
        code = e.exit_code
        # The command line prints the error; this is for `launch runs show`.
        _print_status(run, {"message": e.message, "hint": e.hint, "exit_code": e.exit_code})
        raise
    finally:
        sys.stdout.flush()
        os.write(pipe[0], str(code).encode())


def _require_version(expects: str) -> None:
    if own_version() != expects:
        raise LaunchError(
            f"this cluster ({socket.gethostname()}) has tunelaunch {own_version()}, the run was submitted by {expects}",
            f"Install the same on both sides: pip install tunelaunch=={expects} (Python here: {sys.executable})",
        )


def _keep_inputs(uploaded: Path, target: Path) -> Path:
    """A copy of the upload beside the run folders: Ray deletes its own, and has it at another place on each node.

    Named by its contents, so runs that sent the same share it.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new_"))
        shutil.copytree(uploaded, temporary, dirs_exist_ok=True)
        with contextlib.suppress(OSError):  # another run of the same upload was faster
            temporary.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
    except OSError as e:
        raise LaunchError(
            f"cannot write {target.parent} on {socket.gethostname()}: {e.strerror}",
            "Choose a folder that the cluster can write: launch submit ... --run-dir /shared/runs/NAME",
        ) from None
    return target


def _report_status(run: RunDir) -> None:
    """Print the run's status whenever a stage begins or ends."""
    last = None
    while True:
        time.sleep(STATUS_POLL_S)
        if run.status.is_file():
            status = read_json(run.status)
            now = (status["state"], status["attempt"], status["stages"])
            if now != last:
                _print_status(run, {})
            last = now


def _print_status(run: RunDir, error: dict[str, Any]) -> None:
    """One line for programs. `error`: why the launcher itself ended; {} where the run's own status says all."""
    status = read_json(run.status) if run.status.is_file() else {}
    failure = status.get("failure")
    if error:  # a failure in the folder is then another run's, or the same
        failure = {"rank": -1, "kind": "user", "traceback": "", "log_file": "the job's log", **error}
    if failure:
        kept = failure["traceback"].splitlines()[-TRACEBACK_LINES:]
        failure = {**failure, "traceback": "\n".join(kept)}
    line = json.dumps({**status, "failure": failure, "run_dir": str(run.root)})
    # One write: the progress of the run goes to the same file, from another thread.
    sys.stdout.flush()
    os.write(1, f"{STATUS_MARK}{line}\n".encode())


def _split() -> tuple[int, int] | int:
    """Returns in B with (where to write the exit code, where A's end shows); in A with the exit code, after B has ended."""
    result_read, result_write = os.pipe()
    life_read, life_write = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.close(result_read)
        os.close(life_write)
        launcher = os.fork()
        if launcher:
            os.write(result_write, launcher.to_bytes(8, "big"))
            os._exit(0)
        # Out of A's group, which Ray kills as soon as its own supervisor has gone. B ends by A's end, with a checkpoint.
        os.setsid()
        threading.Thread(target=_end_without_a, args=(life_read,), daemon=True).start()
        return result_write, life_read
    os.close(result_write)
    os.close(life_read)
    os.waitpid(middle, 0)
    launcher = int.from_bytes(os.read(result_read, 8), "big")
    # B holds the other end of `result_read` for as long as it lives, so the pid is B's whenever it is used.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: _pass_on(launcher))
    told = os.read(result_read, 16)
    if told:  # B may still have to say why
        select.select([result_read], [], [], B_ENDS_S)
    else:
        print(f"the launcher (pid {launcher}) was killed", file=sys.stderr)
    sys.stdout.flush()
    return int(told) if told else EXIT_RETRY


def _pass_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _end_without_a(life: int) -> None:
    os.read(life, 1)  # returns when A has gone: nobody writes
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ALONE_S)
    os.kill(os.getpid(), signal.SIGTERM)  # the second kills the workers
