"""Which compiler torch.compile would call: the rules of torch and Triton, on folders that hold only what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.compiler import find_compiler, install_hint


@pytest.mark.parametrize(
    ("device", "installed", "variables", "found"),
    [
        ("cpu", ["g++"], {}, "g++"),
        ("cpu", ["c++", "clang++"], {}, ""),
        ("cpu", ["clang++"], {"CXX": "clang++"}, "clang++"),
        ("cpu", ["g++"], {"CXX": "icpx"}, ""),
        ("cuda", ["gcc", "clang"], {}, "gcc"),
        ("cuda", ["clang"], {}, "clang"),
        ("cuda", ["gcc"], {"CC": "cc"}, ""),
        ("cuda", [], {}, ""),
    ],
)
def test_what_is_found(
    device: str, installed: list[str], variables: dict[str, str], found: str, tmp_path: Path
) -> None:
    for name in installed:
        (tmp_path / name).touch(mode=0o755)
    expected = str(tmp_path / found) if found else ""
    assert find_compiler(device, {"PATH": str(tmp_path), **variables}) == expected


def test_the_hint_names_what_is_looked_for() -> None:
    assert "g++" in install_hint("cpu")
    assert "CXX" in install_hint("cpu")
    assert "gcc" in install_hint("cuda")
