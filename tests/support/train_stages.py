"""`launch` with the stages up to training alone: what happens to a run is known then, and merging would take longer than all of it.

With --no-connect as its first argument also without that stage, where the run is not about coming together.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import launcher.start

_write_run = launcher.start.write_run
_stages = ["connect", "prepare", "train"]


def write_run(run: Any, plan: Any, *rest: Any) -> None:
    kept = tuple(job for job in plan.jobs if job.name in _stages)
    _write_run(run, dataclasses.replace(plan, jobs=kept), *rest)


if __name__ == "__main__":
    launcher.start.write_run = write_run
    if sys.argv[1] == "--no-connect":
        del sys.argv[1], _stages[0]
    from launcher.cli import main

    sys.exit(main())
