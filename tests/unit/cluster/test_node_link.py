"""The link to a host: what is said over it, and what a link that ends means. Real agents on this host; ssh itself is in tests/hosts."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from cluster.job import ClusterError
from cluster.node_link import NodeLink, agent_command, ask_all, open_links
from cluster.node_messages import Decoder, encode


def test_messages_survive_cuts_and_greetings() -> None:
    decoder, said, others = Decoder(), [], []
    stream = (
        b"Welcome to alpha!\n"
        + encode({"id": 1, "answer": "微调 \n"})
        + b"\n@tunelaunch {broken\n"
        + encode({"alive": 1})
    )
    for at in range(len(stream)):
        messages, lines = decoder.feed(stream[at : at + 1])
        said += messages
        others += lines
    assert said == [{"id": 1, "answer": "微调 \n"}, {"alive": 1}]
    assert others == ["Welcome to alpha!", "@tunelaunch {broken"]


def test_the_command_is_one_that_every_shell_understands() -> None:
    command = agent_command("me@alpha", "/opt/my env's/bin/python", 60)
    assert command[0] == "ssh"
    assert "-oBatchMode=yes" in command
    assert command[-3:-1] == ("--", "me@alpha")
    assert command[-1] == "exec '/opt/my env'\"'\"'s/bin/python' -P -m cluster.node_agent 60"
    assert agent_command("localhost", "", 60) == (sys.executable, "-P", "-m", "cluster.node_agent", "60")


def test_questions_are_asked_of_all_hosts_at_once(tmp_path: Path) -> None:
    logs = [str(tmp_path / f"{n}.log") for n in range(2)]
    links = open_links([("localhost", ""), ("localhost", "")], logs, 60, 20)
    try:
        folder = [str(tmp_path / "共享")]
        assert ask_all(links, "write_tokens", 10, [{"folders": folder, "name": f"t{n}"} for n in range(2)]) == [{}, {}]
        seen = ask_all(links, "missing_tokens", 10, [{"folders": folder, "names": ["t0", "t1", "t2"]}] * 2)
        assert seen == [{folder[0]: ["t2"]}] * 2
        ask_all(links, "remove_tokens", 10, [{"folders": folder, "name": f"t{n}"} for n in range(2)])
        assert list(Path(folder[0]).iterdir()) == []
        with pytest.raises(ClusterError, match=r"localhost: AttributeError.*do_nonsense"):
            ask_all(links, "nonsense", 10, [{}, {}])
    finally:
        for link in links:
            link.close()


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    links = open_links([("localhost", "")] * 2, [str(tmp_path / "0.log"), str(tmp_path / "1.log")], 60, 20)
    try:
        (taken,) = ask_all(links[:1], "listen", 10, [{"port": 0}])
        with pytest.raises(
            ClusterError, match=f"port {taken['port']} cannot be used: Address already in use"
        ) as refused:
            ask_all(links[1:], "listen", 10, [{"port": taken["port"]}])
        assert refused.value.exit_code == 75
        assert "cluster.port" in refused.value.hint
    finally:
        for link in links:
            link.close()


def test_an_agent_that_hears_nothing_ends_its_share(tmp_path: Path) -> None:
    link = NodeLink("localhost", "", str(tmp_path / "0.log"), silence_s=1.0)
    try:
        while not link.is_up:
            link.pump()
        code = "import time; time.sleep(60)"
        link.ask(
            "start",
            argv=[sys.executable, "-c", code],
            env={},
            devices=[],
            cwd="/",
            log_file=str(tmp_path / "n"),
            tag="t/n",
        )
        began = time.monotonic()
        link.process.wait(20)  # nothing is sent meanwhile
        assert 0.9 < time.monotonic() - began < 15
        link.pump()
        (answered,) = link.answers.values()
        assert not Path(f"/proc/{answered['answer']}").exists()
    finally:
        link.close()


@pytest.mark.parametrize(
    ("said", "exit_code", "hint"),
    [
        ("me@a: Permission denied (publickey).", 2, "ssh-copy-id a"),
        ("Host key verification failed.", 2, "compare the fingerprint"),
        ("ssh: Could not resolve hostname a: Name or service not known", 2, "~/.ssh/config"),
        ("ssh: connect to host a port 22: Connection refused", 75, "Is the host up"),
        ("ssh: connect to host a port 22: No route to host", 75, "Is the host up"),
        ("/usr/bin/python3: No module named cluster", 2, "Install the same tunelaunch there"),
        ("bash: line 1: exec: /venv/bin/python: not found", 2, "`python:` of this host"),
        ("kex_exchange_identification: read: Connection reset by peer", 75, "Is the host up"),
    ],
)
def test_what_ssh_says_is_explained(tmp_path: Path, said: str, exit_code: int, hint: str) -> None:
    log = tmp_path / "ssh_0.log"
    log.write_text("Permission denied (an earlier attempt)\n", encoding="utf-8")
    link = NodeLink("localhost", "", str(log), 60)
    link.host = "a"
    link.close()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{said}\r\n")
    trouble = link.trouble()
    assert (trouble.exit_code, trouble.message) == (exit_code, f"a: {said}")
    assert hint in trouble.hint
