"""A worker for the backend contract: says what it was given, then ends in the way that its first argument names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.processes import ProcessIdentity, die_with_parent, is_alive


def write(log_dir: str, name: str, value: object) -> None:
    """Through a temporary name, so that a test which waits for the file reads all of it."""
    temporary = Path(log_dir) / f".{name}"
    temporary.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    temporary.rename(Path(log_dir) / name)


def fail(log_dir: str, rank: int, kind: str, message: str, exit_code: int) -> int:
    """What a worker of ours leaves behind when it fails."""
    failure = {
        "rank": rank,
        "kind": kind,
        "message": message,
        "hint": "修好它",
        "traceback": "Traceback ...",
        "exit_code": exit_code,
        "log_file": str(Path(log_dir) / f"rank_{rank}.log"),
        "time_ns": time.time_ns(),
    }
    write(log_dir, f"failure_rank_{rank}.json", failure)
    return exit_code


def main(args: list[str]) -> int:
    mode, log_dir, *_ = args
    rank = int(os.environ["RANK"])
    told = {"args": args, "cwd": os.getcwd(), "env": dict(os.environ), "pid": os.getpid(), "path": sys.path}
    write(log_dir, f"told_{rank}.json", told)
    match mode:
        case "user":
            return fail(log_dir, rank, "user", "data/小薇.jsonl:3: 不是 JSON", 2)
        case "bug":
            return fail(log_dir, rank, "bug", "KeyError: 'labels'", 70)
        case "raise":
            raise ValueError("小薇 was not expected")
        case "exit":
            sys.exit(3)
        case "stopped":
            return 130
        case "interrupt":
            raise KeyboardInterrupt
        case "kill_rank_1":
            if rank == 1:
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)
            while not (Path(log_dir) / "told_1.json").exists():
                time.sleep(0.01)
            peer = ProcessIdentity.of(json.loads((Path(log_dir) / "told_1.json").read_text(encoding="utf-8"))["pid"])
            while peer is not None and is_alive(peer):
                time.sleep(0.01)
            return fail(log_dir, rank, "bug", "RuntimeError: gloo: Connection closed by peer [127.0.0.1]:1234", 70)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "wait":
            child = subprocess.Popen(
                [sys.executable, "-S", "-c", "import time; time.sleep(120)"], start_new_session=True
            )
            write(log_dir, f"child_{rank}.json", child.pid)
            time.sleep(120)
        case "leave_child":
            child = subprocess.Popen(
                [sys.executable, "-S", "-c", "import time; time.sleep(120)"], start_new_session=True
            )
            write(log_dir, f"child_{rank}.json", child.pid)
    print(f"rank {rank} 完成", flush=True)
    return 0


if __name__ == "__main__":
    die_with_parent(signal.SIGKILL)
    sys.exit(main(sys.argv[1:]))
