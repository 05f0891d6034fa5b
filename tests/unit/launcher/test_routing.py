"""The command line as a whole: a recipe where a command would stand means `run`; what a missing package is told as."""

import pytest

from launcher import cli
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


def test_a_missing_package_is_named_and_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(**options: object) -> None:
        raise ModuleNotFoundError("No module named 'pydantic.fields'", name="pydantic.fields")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "x.yaml"])
    assert ended.value.code == 2
    assert "the package pydantic is not installed in" in capsys.readouterr().err
