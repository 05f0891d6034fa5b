"""The source tree as the architecture tests see it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launcher", "trainer", "cluster")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sources() -> dict[str, str]:
    """Every Python file of the three packages and of the benchmarks: path from the root -> text."""
    files = [file for package in (*PACKAGES, "benchmarks") for file in sorted((ROOT / package).rglob("*.py"))]
    found = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}
    assert len(found) >= 10, "the packages were not found"
    return found


@pytest.fixture(scope="session")
def trees(sources: dict[str, str]) -> dict[str, ast.Module]:
    """The same files, parsed."""
    return {path: ast.parse(text, path) for path, text in sources.items()}


@pytest.fixture(scope="session")
def shipped_texts() -> dict[str, str]:
    """Everything that a user may read: code, recipes, documents, build files; not the tests."""
    roots = [ROOT / name for name in (*PACKAGES, "recipes", "docs", "benchmarks")]
    files = [f for folder in roots for f in folder.rglob("*") if f.is_file()]
    files = [f for f in files if not {"__pycache__", "out"} & set(f.relative_to(ROOT).parts)]
    files += [f for f in ROOT.iterdir() if f.is_file() and f.name not in ("LICENSE", ".git")]
    texts = {}
    for file in sorted(files):
        try:
            texts[str(file.relative_to(ROOT))] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return texts
