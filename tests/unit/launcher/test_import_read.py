"""Other programs' files read as data: Python never runs, YAML and shell keep their lines."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.import_python import PythonConfig, Symbol, Unreadable, read_python
from launcher.import_read import read_commands, read_json, read_yaml
from launcher.recipe import load_recipe
from launcher.recipe_yaml import Place

START = Place("x", 1, 1, Path("/nowhere"))


def python(text: str) -> PythonConfig:
    return read_python(text, START)


def value(text: str, name: str = "x") -> object:
    return python(text).variables[name].plain()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 2 * 8 + 1", 17),
        ("x = int(2048 - (336 / 14) ** 2)", 1472),
        ("a = 3\na *= 4\nx = a", 12),
        ("r = '../data'\nx = f'{r}/a.json'", "../data/a.json"),
        ("import os\nx = os.path.join('a', 'b.json')", "a/b.json"),
        ("n = 4\nx = 'many' if n > 1 else 'one'", "many"),
        ("x = [1]\nif True:\n    x += [2]\nelse:\n    x += [3]", [1, 2]),
        ("d = dict(a=1, b=dict(c=2))\nx = d['b']['c']", 2),
        ("d = dict(a=1)\nd['a'] = 5\nd.update(b=6)\nx = d", {"a": 5, "b": 6}),
        ("c = dict(a=1)\nx = dict(b=2, **c)", {"b": 2, "a": 1}),
        ("x = []\nx.append('a')", ["a"]),
        ("a, b = 1, 2\nx = b", 2),
        ("x: int = -3", -3),
    ],
)
def test_simple_python_is_calculated(text: str, expected: object) -> None:
    assert value(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "x = open('/etc/passwd').read()",
        "x = __import__('os').system('true')",
        "x = [i for i in range(3)]",
        "x = 0\nfor i in range(3):\n    x = i",
        "x = 10 ** 10 ** 10",
        "x = 'a' * 10 ** 8",
        "x = 'ab'\n" + "x = x + x\n" * 40,
        "x = 3\n" + "x = x * x\n" * 40,
        "x = 'a'\n" + "x = f'{x}{x}'\n" * 40,
        "x = '%1000000000s' % 'a'",
        "x = 1 / 0",
        "x = 2\ntry:\n    x = 3\nexcept Exception:\n    pass",
        "d = dict()\nd.pop('x')\nx = d",
    ],
)
def test_what_would_have_to_run_is_unreadable_and_is_not_run(text: str) -> None:
    assert isinstance(python(text).variables["x"].value, Unreadable)


def test_lists_of_lists_stay_small() -> None:
    assert len(str(value("x = [1]\n" + "x = [x, x]\n" * 60))) < 10**6


def test_a_dict_put_into_itself_ends() -> None:
    assert value("x = dict(a=1)\nx['b'] = x") == {"a": 1, "b": {"a": 1}}


def test_nothing_of_a_config_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    python(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nx = [pathlib.Path({str(mark)!r}).touch()]\n")
    assert not mark.exists()


def test_imported_names_are_symbols_with_their_line() -> None:
    node = python("import torch\nx = dict(\n    dtype=torch.float16,\n)").variables["x"].value["dtype"]
    assert (node.value, node.value.last, node.key_at.line) == (Symbol("torch.float16"), "float16", 3)


def test_names_that_are_read_are_known() -> None:
    config = python("a = 1\nb = a\nif a:\n    c = 2")
    assert config.used == {"a"}
    assert set(config.variables) == {"a", "b", "c"}


def test_a_syntax_error_has_its_line() -> None:
    with pytest.raises(RecipeError, match=r"x:2:\d+: not Python: "):
        python("a = 1\nb = = 2\n")


def test_yaml_takes_what_pyyaml_takes() -> None:
    text = "base: &b {lr: 2e-4, on: yes}\nown:\n  <<: *b\n  lr: 1e-5\n  off: off\nlist: [*b]\nquoted: 'yes'\n"
    node = read_yaml(text, START)
    assert node.plain() == {
        "base": {"lr": 2e-4, "on": True},
        "own": {"lr": 1e-5, "on": True, "off": False},
        "list": [{"lr": 2e-4, "on": True}],
        "quoted": "yes",
    }
    assert node.value["own"].value["lr"].key_at.line == 4


@pytest.mark.parametrize(
    "text",
    [
        "a: [1, 2\n",
        "a: 1\n b: 2\n",
        "",
        "? [a]\n: 1\n",
        "a: &x [*x]\n",
        "a: &a [1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopqrst")),
    ],
)
def test_yaml_that_is_none_is_an_error_with_its_line(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^x:\d+:\d+: "):
        read_yaml(text, START)


def test_json_keys_have_their_line() -> None:
    node = read_json('{\n\t"a": 1,\n\t"b": {"c": "\\ud83d\\ude00"}\n}', START)
    assert node.plain() == {"a": 1, "b": {"c": "😀"}}
    assert [node.value["a"].key_at.line, node.value["b"].value["c"].key_at.line] == [2, 3]
    with pytest.raises(RecipeError, match=r"x:1:7: not valid JSON"):
        read_json('{"a": }', START)


def test_commands_keep_lines_variables_and_environment() -> None:
    text = (
        "#!/bin/bash\nMODEL=org/name  # the model\nexport A=1\nB=2 \\\nswift sft \\\n  --model ${MODEL} \\\n"
        "  --system 'two words' \\\n  --x=\"$UNSET\"\necho done && ls | wc\n"
    )
    first, *rest = read_commands(text, START)
    assert [str(w.value) for w in first.words] == [
        "swift",
        "sft",
        "--model",
        "org/name",
        "--system",
        "two words",
        "--x=$UNSET",
    ]
    assert [w.at.line for w in first.words] == [5, 5, 6, 6, 7, 7, 8]
    assert {k: n.value for k, n in first.environment.items()} == {"A": "1", "B": "2"}
    assert [[str(w.value) for w in c.words] for c in rest] == [["echo", "done"], ["ls"], ["wc"]]


@pytest.mark.parametrize("text", ["$(expr 16 / $N)", "$((16 / N))", "$((16/$N))", "$(( (15 + 1) / ${N} ))"])
def test_sums_of_whole_numbers_are_calculated(text: str) -> None:
    (command,) = read_commands(f"N=2\nswift sft --x {text} --y 1\n", START)
    expected = "8" if "/ N" not in text else text
    assert " ".join(str(w.value) for w in command.words) == f"swift sft --x {expected} --y 1"


def test_an_open_quote_is_an_error() -> None:
    with pytest.raises(RecipeError, match="x:1:1: not a shell command"):
        read_commands("swift sft --system 'open\n", START)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ntemplate: qwen\n", "LLaMA-Factory"),
        ("base_model: m\nadapter: lora\ndatasets: []\n", "Axolotl"),
        ("model: m\ntrain_type: lora\nsplit_dataset_ratio: 0\n", "ms-swift"),
        ("model_name_or_path: m\nuse_peft: true\ndataset_name: d\n", "TRL"),
    ],
)
def test_settings_of_another_program_in_place_of_a_recipe(tmp_path: Path, text: str, program: str) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert f"{path}:1:1: these are settings of {program} (" in str(caught.value)
    assert f"launch recipes import {path}" in str(caught.value)


def test_a_recipe_with_a_key_of_another_program_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: random:.\nmethod: full\ndata: a.jsonl\nstage: sft\ntemplate: qwen\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="unknown key `stage`"):
        load_recipe(path)
