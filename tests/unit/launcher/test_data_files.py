"""`launch data identity` and `launch data replace`: what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import ROOT, Launch

from launcher.data_identity import write_identity
from launcher.data_replace import replace
from launcher.errors import LaunchError, RecipeError


@pytest.mark.parametrize(("language", "name", "author"), [("en", "Ada", "Example Lab"), ("zh", "小薇", "示例实验室")])
def test_identity_rows_have_the_name_and_no_other(language: str, name: str, author: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "identity.jsonl"
    count = write_identity(name, author, language, out)
    text = out.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert count == len(rows) > 80
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    assert sum(name in row["messages"][-1]["content"] for row in rows) > 50
    assert sum(author in json.dumps(row, ensure_ascii=False) for row in rows) > 50
    # Some are about other things.
    assert sum(name not in json.dumps(row, ensure_ascii=False) for row in rows) > 10
    assert not any(word in text for word in ("Wren", "Tunelaunch", "小鹪", "鹪鹩", "bird"))
    with pytest.raises(LaunchError, match="exists already"):
        write_identity(name, author, language, out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"language": "fr"}, "Allowed: en, zh"), ({"name": " "}, "is not a name"), ({"author": "a\nb"}, "is not a name")],
)
def test_identity_refuses(changed: dict[str, str], message: str, tmp_path: Path) -> None:
    arguments = {"name": "Ada", "author": "Lab", "language": "en", **changed}
    with pytest.raises(LaunchError, match=message):
        write_identity(**arguments, out=tmp_path / "x.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_only_strings_change(tmp_path: Path) -> None:
    lines = [
        '{"尖米":  1.50, "text": "我是尖米。尖米！", "n": 1e5, "deep": [{"a": "\\u5c16\\u7c73 \\n"}]}\r\n',
        "\n",
        '{"text":"nothing here", "x": null}\n',
        '{"text": "a \\"quoted\\" 尖米", "b": "\\\\"}',
    ]
    source = tmp_path / "in.jsonl"
    source.write_bytes("".join(lines).encode())
    found = replace(source, tmp_path / "out.jsonl", [("尖米", "小薇")])
    assert (found.rows, found.changed_rows, found.replacements) == (3, 2, 4)
    expected = [
        '{"尖米":  1.50, "text": "我是小薇。小薇！", "n": 1e5, "deep": [{"a": "\\u5c0f\\u8587 \\n"}]}\r\n',
        "\n",
        '{"text":"nothing here", "x": null}\n',
        '{"text": "a \\"quoted\\" 小薇", "b": "\\\\"}',
    ]
    assert (tmp_path / "out.jsonl").read_bytes().decode() == "".join(expected)


def test_several_pairs_are_replaced_at_once(tmp_path: Path) -> None:
    source = tmp_path / "in.json"
    source.write_text('[\n  {"q": "Ann, Anna and Bob"},\n  {"q": "none"}\n]\n', encoding="utf-8")
    found = replace(source, tmp_path / "out.json", [("Ann", "Bob"), ("Bob", "Ann"), ("Anna", "Eve")])
    assert (tmp_path / "out.json").read_text() == '[\n  {"q": "Bob, Eve and Ann"},\n  {"q": "none"}\n]\n'
    assert (found.rows, found.changed_rows, found.replacements) == (2, 1, 3)


def test_nothing_is_written_when_something_is_wrong(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"a": "x"}\n{"a": \nnot json\n', encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        replace(source, tmp_path / "out.jsonl", [("x", "y")])
    assert [p.where.rpartition(":")[2] for p in caught.value.problems] == ["2", "3"]
    source.write_text('{"x": "a"}\n', encoding="utf-8")
    with pytest.raises(LaunchError, match="no string has 'x' in it"):
        replace(source, tmp_path / "out.jsonl", [("x", "y")])
    with pytest.raises(LaunchError, match="exists already"):
        replace(source, source, [("a", "b")])
    with pytest.raises(LaunchError, match="is empty"):
        replace(source, tmp_path / "out.jsonl", [("", "b")])
    broken = tmp_path / "b.json"
    broken.write_text('[\n {"a": }\n]')
    with pytest.raises(RecipeError, match=r"b\.json:2:8: is no JSON"):
        replace(broken, tmp_path / "out.json", [("a", "b")])
    source.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(LaunchError, match="not UTF-8"):
        replace(source, tmp_path / "out.jsonl", [("a", "b")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.json", "in.jsonl"]


@pytest.mark.parametrize("flags", ["identity", "replace", "convert", "import", "new"])
def test_an_out_that_cannot_be_written_is_said(flags: str, tmp_path: Path, launch: Launch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    out = f"{rows}/x/out.{'yaml' if flags in ('import', 'new') else 'jsonl'}"
    argv = {
        "identity": ["data", "identity", "--name", "Ada", "--author", "Lab", "--out", out],
        "replace": ["data", "replace", str(rows), out, "--old", "a", "--new", "c"],
        "convert": ["data", "convert", str(rows), out, "--to", "messages"],
        "import": ["recipes", "import", str(ROOT / "tests/golden/imports/trl/sft.yaml"), "--out", out],
        "new": [
            "recipes",
            "new",
            "--model",
            "Qwen/Qwen2.5-0.5B-Instruct",
            "--method",
            "lora",
            "--data",
            str(rows),
            "--out",
            out,
        ],
    }[flags]
    done = launch(*argv, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "Choose another place with --out." in done.stderr
    assert list(tmp_path.iterdir()) == [rows]
