import argparse
import contextlib
import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time

import pytest
import torch
from support.commands import ROOT
from support.tiny_chat_model import CHATML, save_tiny_model

from trainer import chat
from trainer.generate import generate_answers, load_for_generation
from trainer.rows import read_rows
from trainer.spec import DataFile, TrainError
from trainer.template import load_template

COMMAND = [sys.executable, "-m", "trainer.worker", "chat", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def arguments(*argv):
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    return parser.parse_args([str(a) for a in argv])


def answer(folder, messages, max_new_tokens):
    loaded = load_for_generation(str(folder), torch.float32, torch.device("cpu"))
    return generate_answers(loaded, load_template(str(folder), "model"), [messages], max_new_tokens)[0].text


def test_a_conversation_over_a_pipe(model, tmp_path):
    saved = tmp_path / "saved.jsonl"
    lines = [
        "你好",
        "",
        "and you?",
        f"/save {saved}",
        "/system You are Nova.",
        "Hi",
        f"/save {saved}",
        "/reset",
        "/system",
        "/sav x",
        "/help",
    ]
    done = subprocess.run(
        [*COMMAND, "--model", str(model), "--max-new-tokens", "9"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    first = answer(model, [("user", "你好")], 9)
    turns = [("user", "你好"), ("assistant", first), ("user", "and you?")]
    second = answer(model, turns, 9)
    third = answer(model, [("system", "You are Nova."), ("user", "Hi")], 9)
    rows = [json.loads(line)["messages"] for line in saved.read_text(encoding="utf-8").splitlines()]
    assert [[(t["role"], t["content"]) for t in row] for row in rows] == [
        [*turns, ("assistant", second)],
        [("system", "You are Nova."), ("user", "Hi"), ("assistant", third)],
    ]
    assert chat.printable(first) in done.stdout
    assert f"saved 1 conversation to {saved}" in done.stdout
    assert f"saved 2 conversations to {saved}" in done.stdout
    assert "unknown command /sav. Commands:" in done.stdout
    assert done.stdout.count("/reset          forget") == 2
    assert "You are Nova.\n" in done.stdout


def session(said="Hello!", system=None):
    """A session whose model always says the same: commands need no weights."""
    return chat.Session(lambda messages: iter([said]), system)


def test_saved_rows_can_be_trained_on(tmp_path):
    talk = session(said="我是小薇 😀", system="你是小薇。")
    talk.handle("你是谁？")
    talk.handle(f"/save {tmp_path / 'rows.jsonl'}")
    text = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert "小薇 😀" in text
    (row,) = read_rows((DataFile(str(tmp_path / "rows.jsonl"), "auto"),), 0)
    assert [(m.role, m.content) for m in row.messages] == [
        ("system", "你是小薇。"),
        ("user", "你是谁？"),
        ("assistant", "我是小薇 😀"),
    ]


def test_save_never_touches_a_file_of_others(tmp_path, capsys):
    path = tmp_path / "precious.jsonl"
    path.write_text("precious")
    talk = session()
    talk.handle(f"/save {path}")
    assert "nothing to save yet" in capsys.readouterr().out
    talk.handle("Hi")
    talk.handle(f"/save {path}")
    assert "exists and is not of this session" in capsys.readouterr().out
    assert path.read_text() == "precious"
    talk.handle(f"/save {tmp_path}/no/such/file")
    assert "is not a folder" in capsys.readouterr().out
    talk.handle("/save")
    assert "/save FILE" in capsys.readouterr().out


def test_the_second_save_holds_all_conversations(tmp_path):
    path = tmp_path / "my chat.jsonl"
    talk = session()
    for line in ("one", f"/save {path}", "two", "/reset", "three", f"/save {path}"):
        assert talk.handle(line)
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [[t["content"] for t in row if t["role"] == "user"] for row in rows] == [["one", "two"], ["three"]]


def test_exit_ends_and_reset_forgets():
    seen = []
    talk = chat.Session(lambda messages: seen.append(messages) or iter(["ok"]), "sys")
    talk.handle("a")
    talk.handle("b")
    talk.handle("/reset")
    talk.handle("c")
    assert [len(m) for m in seen] == [2, 4, 2]
    assert seen[2] == [("system", "sys"), ("user", "c")]
    assert talk.handle("/exit") is False


def test_an_answer_cannot_steer_the_terminal(capsys):
    session(said="\x1b[2Jboo\x07").handle("Hi")
    assert capsys.readouterr().out == "\ufffd[2Jboo\ufffd\n"


class Terminal:
    """A chat process on a terminal of its own, so that a typed Ctrl-C is a real one."""

    def __init__(self, argv):
        self.fd, slave = pty.openpty()

        def take_terminal():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        environment = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)
        self.seen = ""

    def read_until(self, text, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not appear: {self.seen[-2000:]}"
            if select.select([self.fd], [], [], 0.2)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text):
        os.write(self.fd, text.encode())

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.fd)


def test_ctrl_c_stops_the_answer_then_leaves(tmp_path):
    folder = save_tiny_model(tmp_path, max_positions=1_000_000)
    terminal = Terminal([*COMMAND, "--model", str(folder), "--max-new-tokens", "900000"])
    try:
        terminal.read_until("/help lists the commands.")
        terminal.read_until("> ")
        terminal.type("Hi\n")
        terminal.read_until("Hi\r\n")
        # Some of the answer is there before it is stopped.
        deadline = time.monotonic() + 30
        while len(terminal.seen) < 20:
            assert time.monotonic() < deadline
            terminal.seen += os.read(terminal.fd, 4096).decode(errors="replace")
        terminal.type("\x03")
        terminal.read_until("(stopped; this question and answer are forgotten)")
        terminal.read_until("> ")
        terminal.type("/exi\n")
        terminal.read_until("unknown command /exi")
        terminal.read_until("> ")
        # readline shows its prompt shortly before it listens to signals: like a person, press again.
        for _ in range(10):
            terminal.type("\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                terminal.process.wait(timeout=3)
                break
        assert terminal.process.poll() == 130
    finally:
        terminal.close()


def test_a_full_conversation_is_said_and_not_kept(tmp_path, monkeypatch, capsys):
    folder = save_tiny_model(tmp_path, max_positions=64)
    sessions = []
    monkeypatch.setattr(chat, "converse", lambda s, greeting: sessions.append(s))
    chat.run(arguments("--model", folder, "--dtype", "fp32", "--max-new-tokens", 500))
    sessions[0].handle("word " * 60)
    assert "the model can read 64" in capsys.readouterr().out
    assert sessions[0].messages == []
    sessions[0].handle("Hi")
    assert len(sessions[0].messages) == 2


def test_another_template_is_announced_in_one_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat, "converse", lambda s, greeting: None)
    same, other = tmp_path / "same.jinja", tmp_path / "other.jinja"
    same.write_text(CHATML, encoding="utf-8")
    other.write_text(
        "{% for m in messages %}{{ '用户：' + m['content'] + '\n' if m['role'] == 'user' else '助手：' + m['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}助手：{% endif %}",
        encoding="utf-8",
    )
    chat.run(arguments("--model", model, "--template", other, "--dtype", "fp32"))
    (line,) = [t for t in capsys.readouterr().out.splitlines() if t.startswith("template: ")]
    assert repr("用户：Hi\n助手：") in line
    assert repr("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n") in line
    chat.run(arguments("--model", model, "--template", same, "--dtype", "fp32"))
    assert "like the model's own" in capsys.readouterr().out


def test_what_cannot_chat_is_refused_before_loading(model, tmp_path):
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(TrainError, match="GGUF"):
        chat.run(arguments("--model", gguf))
    with pytest.raises(TrainError, match="no chat template"):
        chat.run(arguments("--model", save_tiny_model(tmp_path / "plain", template=None)))
    with pytest.raises(TrainError, match="negative"):
        chat.run(arguments("--model", model, "--temperature", "-1"))
