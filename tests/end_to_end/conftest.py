"""Real commands in real processes: every test here runs the console script and looks at what it leaves behind."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.commands import FP32, LAUNCH, ROOT, Launch, only_run


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A user's folder: the tiny recipe under its own name, in a path with a space, a quote and Chinese."""
    folder = tmp_path / "my 'work' 目录"
    shutil.copytree(ROOT / "recipes", folder)
    return folder


@pytest.fixture(scope="session")
def straight(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished LoRA run in fp32 on one process; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("straight") / "recipes"
    shutil.copytree(ROOT / "recipes", folder)
    done = launch("tiny_cpu.yaml", "--cpu", "1", *FP32, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return only_run(folder)


@pytest.fixture
def started(environment: dict[str, str], work: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command and return at once; whatever still runs at the end of the test is killed by its pid."""
    processes: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [LAUNCH, *args], cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()
