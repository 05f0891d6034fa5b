"""YAML as a recipe reads it: values, positions, and everything that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.recipe_yaml import Place, parse_file, parse_flag_value


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(text: str | bytes) -> tuple[Any, list[str]]:
    """(plain values, "where: message" of each problem) of `text` in a file r.yaml."""
    path = Path("r.yaml")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    node, problems = parse_file(path)
    return node and node.plain(), [f"{p.where}: {p.message}" for p in problems]


def hint(text: str | bytes) -> str:
    parse(text)
    return parse_file(Path("r.yaml"))[1][0].hint


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        ("1.5e+3", 1500.0),
        ("-3", -3),
        (".5", 0.5),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("017", "017"),
        ("0o17", "0o17"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2024-01-02", "2024-01-02"),
        ("'2'", "2"),
        ('"true"', "true"),
        ("", None),
        ("~", None),
        ("null", None),
        ("nan", "nan"),
        ("小薇", "小薇"),
        ("a#b", "a#b"),
    ],
)
def test_scalars_follow_the_harmless_rules(folder: Path, written: str, value: Any) -> None:
    values, problems = parse(f"k: {written}\n")
    assert problems == []
    assert values == {"k": value}
    assert type(values["k"]) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3:1: the key a is given twice; the first is at r.yaml:1:1"),
        ("s:\n  x: 1\n  x: 1\n", "r.yaml:3:3: the key x is given twice; the first is at r.yaml:2:3"),
        ("a: .inf\n", "r.yaml:1:4: .inf is not a finite number"),
        ("a: -.INF\n", "r.yaml:1:4: -.INF is not a finite number"),
        ("a: .nan\n", "r.yaml:1:4: .nan is not a finite number"),
        ("a: 1e999\n", "r.yaml:1:4: 1e999 is too large a number"),
        ("a: &x 1\n", "r.yaml:1:4: the anchor &x is not allowed in a recipe"),
        ("a: !!str 1\n", "r.yaml:1:4: the tag tag:yaml.org,2002:str is not allowed in a recipe"),
        ("a: !ours 1\n", "r.yaml:1:4: the tag !ours is not allowed in a recipe"),
        ("? [a, b]\n: 1\n", "r.yaml:1:3: a key must be a word, not a list or mapping"),
        ("- a\n- b\n", "r.yaml:1:1: a recipe is made of `key: value` lines; here is a list"),
        ("just text\n", "r.yaml:1:1: a recipe is made of `key: value` lines; here is a single text"),
        ("", "r.yaml:1:1: nothing is written here"),
        ("# only a comment\n", "r.yaml:1:1: nothing is written here"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1: a second document starts here"),
        ("train:\n\tepochs: 1\n", "r.yaml:2:1: a tab stands here; YAML wants spaces"),
        ("a:\tb\n", "r.yaml:1:3: a tab stands here; YAML wants spaces"),
        ('a: "open\nb: 1\n', "r.yaml:1:4: this quote is never closed"),
        ("a: [1, 2\nb: 3\n", "r.yaml:1:4: this [list] or {mapping} is not closed, or lacks a comma"),
        ("a: b: c\n", "r.yaml:1:5: a second `: ` on one line, or a line indented too far"),
        ("s:\n  x: 1\n y: 2\n", "r.yaml:3:2: the indentation does not fit the lines above"),
        ("a: 1\nword\nb: 2\n", "r.yaml:2:1: a line without `key: value`"),
        ("a: @home\n", "r.yaml:1:4: a text cannot start with @"),
        ("a: x\x07y\n", "r.yaml:1:5: the character U+0007 is not allowed in YAML"),
        ("model：Qwen/Qwen2.5-7B\nmethod: lora\n", "r.yaml:1:1: a full-width colon ： stands after the key"),
        ("model：Qwen\n", "r.yaml:1:1: a full-width colon ： stands after the key"),
    ],
)
def test_what_a_recipe_may_not_contain(folder: Path, text: str, expected: str) -> None:
    _, problems = parse(text)
    assert problems == [expected]


def test_alias_and_merge_key_are_each_one_problem(folder: Path) -> None:
    _, problems = parse("a: &x {b: 1}\nc: *x\nd:\n  <<: {e: 1}\n")
    assert problems == [
        "r.yaml:1:4: the anchor &x is not allowed in a recipe",
        "r.yaml:2:4: the alias *x is not allowed in a recipe",
        "r.yaml:4:3: the merge key << is not allowed in a recipe",
    ]


def test_positions_of_keys_values_and_items(folder: Path) -> None:
    Path("r.yaml").write_text("a: 1\nlist:\n  - x\n  - {k: v}\n", encoding="utf-8")
    node, _ = parse_file(Path("r.yaml"))
    assert node is not None
    items = node.value["list"].value
    assert str(node.value["list"].key_at) == "r.yaml:2:1"
    assert str(items[0].at) == "r.yaml:3:5"
    assert str(items[1].value["k"].key_at) == "r.yaml:4:6"
    assert str(items[1].value["k"].at) == "r.yaml:4:9"
    assert items[0].at.origin == "r.yaml:3"


def test_gbk_file_is_named_with_the_way_out(folder: Path) -> None:
    data = "model: 你好\nmethod: lora\n".encode("gbk")
    assert parse(data) == (None, ["r.yaml:1:8: the file is not UTF-8 (byte 0xC4); it seems to be GBK"])
    assert "iconv -f GBK -t UTF-8 r.yaml" in hint(data)


@pytest.mark.parametrize(
    ("encoding", "name", "text"),
    [
        ("utf-16", "UTF-16", "model: 通义"),
        ("big5", "BIG5", "model: 這是繁體中文的設定檔案"),
        ("latin-1", "WINDOWS-1252", "model: café crème\n"),
    ],
)
def test_other_encodings_are_guessed(folder: Path, encoding: str, name: str, text: str) -> None:
    assert parse(text.encode(encoding))[1][0].endswith(f"it seems to be {name}")


def test_byte_order_mark_is_no_part_of_the_first_key(folder: Path) -> None:
    assert parse("模型: a\n".encode("utf-8-sig")) == ({"模型": "a"}, [])


def test_space_after_the_colon_is_suggested(folder: Path) -> None:
    assert "space after the colon" in hint("learning_rate:2e-4\n")


def test_unreadable_file_is_one_problem(folder: Path) -> None:
    node, problems = parse_file(Path("absent.yaml"))
    assert node is None
    assert problems[0].where == "absent.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("yes", "yes"),
        ("[a, 2]", ["a", 2]),
        ("{a: [x]}", {"a": ["x"]}),
        ('"017"', "017"),
        ("Answer: yes # really", "Answer: yes # really"),
        ("*star", "*star"),
        ("", None),
    ],
)
def test_flag_values_are_scalars_or_flow(text: str, value: Any) -> None:
    node, problems = parse_flag_value(text, Place("--set k=v", 0, 0, Path.cwd()))
    assert problems == []
    assert node is not None
    assert node.plain() == value


@pytest.mark.parametrize("text", ["[a, b", ".inf", '"x', "[a: b: c]", "[*x]"])
def test_bad_flag_values_name_the_flag(text: str) -> None:
    _, problems = parse_flag_value(text, Place("--set k=v", 0, 0, Path.cwd()))
    assert {p.where for p in problems} == {"--set k=v"}
