"""A function of the user's own between the file and the formats."""

import json
import sys

import pytest

from trainer.rows import read_rows
from trainer.spec import DataFile, TrainError

CODE = """
import json
TABLE = {"a": "A"}

def chat(row):
    if row.get("skip"):
        return None
    return {"prompt": row["q"], "response": TABLE.get(row["a"], row["a"])}

def two(row):
    return [{"text": row["q"]}, {"text": row["a"]}]

def number(row):
    return 7
"""


def read(tmp_path, function, *rows, code=CODE):
    (tmp_path / "json.py").write_text(code, encoding="utf-8")  # the name of a module of Python's own
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    source = DataFile(str(tmp_path / "d.jsonl"), "auto", map=f"{tmp_path / 'json.py'}:{function}")
    return list(read_rows((source,), 0))


def test_rows_are_made_left_out_and_multiplied(tmp_path):
    rows = [{"q": "1", "a": "a"}, {"skip": True}, {"q": "2", "a": "b"}]
    found = read(tmp_path, "chat", *rows)
    assert [(r.line, r.messages[0].content, r.messages[1].content) for r in found] == [(1, "1", "A"), (3, "2", "b")]
    assert [(r.line, r.text) for r in read(tmp_path, "two", rows[0], rows[2])] == [
        (1, "1"),
        (1, "a"),
        (3 - 1, "2"),
        (2, "b"),
    ]
    assert sys.modules["json"] is json
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("function", "code", "expected"),
    [
        ("chat", CODE, r"d\.jsonl:1: map: chat failed: json\.py:8: KeyError: 'q'"),
        ("number", CODE, r"d\.jsonl:1: map: number returned a number"),
        ("chta", CODE, r"has no function `chta`\nIt has: chat, number, two"),
        ("chat", "def chat(row:\n", r"json\.py cannot be loaded: SyntaxError"),
        ("chat", "import not_there_at_all\n", r"cannot be loaded: json\.py:1: ModuleNotFoundError"),
        ("chat", "def chat(row):\n    return {'reply': 1}\n", r"d\.jsonl:1: the row has the keys reply"),
    ],
)
def test_what_goes_wrong_is_told_with_its_line(tmp_path, function, code, expected):
    with pytest.raises(TrainError) as caught:
        read(tmp_path, function, {"x": 1}, code=code)
    import re

    assert re.search(expected, str(caught.value)), str(caught.value)
