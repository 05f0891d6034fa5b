"""A recipe where a command would stand means `run`; nothing else is changed."""

import pytest

from launcher.cli import route


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["x.yaml"], ["run", "x.yaml"]),
        (["dir/x.yml", "--gpus", "0,2"], ["run", "dir/x.yml", "--gpus", "0,2"]),
        (["--gpus", "0", "x.yaml"], ["run", "--gpus", "0", "x.yaml"]),
        (["tiny_cpu", "--cpu", "1"], ["run", "tiny_cpu", "--cpu", "1"]),
        (["plan", "x.yaml"], ["plan", "x.yaml"]),
        (["recipes", "check", "x.yaml"], ["recipes", "check", "x.yaml"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_route(argv: list[str], expected: list[str]) -> None:
    assert route(argv) == expected
