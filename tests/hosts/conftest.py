"""What several of these files compare with: made once, on this host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.commands import LAUNCH_TRAINING, ROOT, losses
from support.short_run import SHORT, STEPS


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the recipes; run folders lie in it too."""
    found = tmp_path_factory.mktemp("hosts") / "recipes"
    shutil.copytree(ROOT / "recipes", found)
    return found


@pytest.fixture(scope="session")
def torchrun_run(folder: Path, environment: dict[str, str]) -> Path:
    """The folder of a `SHORT` run on two processes, which ended with its training. Tests leave it as it is."""
    argv = [*LAUNCH_TRAINING, "tiny_cpu.yaml", "--cpu", "2", "--run-dir", "torchrun", *SHORT]
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(losses(folder / "torchrun")) == list(range(1, STEPS + 1))
    return folder / "torchrun"
