"""A worker without torch that ends as it is told: `--script` holds an entry for each attempt, of which rank 1 takes the part after "/".

done | kill | term | user | bug | retry | hang (beats, then sleeps in `wait_for_nobody`) | wait (until it is stopped)
Every start appends its stage to `--trail`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from trainer.heartbeat import HEARTBEAT
from trainer.worker import _fail, die_with_parent

CODES = {"user": 2, "bug": 70, "retry": 75}


def wait_for_nobody() -> None:
    time.sleep(3600)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    for name in ("--log-dir", "--script", "--trail"):
        parser.add_argument(name, required=True)
    parser.add_argument("--attempt", type=int, default=1)
    args = parser.parse_args(argv)
    die_with_parent()
    rank = int(os.environ["RANK"])
    with open(args.trail, "a", encoding="utf-8") as f:
        f.write(f"{args.stage} {rank} {os.getpid()} {Path(args.log_dir).parent.name}\n")
    entry = json.loads(args.script)[args.attempt - 1] if args.stage == "train" else "done"
    own = entry.split("/")[min(rank, entry.count("/"))]
    if args.stage == "train":
        HEARTBEAT.start(Path(args.log_dir), rank)
        for step in (1, 2):
            HEARTBEAT.beat("data", step, 0)
            HEARTBEAT.step_done(step)
    match own:
        case "kill":
            while not (Path(args.log_dir) / f"heartbeat_rank_{rank}.json").is_file():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "hang":
            HEARTBEAT.beat("forward", 3, 1)
            wait_for_nobody()
        case "wait":
            HEARTBEAT.beat("backward", 3, 1)
            HEARTBEAT.beat("optimizer", 3, 1)
            wait_for_nobody()
        case "user" | "bug" | "retry":
            try:
                raise ValueError(f"{own} of process {os.getpid()}")
            except ValueError as e:
                return _fail(args.log_dir, rank, own, str(e), "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
