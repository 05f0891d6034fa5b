"""`launch data convert`: whatever a format can hold comes back equal, and what it cannot is named."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.data_convert import convert
from launcher.errors import LaunchError
from launcher.row_forms import FORMS
from trainer.rows import Row, read_rows
from trainer.spec import DataFile, TrainError

TEXTS = ("Hi", "你好，世界", 'a "quoted"\\ line\nand another', " ", "", "😀\u2028\ttab", "<think>\nno\n</think>\n\nYes")
TOOL = {"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {"type": "object"}}}


def rows_of(path: Path, format: str = "auto") -> list[tuple[Any, ...]]:
    """All that rows say, without where they stand."""
    return [(r.messages, r.text, r.tools) for r in read_rows((DataFile(str(path), format),), 0)]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def conversation(rng: random.Random) -> dict[str, Any]:
    """Any conversation that training reads: system prompts, switches, calls, several questions in a row, empty texts."""
    turns: list[dict[str, Any]] = []
    with_tools = rng.random() < 0.2
    for number in range(rng.randint(1, 3)):
        if rng.random() < (0.5 if number == 0 else 0.15):
            turns.append({"role": "system", "content": rng.choice(TEXTS)})
        for _ in range(2 if rng.random() < 0.05 else 1):
            turns.append({"role": "user", "content": rng.choice(TEXTS)})
        if with_tools and rng.random() < 0.5:
            calls = [
                {"type": "function", "function": {"name": "weather", "arguments": {"city": rng.choice(TEXTS), "n": k}}}
                for k in range(rng.randint(1, 2))
            ]
            turns.append({"role": "assistant", "content": rng.choice(("", "", "Let me see.")), "tool_calls": calls})
            turns += [{"role": "tool", "content": rng.choice(TEXTS)} for _ in calls]
        answer: dict[str, Any] = {"role": "assistant", "content": rng.choice(TEXTS)}
        if rng.random() < 0.1:
            answer["loss"] = rng.random() < 0.5
        turns.append(answer)
    return {"messages": turns, **({"tools": [TOOL]} if with_tools else {})}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("form", sorted(set(FORMS) - {"text"}))
def test_what_a_format_can_hold_comes_back_equal(form: str, suffix: str, tmp_path: Path) -> None:
    rng = random.Random(form)
    source = write(tmp_path / "all.jsonl", [conversation(rng) for _ in range(400)])
    kept, held = [], []
    for line, row in zip(
        source.read_bytes().split(b"\n"), read_rows((DataFile(str(source), "auto"),), 0), strict=False
    ):
        if not FORMS[form](row)[1]:
            kept.append(json.loads(line))
            held.append((row.messages, row.text, row.tools))
    assert len(kept) > 60  # of 400, also for the format that holds least
    there = tmp_path / f"there{suffix}"
    assert convert(str(write(tmp_path / "in.jsonl", kept)), there, form).rows == len(kept)
    assert rows_of(there) == held
    back = tmp_path / f"back{suffix}"
    convert(str(there), back, "messages", format=form)
    assert rows_of(back, "messages") == held


@pytest.mark.parametrize("first", sorted(set(FORMS) - {"text"}))
@pytest.mark.parametrize("second", sorted(set(FORMS) - {"text"}))
def test_every_format_becomes_every_other(first: str, second: str, tmp_path: Path) -> None:
    turns = [("system", "S"), ("user", "一"), ("assistant", "b\n"), ("user", "c"), ("assistant", "d")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in part]} for part in (turns, turns[:3], turns[1:3])]
    source = write(tmp_path / "in.jsonl", rows)
    convert(str(source), tmp_path / "first.jsonl", first)
    convert(str(tmp_path / "first.jsonl"), tmp_path / "second.jsonl", second)
    assert rows_of(tmp_path / "second.jsonl", second) == rows_of(source)


def test_text_goes_through_the_formats_that_hold_it(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    convert(str(source), tmp_path / "a.jsonl", "conversation")
    convert(str(tmp_path / "a.jsonl"), tmp_path / "b.jsonl", "text")
    assert (tmp_path / "b.jsonl").read_bytes() == source.read_bytes()
    for form in ("messages", "alpaca", "sharegpt", "pair"):
        with pytest.raises(LaunchError, match=f"in.jsonl:1: {form} cannot hold plain text"):
            convert(str(source), tmp_path / "c.jsonl", form)


def user_and(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, *turns], **more}


ANSWER = {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "content": "Wait.", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
LOSSES: list[tuple[str, dict[str, Any], str, dict[str, Any] | None]] = [
    ("alpaca", user_and(ANSWER, tools=[TOOL]), "the definitions of tools", user_and(ANSWER)),
    ("pair", user_and({**ANSWER, "loss": False}), "which of its answers are learnt", user_and(ANSWER)),
    (
        "alpaca",
        user_and(ANSWER, {"role": "system", "content": "S"}, {"role": "user", "content": "r"}, ANSWER),
        "a system prompt within the conversation",
        user_and(ANSWER, {"role": "user", "content": "r"}, ANSWER),
    ),
    (
        "conversation",
        {"messages": [{"role": "system", "content": ""}, *user_and(ANSWER)["messages"]]},
        "an empty system prompt",
        user_and(ANSWER),
    ),
    (
        "sharegpt",
        user_and(CALL, {"role": "tool", "content": "t"}, ANSWER),
        "text beside a call of a tool",
        user_and({**CALL, "content": ""}, {"role": "tool", "content": "t"}, ANSWER),
    ),
    ("pair", user_and(CALL, {"role": "tool", "content": "t"}, ANSWER), "calls of tools and their results", None),
    ("conversation", user_and({"role": "user", "content": "r"}, ANSWER), "two questions in a row", None),
    ("conversation", {"messages": [{"role": "user", "content": ""}, ANSWER]}, "an empty question", None),
    ("text", user_and(ANSWER), "a conversation: which text it is", None),
    ("messages", {"input_ids": [1, 2]}, "tokens, which are neither", None),
]


@pytest.mark.parametrize(("form", "row", "what", "left"), LOSSES)
def test_what_is_lost_is_named_and_only_then_lost(
    form: str, row: dict[str, Any], what: str, left: dict[str, Any] | None, tmp_path: Path
) -> None:
    good = {"text": "t"} if form == "text" else user_and(ANSWER)
    kind = "ids" if "input_ids" in row else "auto"
    rows = [row, row] if kind == "ids" or form == "text" else [good, row]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with pytest.raises(LaunchError) as caught:
        convert(str(source), out, form)
    assert f"{source}:2: {form} cannot hold {what}" in caught.value.message
    assert "--lossy" in caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]
    if rows[0] is row:
        with pytest.raises(LaunchError, match="can hold none of the 2 rows"):
            convert(str(source), out, form, lossy=True)
        assert not out.exists()
        return
    found = convert(str(source), out, form, lossy=True)
    (lost,) = found.lost
    assert lost.startswith(what)
    assert found.lost[lost] == 1
    assert (found.rows, found.left_out) == ((2, 0) if left else (1, 1))
    expected = write(tmp_path / "expected.jsonl", [good, left] if left else [good])
    assert rows_of(out) == rows_of(expected)


def test_twenty_rows_are_listed_and_no_more(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [user_and({**ANSWER, "loss": True})] * 25)
    with pytest.raises(LaunchError) as caught:
        convert(str(source), tmp_path / "out.jsonl", "alpaca")
    lines = caught.value.message.splitlines()
    assert len(lines) == 21
    assert lines[19].startswith(f"{source}:20: ")
    assert lines[20] == "(reading stopped after 20 such rows)"


def test_wrong_flags_are_told_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("")
    with pytest.raises(LaunchError) as caught:
        convert(str(tmp_path / "none.json"), out, "openai", format="chatml")
    said = caught.value.message.splitlines()
    assert [words in line for words, line in zip(("--to openai", "--from chatml", ".jsonl nor .json", "exists already", "does not exist"), said, strict=True)] == [True] * 5  # fmt: skip


def test_rows_that_cannot_be_read_stop_it(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(user_and(ANSWER)) + "\n{oops\n" + json.dumps(user_and()) + "\n")
    with pytest.raises(TrainError) as caught:
        convert(str(source), tmp_path / "out.jsonl", "pair")
    assert [line.split(": ")[0] for line in caught.value.message.splitlines()] == [f"{source}:2", f"{source}:3"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_rows_are_streamed(tmp_path: Path) -> None:
    """The first row is written before the last is read."""
    source = write(tmp_path / "in.jsonl", [user_and(ANSWER)] * 3)
    taken: list[Row] = []

    def rows() -> Any:
        for row in read_rows((DataFile(str(source), "auto"),), 0):
            taken.append(row)
            yield row

    from launcher.data_convert import Converted, converted_rows

    values = converted_rows(rows(), "pair", False, Converted())
    assert next(values) == {"prompt": "q", "response": "a"}
    assert len(taken) == 1


def test_keys_that_are_not_read_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {
        "id": 7,
        "instruction": "q",
        "input": "",
        "output": "a",
        "system": "S",
        "history": [],
        "tools": "",
        "来源": "x",
    }
    source = write(tmp_path / "in.jsonl", [keys])
    convert(str(source), tmp_path / "a.jsonl", "pair")
    assert f"{source}: keys that are not read, and so not written: id, 来源" in capsys.readouterr().out
    for form in ("messages", "sharegpt", "alpaca", "conversation"):
        convert(str(tmp_path / "a.jsonl"), tmp_path / f"{form}.jsonl", form)
        convert(str(tmp_path / f"{form}.jsonl"), tmp_path / f"{form}_back.jsonl", "messages")
    assert "not read" not in capsys.readouterr().out
