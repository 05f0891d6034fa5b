"""What an installed copy contains, and that it works from a folder full of misleading names."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

MISLEADING = ("trainer.py", "launcher.py", "cluster.py", "types.py", "ray.py", "torch.py", "typing.py")


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without network: the build backend itself, from this environment."""
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as z:
        return z.namelist()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(folder)
    return folder


def test_wheel_installs_our_packages_and_nothing_else(names: list[str]) -> None:
    top = {name.partition("/")[0] for name in names}
    info = {name for name in top if name.endswith(".dist-info")}
    assert len(info) == 1
    assert top - info == {"launcher", "trainer", "cluster"}
    assert f"{info.pop()}/licenses/LICENSE" in names


def test_wheel_holds_the_recipes_and_no_tests(names: list[str], root: Path) -> None:
    assert "launcher/known_models.csv" in names
    inside = {name.removeprefix("launcher/_recipes/") for name in names if name.startswith("launcher/_recipes/")}
    outside = {str(f.relative_to(root / "recipes")) for f in (root / "recipes").rglob("*") if f.is_file()}
    assert inside == outside
    assert any(name.endswith(".yaml") for name in inside)
    assert not [name for name in names if "test" in Path(name).name or "/tests/" in name or name.endswith(".pyc")]


@pytest.mark.parametrize("arguments", [["--help"], ["recipes", "list"]])
def test_installed_copy_ignores_the_users_folder(installed: Path, tmp_path: Path, arguments: list[str]) -> None:
    for name in MISLEADING:
        (tmp_path / name).write_text("raise SystemExit('a file of the user was imported')\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launcher", *arguments],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "a file of the user" not in done.stdout + done.stderr
