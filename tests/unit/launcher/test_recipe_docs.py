"""Generated pages are current, and the JSON Schema agrees with the loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from launcher.recipe import load_recipe
from launcher.recipe_docs import generated_files, json_schema, origin_rows
from launcher.recipe_fields import fields
from launcher.recipe_library import find, shipped_names
from launcher.recipe_words import EXAMPLES, FOREIGN_KEYS, FOREIGN_VALUES, NO_SUCH_KEY
from launcher.recipe_yaml import parse_file

VALIDATOR = Draft202012Validator(json_schema())


def test_generated_files_are_current() -> None:
    for path, text in generated_files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is old: run python -m launcher.recipe_docs"


def test_every_key_has_a_sentence() -> None:
    for field in fields().values():
        assert field.sentence.endswith("."), field.path
        assert field.allowed, field.path


def test_every_key_is_on_the_reference_page() -> None:
    page = next(text for path, text in generated_files().items() if path.name == "recipe_reference.md")
    for field in fields().values():
        name = field.path.rpartition(".")[2]
        assert f"## {field.name}" in page or f"| `{name}` |" in page


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_fit_the_schema_for_editors(name: str) -> None:
    node, _ = parse_file(find(name))
    assert node is not None
    assert [e.message for e in VALIDATOR.iter_errors(node.plain())] == []


def test_the_schema_is_valid_itself() -> None:
    assert Draft202012Validator(Draft202012Validator.META_SCHEMA).is_valid(json_schema())


HEAD: dict[str, Any] = {"model": "a/b", "method": "lora", "data": "d.jsonl"}


@pytest.mark.parametrize(
    "value",
    [
        HEAD,
        {"extends": "qwen_qlora", "method": {"rank": 8}},
        {**HEAD, "data": ["a.jsonl", {"path": "b.json", "format": "text"}]},
        {**HEAD, "data": {"files": "a.jsonl", "system": None}},
        {**HEAD, "evaluate": ["a", {"user": "b", "contains": ["c"], "system": None}]},
        {**HEAD, "parallel": {"zero": "auto", "sp": 2}},
    ],
)
def test_what_the_schema_takes(value: Any) -> None:
    assert VALIDATOR.is_valid(value)


@pytest.mark.parametrize(
    "value",
    [
        {"model": "a/b"},
        {**HEAD, "lr": 1},
        {**HEAD, "method": "sft"},
        {**HEAD, "train": {"epochs": None}},
        {**HEAD, "train": {"epochs": "3"}},
        {**HEAD, "train": {"micro_batch": 0}},
        {**HEAD, "train": None},
        {**HEAD, "data": []},
        {**HEAD, "run": {"name": "a b"}},
    ],
)
def test_what_the_schema_refuses(value: Any) -> None:
    assert not VALIDATOR.is_valid(value)


def test_translations_lead_to_keys_that_exist() -> None:
    names = {field.name for field in fields().values()}
    own = {field.path.rpartition(".")[2] for field in fields().values()}
    assert set(FOREIGN_KEYS.values()) <= names
    assert not set(FOREIGN_KEYS) & own, "a translation hides a key of ours"
    assert not set(FOREIGN_KEYS) & set(NO_SUCH_KEY)
    assert not set(NO_SUCH_KEY) & own
    assert set(EXAMPLES) <= set(FOREIGN_KEYS) | own
    literals = {str(v) for field in fields().values() for v in field.literals}
    assert set(FOREIGN_VALUES.values()) <= literals


def test_origin_of_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "r.yaml").write_text(
        "model: a/b\nmethod: lora\ndata:\n  files: d.jsonl\n  system: null\n", encoding="utf-8"
    )
    rows = {
        path: (value, origin)
        for path, value, origin in origin_rows(load_recipe(Path("r.yaml"), ["train.learning_rate=1e-5"]))
    }
    assert rows["model.source"] == ("a/b", "r.yaml:1")
    assert rows["data.files.0.path"] == (str(tmp_path / "d.jsonl"), "r.yaml:4")
    assert rows["data.system"] == ("null", "r.yaml:5")
    assert rows["train.learning_rate"] == ("1e-5", "--set")
    assert rows["train.betas"] == ("[0.9, 0.999]", "default")
    assert "train.max_steps" not in rows
