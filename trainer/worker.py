"""The entry of every worker process: `-m trainer.worker STAGE ...`. One of the few places with a broad except (tests/architecture).

First it makes sure that it is OUR `trainer`, that it dies with its parent, and that all it prints is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from .heartbeat import HEARTBEAT
from .lean_imports import no_model_is_needed
from .spec import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, EXIT_RETRY, EXIT_USER, TrainError, read_plan
from .worker_secrets import provide

STAGES = {
    "connect": "trainer.connect",
    "prepare": "trainer.prepare",
    "preview": "trainer.data_preview",
    "check": "trainer.data_check",
    "train": "trainer.train",
    "probe": "trainer.parallel_probe",
    "packing": "trainer.packing_probe",
    "consolidate": "trainer.consolidate",
    "merge": "trainer.merge",
    "evaluate": "trainer.evaluate",
    "chat": "trainer.chat",
}
PR_SET_PDEATHSIG = 1
WITHOUT_MODEL = ("prepare", "check", "preview")
"""Stages that read a tokenizer and no weights; where a model has to be converted first, they load one after all."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
FULL_DISK_HINT = "Free some space or give another --run-dir; what was saved before is whole."


def main(argv: list[str]) -> int:
    """Run one stage. Returns 0, 2 (the user can fix it), 70 (our bug), 75 (retry may help) or 130 (stopped).

    Side effects: with --log-dir, file descriptors 1 and 2 go to rank_N.log there, and a failure is written as
    failure_rank_N.json. Training leaves signs of life there too (heartbeat.py).
    """
    parser = argparse.ArgumentParser(prog="trainer.worker")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--log-dir", default="", help="folder of rank_N.log and failure_rank_N.json; none: terminal")
    parser.add_argument("--package-root", default="", help="folder that our packages must come from")
    known, rest = parser.parse_known_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    if known.log_dir:
        die_with_parent()
        if known.stage in WITHOUT_MODEL:
            no_model_is_needed()
        _redirect(Path(known.log_dir) / f"rank_{rank}.log")
        if known.stage == "train":
            HEARTBEAT.start(Path(known.log_dir), rank)
    try:
        _check_identity(known.package_root)
        _provide_secrets(rest)
        stage = importlib.import_module(STAGES[known.stage])
        stage_parser = _StageParser(prog=f"trainer.worker {known.stage}")
        stage.add_arguments(stage_parser)
        stage.run(stage_parser.parse_args(rest))
    except TrainError as e:
        return _fail(known.log_dir, rank, "retry" if e.exit_code == EXIT_RETRY else "user", e.message, e.hint)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else EXIT_USER
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as e:
        if e.errno not in FULL_DISK:
            return _fail(known.log_dir, rank, "bug", f"{type(e).__name__}: {e}", "")
        return _fail(
            known.log_dir, rank, "user", f"cannot write {e.filename or 'to the disk'}: {e.strerror}", FULL_DISK_HINT
        )
    except Exception as e:  # a process border: whatever ends a rank is written down with its traceback
        return _fail(known.log_dir, rank, "bug", f"{type(e).__name__}: {e}", "")
    return EXIT_OK


class _StageParser(argparse.ArgumentParser):
    """Says what is wrong as every other failure is said: the flags come from the launcher's own."""

    def error(self, message: str) -> NoReturn:
        raise TrainError(message)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends (Linux), so that no worker outlives a killed launcher."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _provide_secrets(stage_argv: list[str]) -> None:
    """Before anything heavy is imported: a library may look for its token at import. Stages without a plan need none."""
    if "--plan" in stage_argv:
        provide(read_plan(stage_argv[stage_argv.index("--plan") + 1]).secrets, os.environ)


def _redirect(log: Path) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _check_identity(package_root: str) -> None:
    """Raises TrainError when another package named `trainer` was imported in place of ours."""
    found = Path(__file__).resolve().parent.parent
    if package_root and found != Path(package_root).resolve():
        raise TrainError(
            f"the workers imported `trainer` from {found}, the plan was made by {package_root}",
            "Remove the other package, or install tunelaunch into an environment of its own.",
        )


def _fail(log_dir: str, rank: int, kind: str, message: str, hint: str) -> int:
    trace = traceback.format_exc()
    exit_code = {"user": EXIT_USER, "retry": EXIT_RETRY, "bug": EXIT_BUG}[kind]
    # On a full disk neither the log nor the file can be written; the exit code still says what happened.
    with contextlib.suppress(OSError):
        print(trace if kind == "bug" else f"{message}\n{hint}", file=sys.stderr, flush=True)
        row = {
            "rank": rank,
            "pid": os.getpid(),
            "kind": kind,
            "message": message,
            "hint": hint,
            "traceback": trace,
            "exit_code": exit_code,
            "log_file": str(Path(log_dir) / f"rank_{rank}.log"),
            "time_ns": time.time_ns(),
        }
        if log_dir:
            path = Path(log_dir) / f"failure_rank_{rank}.json"
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
            temporary.replace(path)
    return exit_code


if __name__ == "__main__":
    # os._exit after a failure: interpreter shutdown would wait for collectives that will never come.
    code = main(sys.argv[1:])
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
