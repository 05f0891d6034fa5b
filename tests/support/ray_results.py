"""What Ray itself says of a run, read from the run folder as its users do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from support.commands import LAUNCH, losses
from support.short_run import STEPS


def check_told_to_ray(run: Path) -> None:
    """Ray's own list names the newest checkpoint where the saver put it, and Ray restores from there."""
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept[-1] == f"step_{STEPS:06d}"
    code = (
        "import sys\nfrom ray.train import Result\nr = Result.from_path(sys.argv[1])\n"
        "print(r.checkpoint.path, r.metrics['step'], r.metrics['loss'])"
    )
    argv = [str(LAUNCH.with_name("python")), "-c", code, str(run)]
    env = {**os.environ, "RAY_TRAIN_V2_ENABLED": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    path, step, loss = done.stdout.split()
    assert path == str(run / "checkpoints" / kept[-1])
    assert (int(step), float(loss)) == (STEPS, losses(run)[STEPS])
