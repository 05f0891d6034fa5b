"""What `--hosts` means, flag by flag and file by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import LaunchError, RecipeError
from launcher.hosts import HostChoice, parse_hosts, shared_folders


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha", HostChoice("alpha", None, None)),
        ("me@alpha.lab:0,1", HostChoice("me@alpha.lab", "0,1", None)),
        ("alpha:0:1", HostChoice("alpha", "0:1", None)),
        ("alpha:GPU-1a2b,GPU-3c", HostChoice("alpha", "GPU-1a2b,GPU-3c", None)),
        ("alpha:free:2", HostChoice("alpha", "free:2", None)),
        ("[fd00::2]:0-3", HostChoice("[fd00::2]", "0-3", None)),
        ("alpha:cpu", HostChoice("alpha", None, 1)),
        ("alpha:cpu:4", HostChoice("alpha", None, 4)),
    ],
)
def test_a_host_and_its_devices(text: str, expected: HostChoice) -> None:
    assert parse_hosts((text,), None, None) == (expected,)


def test_flags_are_for_hosts_that_name_no_devices() -> None:
    found = parse_hosts(("a", "b:0,1", "c:cpu:3"), "free:2", None)
    assert [(c.gpus, c.cpu) for c in found] == [("free:2", None), ("0,1", None), (None, 3)]
    assert [(c.gpus, c.cpu) for c in parse_hosts(("a", "b"), None, 2)] == [(None, 2), (None, 2)]


@pytest.mark.parametrize(
    "text", ["", ":0", "a:", "a b", "-oProxyCommand=touch x", "a:cpu:", "a:cpu:0", "a:cpu:x", "@a", "u@-x"]
)
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="--hosts") as refused:
        parse_hosts((text,), None, None)
    assert refused.value.exit_code == 2
    assert "NAME:0,1" in refused.value.hint


def test_a_host_named_twice_is_refused() -> None:
    with pytest.raises(LaunchError, match="a is named more than once"):
        parse_hosts(("a:0", "b", "a:1"), None, None)


def test_a_file_of_hosts(tmp_path: Path) -> None:
    path = tmp_path / "主机.yaml"
    path.write_text(
        'hosts:\n  - a:0,1\n  - {host: b, gpus: 0, python: "/opt/my env/bin/python"}\n  - host: c\n    cpu: 2\n',
        encoding="utf-8",
    )
    assert parse_hosts((str(path),), None, None) == (
        HostChoice("a", "0,1", None),
        HostChoice("b", "0", None, "/opt/my env/bin/python"),
        HostChoice("c", None, 2),
    )


def test_every_mistake_of_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "hosts.yaml"
    path.write_text(
        "hosts:\n"
        "  - {hst: a}\n"
        "  - {host: b, gpus: [0], cpu: 0}\n"
        "  - {host: c d, cpu: true}\n"
        "  - 'a b'\n"
        "  - {host: e, gpus: '0', cpu: 1}\n"
        "port: 3\n",
        encoding="utf-8",
    )
    with pytest.raises(RecipeError) as refused:
        parse_hosts((str(path),), None, None)
    said = str(refused.value)
    for line, what in (
        (2, "unknown key 'hst'"),
        (2, "`host` is missing"),
        (3, "gpus cannot be"),
        (3, "cpu cannot be"),
        (4, "'c d' is no host"),
        (4, "cpu cannot be"),
        (5, "'a b' is no host"),
        (6, "gpus and cpu contradict"),
        (7, "unknown key 'port'"),
    ):
        assert any(f"hosts.yaml:{line}:" in row and what in row for row in said.splitlines()), (line, what, said)
    assert "Did you mean host?" in said


@pytest.mark.parametrize("text", ["", "hosts:\n", "hosts: a\n", "hosts: []\n", "- a\n"])
def test_a_file_without_hosts_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hosts.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"hosts\.yaml"):
        parse_hosts((str(path),), None, None)


def test_folders_that_hosts_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/data/hf")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    shared = shared_folders(Path("/data/runs/x"), Path("/data/cache"), "hub")
    assert list(shared) == ["/data/runs", "/data/cache", "/data/hf/hub"]
    assert "TUNELAUNCH_CACHE" in shared["/data/cache"]
    assert "/data/hf/hub" not in shared_folders(Path("/data/runs/x"), Path("/data/cache"), "gguf")
