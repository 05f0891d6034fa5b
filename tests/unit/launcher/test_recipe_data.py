"""Sources of rows in a recipe: where they lie, what the plan says of them, and dataset_info.json of LLaMA-Factory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.recipe import LoadedRecipe, dump_recipe, load_recipe
from launcher.recipe_data import local_files, sources_of
from launcher.upload import collect
from trainer.spec import DataFile, RowNames

ALPACA = {"instruction": "a", "output": "b"}
INFO = {
    "plain": {"file_name": "rows.json"},
    "chat": {"file_name": "chat.json", "formatting": "sharegpt"},
    "renamed": {"file_name": "rows.json", "columns": {"prompt": "instruction", "response": "output"}, "num_samples": 5},
    "text": {"file_name": "rows.json", "columns": {"prompt": "output"}},
    "tagged": {
        "file_name": "chat.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    },
    "openai": {
        "file_name": "chat.json",
        "formatting": "openai",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "hub": {"hf_hub_url": "org/name", "ms_hub_url": "ms/name", "subset": "en", "split": "test"},
    "ms": {"ms_hub_url": "ms/name"},
    "dpo": {"file_name": "rows.json", "ranking": True, "columns": {"prompt": "a", "chosen": "b", "rejected": "c"}},
    "kto": {"file_name": "rows.json", "columns": {"prompt": "a", "kto_tag": "b"}},
    "pictures": {"file_name": "rows.json", "columns": {"prompt": "a", "images": "b"}},
    "script": {"script_url": "loader"},
    "odd": {"file_name": "rows.json", "columns": {"promt": "a"}},
    "gone": {"file_name": "not_there.json"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lf").mkdir()
    (tmp_path / "lf" / "dataset_info.json").write_text(json.dumps(INFO, indent=2), encoding="utf-8")
    (tmp_path / "lf" / "rows.json").write_text(json.dumps([ALPACA]), encoding="utf-8")
    (tmp_path / "lf" / "chat.json").write_text("[]", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ALPACA) + "\n", encoding="utf-8")
    (tmp_path / "my_rows.py").write_text("def f(row):\n    return row\n", encoding="utf-8")
    return tmp_path


def load(data: str) -> LoadedRecipe:
    Path("r.yaml").write_text(f"model: a/b\nmethod: lora\ndata: {data}\n", encoding="utf-8")
    return load_recipe(Path("r.yaml"))


def sources(data: str) -> tuple[DataFile, ...]:
    return sources_of(load(data).recipe.data.files)


def refused(data: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(data)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", DataFile("org/name", "auto", "hub")),
        ("org/name:en", DataFile("org/name", "auto", "hub", "en")),
        ("'org/name:en#500'", DataFile("org/name", "auto", "hub", "en", max_rows=500)),
        (
            "{files: [{path: 'org/name#500', max_rows: 20, split: test}]}",
            DataFile("org/name", "auto", "hub", split="test", max_rows=20),
        ),
        ("hub:lf/name", DataFile("lf/name", "auto", "hub")),
        ("modelscope:org/name", DataFile("org/name", "auto", "modelscope")),
    ],
)
def test_datasets_of_hubs(text: str, expected: DataFile) -> None:
    assert sources(text) == (expected,)


def test_every_key_of_a_source_reaches_the_plan(folder: Path) -> None:
    text = (
        "{path: rows.jsonl, format: sharegpt, weight: 0.5, max_rows: 7, map: my_rows.py:f, "
        "columns: {messages: m, system: s}, tags: {user_tag: Q}}"
    )
    (found,) = sources(f"{{files: [{text}]}}")
    names = RowNames(messages="m", system="s", user_tag="Q")
    assert found == DataFile(
        str(folder / "rows.jsonl"), "sharegpt", weight=0.5, max_rows=7, names=names, map=f"{folder / 'my_rows.py'}:f"
    )


def test_the_plan_says_what_rows_are(folder: Path) -> None:
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    (folder / "c.parquet").write_bytes(b"PAR1")
    (folder / "bad.jsonl").write_text('{"reply": 1}\n', encoding="utf-8")
    (folder / "many").mkdir()
    for name in ("1.jsonl", "2.jsonl"):
        (folder / "many" / name).write_text('[{"role": "user"}]\n', encoding="utf-8")
    found = load(
        "[rows.jsonl, {path: b.jsonl.gz, weight: 0.5, max_rows: 9}, c.parquet, {path: rows.jsonl, format: alpaca}, "
        "'org/name:en', bad.jsonl, {path: rows.jsonl, map: my_rows.py:f}, many]"
    ).sources
    assert found == (
        f"{folder}/rows.jsonl (alpaca, by its first row)",
        f"{folder}/b.jsonl.gz (text, by its first row; weight 0.5: each row 0.5 times an epoch; its first 9 rows)",
        f"{folder}/c.parquet (format by its first row, when it is prepared)",
        f"{folder}/rows.jsonl (alpaca, as the recipe says)",
        "Hub dataset org/name:en (format by its first row, when it is prepared; split train)",
        f"{folder}/bad.jsonl (its first row cannot be read: {folder}/bad.jsonl:1: the row has the keys reply, which is none of the known formats)",
        f"{folder}/rows.jsonl (rows as {folder}/my_rows.py:f makes them)",
        f"{folder}/many (its first row cannot be read: {folder}/many/1.jsonl:1: turn 1 has no `content`, but the keys role)",
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("{files: [{path: rows.jsonl, weight: 0}]}", "weight: 0; expected a number, more than 0"),
        ("{files: [{path: rows.jsonl, map: my_rows.py}]}", "expected a Python file and a function in it"),
        ("{files: [{path: rows.jsonl, map: my_row.py:f}]}", "Did you mean my_rows.py?"),
        ("{files: [{path: rows.jsonl, split: 'train[:5]'}]}", "expected the name of a split, without brackets"),
        ("{files: [{path: rows.jsonl, columns: {response: a}}]}", "columns names neither prompt, query nor messages"),
        ("{files: [{path: rows.jsonl, columns: {prompt: a, messages: b}}]}", "columns names both messages and prompt"),
        ("{files: [{path: rows.jsonl, columns: {promt: a}}]}", "did you mean prompt?"),
        ("{files: [{path: rows.jsonl, format: ids, columns: {prompt: a}}]}", "columns has no meaning for format ids"),
        (
            "{files: rows.jsonl, held_out_files: [{path: my.jsonl, weight: 2}]}",
            "a weight has no meaning for held-out rows",
        ),
        ("{files: plain, dataset_info: nowhere}", "there is no nowhere"),
        ("{files: rows.jsonl, dataset_info: lf}", "none of its names is used"),
        ("{files: dpo, dataset_info: lf}", "dpo: holds ranking rows (ranking: true)"),
        ("{files: kto, dataset_info: lf}", "kto: holds ranking rows (columns.kto_tag)"),
        ("{files: pictures, dataset_info: lf}", "pictures: has columns.images"),
        ("{files: script, dataset_info: lf}", "script: `script_url` is not supported"),
        ("{files: odd, dataset_info: lf}", "odd: `promt` in columns is unknown"),
        ("{files: gone, dataset_info: lf}", "not_there.json does not exist"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(folder: Path, data: str, expected: str) -> None:
    (folder / "my.jsonl").write_text("{}\n", encoding="utf-8")
    text = refused(data)
    assert expected in text
    assert text.startswith("r.yaml:3:")


def test_a_refusal_of_dataset_info_names_its_line() -> None:
    line = json.dumps(INFO, indent=2).split("\n").index('  "dpo": {') + 1
    assert len(refused("{files: dpo, dataset_info: lf}").splitlines()) == 2, "one problem with its hint"
    assert f"r.yaml:3:15: lf/dataset_info.json:{line}: dpo: holds ranking rows" in refused(
        "{files: dpo, dataset_info: lf}"
    )


def test_dataset_info_is_read_as_it_is(folder: Path) -> None:
    names = "[plain, chat, renamed, text, tagged, openai, hub, ms, {path: plain, weight: 2}, rows.jsonl]"
    rows, chat = str(folder / "lf" / "rows.json"), str(folder / "lf" / "chat.json")
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
    expected = (
        DataFile(rows, "alpaca"),
        DataFile(chat, "sharegpt"),
        DataFile(rows, "auto", max_rows=5, names=RowNames(prompt="instruction", response="output")),
        DataFile(rows, "auto", names=RowNames(prompt="output")),
        DataFile(chat, "sharegpt", names=RowNames(messages="conversations", tools="tools", **tags)),
        DataFile(chat, "messages", names=RowNames(messages="messages")),
        DataFile("org/name", "alpaca", "hub", "en", "test"),
        DataFile("ms/name", "alpaca", "modelscope"),
        DataFile(rows, "alpaca", weight=2.0),
        DataFile(str(folder / "rows.jsonl"), "auto"),
    )
    loaded = load(f"{{files: {names}, dataset_info: lf}}")
    assert sources_of(loaded.recipe.data.files) == expected
    assert any("LLaMA-Factory draws them at random" in note for note in loaded.notes)
    # One file that says the same from any folder, without dataset_info.json.
    elsewhere = folder / "other" / "r.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(dump_recipe(loaded), encoding="utf-8")
    assert sources_of(load_recipe(elsewhere).recipe.data.files) == expected


def test_hosts_compare_every_file_that_decides(folder: Path) -> None:
    (folder / "many").mkdir()
    for name in ("2.jsonl", "1.jsonl"):
        (folder / "many" / name).write_text("{}\n", encoding="utf-8")
    found = local_files(load("[many, org/name, {path: '*.jsonl', map: my_rows.py:f}]").recipe.data)
    expected = ["many/1.jsonl", "many/2.jsonl", "rows.jsonl", "my_rows.py"]
    assert found == [str(folder / name) for name in expected]


def test_an_upload_holds_folders_patterns_and_maps(folder: Path) -> None:
    (folder / "many").mkdir()
    for name in ("2.jsonl", "1.jsonl"):
        (folder / "many" / name).write_text(name, encoding="utf-8")
    loaded = load("[many, org/name, {path: '*.jsonl', map: my_rows.py:f, weight: 2}, rows.jsonl]")
    recipe, *items = collect(loaded, [])
    sent = {item.name: str(item.source) for item in items}
    assert sent == {
        "data/rows_1/00000_1.jsonl": str(folder / "many" / "1.jsonl"),
        "data/rows_1/00001_2.jsonl": str(folder / "many" / "2.jsonl"),
        "data/rows_3/00000_rows.jsonl": str(folder / "rows.jsonl"),
        "data/my_rows.py": str(folder / "my_rows.py"),
    }
    there = folder / "there"
    for item in items:
        assert item.source is not None
        (there / item.name).parent.mkdir(parents=True, exist_ok=True)
        (there / item.name).write_bytes(item.source.read_bytes())
    (there / "r.yaml").write_text(recipe.text, encoding="utf-8")
    first, second, third, fourth = sources_of(load_recipe(there / "r.yaml").recipe.data.files)
    assert (first.path, second.path) == (str(there / "data" / "rows_1"), "org/name")
    assert (third.path, third.map, third.weight) == (str(there / "data" / "rows_3"), f"{there}/data/my_rows.py:f", 2.0)
    assert Path(fourth.path).read_bytes() == (folder / "rows.jsonl").read_bytes()
