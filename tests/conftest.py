"""Shared by all tests: no model hub is ever asked, and golden files are compared or, on request, written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import LAUNCH, Launch

GOLDEN = Path(__file__).parent / "golden"

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="Write the golden files in place of comparing them.")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], str]:
    """`golden(name, text)` is what tests/golden/<name> holds; with --update-golden it becomes `text` first."""

    def kept(name: str, text: str) -> str:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing; write it with --update-golden"
        return path.read_text(encoding="utf-8")

    return kept


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One cache for the whole session, no hub, no GPU."""
    cache = tmp_path_factory.mktemp("cache")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TUNELAUNCH_", "RANK", "WORLD_SIZE"))}
    return {
        **env,
        "TUNELAUNCH_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "hf"),
        "COLUMNS": "120",
    }


@pytest.fixture(scope="session")
def launch(environment: dict[str, str]) -> Launch:
    """`launch("plan", "x.yaml", cwd=...)` -> the finished process, output as text."""

    def run(*args: str, cwd: Path, timeout_s: float = 240, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [LAUNCH, *args],
            cwd=cwd,
            env={**environment, **extra},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )

    return run
