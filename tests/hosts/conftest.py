"""What several of these files compare with: made once, on this host."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.commands import ROOT, Launch, losses
from support.short_run import SHORT, STEPS


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the recipes; run folders lie in it too."""
    found = tmp_path_factory.mktemp("hosts") / "recipes"
    shutil.copytree(ROOT / "recipes", found)
    return found


@pytest.fixture(scope="session")
def torchrun_run(folder: Path, launch: Launch) -> Path:
    """The folder of a finished `SHORT` run on two processes. Tests leave it as it is."""
    done = launch("tiny_cpu.yaml", "--cpu", "2", "--run-dir", "torchrun", *SHORT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(losses(folder / "torchrun")) == list(range(1, STEPS + 1))
    return folder / "torchrun"
