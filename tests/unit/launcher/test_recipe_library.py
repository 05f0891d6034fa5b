"""Finding, listing and copying shipped recipes, and the recipes themselves."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from launcher.errors import LaunchError
from launcher.recipe import load_recipe
from launcher.recipe_library import copy, find, list_recipes, read_header, shipped_folder, shipped_names

NAMES = [
    "continued_pretraining",
    "deepseek_r1_distill_qwen_1_5b_qlora",
    "internlm2_chat_1_8b_qlora",
    "long_context_sp",
    "qwen_full_zero3",
    "qwen_lora",
    "qwen_qlora",
    "smollm2_identity",
    "tiny_cpu",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_recipes_are_shipped() -> None:
    assert shipped_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_loads_and_introduces_itself(name: str) -> None:
    path = find(name)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert lines[0] == "# yaml-language-server: $schema=../docs/recipe.schema.json"
    header = read_header(path)
    assert all(header.values()), header
    assert header["run"].startswith(f"launch recipes/{name}.yaml")
    loaded = load_recipe(path)
    assert loaded.name == name
    assert all(Path(f.path).is_file() for f in loaded.recipe.data.files)


def test_batches_can_be_shared_by_1_2_and_4_devices() -> None:
    for name in NAMES:
        train = load_recipe(find(name)).recipe.train
        if name != "smollm2_identity":
            assert train.global_batch is not None
            assert train.global_batch % (4 * train.micro_batch) == 0, name


def test_identity_questions_are_not_in_the_training_rows() -> None:
    recipe = load_recipe(find("smollm2_identity")).recipe
    text = "".join(Path(f.path).read_text(encoding="utf-8") for f in recipe.data.files)
    prompts = recipe.evaluate.prompts
    assert len([p for p in prompts if "Wren" in p.contains or "Tunelaunch" in p.contains]) == 10
    assert len(prompts) == 13
    normal = re.sub(r"[^a-z]+", " ", text.lower())
    assert not [p.user for p in prompts if re.sub(r"[^a-z]+", " ", p.user.lower()).strip() in normal]


def test_example_data_holds_the_rows_it_should() -> None:
    for file, count, key in (("example_chat.jsonl", 20, "messages"), ("example_text.jsonl", 10, "text")):
        rows = [
            json.loads(line) for line in (shipped_folder() / "data" / file).read_text(encoding="utf-8").splitlines()
        ]
        assert len(rows) == count
        assert all(row[key] for row in rows)
        assert any(re.search(r"[\u4e00-\u9fff]", json.dumps(row, ensure_ascii=False)) for row in rows)


def test_tiny_model_is_small_and_fits_its_tokenizer() -> None:
    tiny = shipped_folder() / "tiny"
    assert sum(f.stat().st_size for f in tiny.iterdir()) < 60_000
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(tokenizer["model"]["vocab"]) == config["vocab_size"]
    assert tokenizer["model"]["vocab"]["<|im_end|>"] == config["eos_token_id"]


def test_a_path_wins_over_a_shipped_name(folder: Path) -> None:
    assert find("qwen_qlora") == find("qwen_qlora.yaml") == shipped_folder() / "qwen_qlora.yaml"
    (folder / "qwen_qlora.yaml").write_text("x", encoding="utf-8")
    assert find("qwen_qlora.yaml") == Path("qwen_qlora.yaml")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qwen_qlroa", "Did you mean qwen_qlora"),
        ("qwen_qlora.yaml.yaml", "Did you mean qwen_qlora"),
        ("qwen_qlora.py", "Did you mean qwen_qlora"),
        ("internlm2", "Did you mean internlm2_chat_1_8b_qlora"),
        ("mine.yaml.yaml", "Did you mean mine.yaml"),
        ("sub/mine.yml", "Shipped recipes: launch recipes list"),
        ("zzzz", "Shipped recipes: launch recipes list"),
    ],
)
def test_absent_recipes_come_with_near_names(folder: Path, name: str, hint: str) -> None:
    (folder / "mine.yaml").write_text("x", encoding="utf-8")
    with pytest.raises(LaunchError) as caught:
        find(name)
    assert caught.value.message == f"there is no recipe {name}"
    assert hint in caught.value.hint
    assert caught.value.hint.count(" or ") <= 2


def test_list_shows_what_each_is_for() -> None:
    rows = {row.name: row for row in list_recipes()}
    assert sorted(rows) == NAMES
    assert rows["qwen_qlora"].model == "Qwen/Qwen2.5-7B-Instruct"
    assert rows["qwen_qlora"].method == "qlora"
    assert "16 GB" in rows["qwen_qlora"].hardware
    assert rows["tiny_cpu"].model == "random:tiny"
    assert rows["smollm2_identity"].purpose.startswith("Teach SmolLM2")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("internlm2", ["internlm2_chat_1_8b_qlora"]),
        ("INTERNLM", ["internlm2_chat_1_8b_qlora"]),
        ("qwen_*", ["qwen_full_zero3", "qwen_lora", "qwen_qlora"]),
        ("nothing", []),
    ],
)
def test_list_filters(pattern: str, names: list[str]) -> None:
    assert [row.name for row in list_recipes(pattern)] == names


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_loads_to_the_same_recipe_and_needs_nothing_else(name: str, folder: Path) -> None:
    written = copy(name, folder / "mine")
    assert written[0] == folder / "mine" / f"{name}.yaml"
    copied, original = load_recipe(written[0]), load_recipe(find(name))
    shipped = str(shipped_folder())
    assert json.loads(json.dumps(original.values).replace(shipped, str(folder / "mine"))) == copied.values
    assert shipped not in json.dumps(copied.values)
    text = written[0].read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert f"launch mine/{name}.yaml" in text


def test_copy_to_a_new_name(folder: Path) -> None:
    written = copy("qwen_qlora", folder / "first.yaml")
    assert [os.path.relpath(path, folder) for path in written] == [
        "first.yaml",
        "data/example_chat.jsonl",
        "recipe.schema.json",
    ]
    assert "launch first.yaml --gpus 0 " in written[0].read_text(encoding="utf-8")
    assert copy("qwen_lora", folder) == [folder / "qwen_lora.yaml"]


def test_copy_overwrites_nothing(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "example_chat.jsonl").write_text("mine", encoding="utf-8")
    with pytest.raises(LaunchError, match=r"already there: data/example_chat\.jsonl"):
        copy("qwen_qlora", folder)
    assert sorted(os.listdir(folder)) == ["data"]
    (folder / "qwen_qlora.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(LaunchError, match=r"already there: qwen_qlora\.yaml, data"):
        copy("qwen_qlora", folder)


def test_copy_takes_held_out_files_along(folder: Path) -> None:
    for name in ("far/old.jsonl", "here/rows.jsonl", "here/sub/new.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"text": "{name}"}}\n', encoding="utf-8")
    text = "model: a/b\nmethod: lora\ndata:\n  files: rows.jsonl\n  held_out_files: [sub/new.jsonl, ../far/old.jsonl]\n"
    (folder / "here" / "r.yaml").write_text(text, encoding="utf-8")
    written = copy("here/r.yaml", folder / "there" / "deep")
    there = folder / "there" / "deep"
    assert sorted(written) == [there / "r.yaml", there / "rows.jsonl", there / "sub" / "new.jsonl"]
    copied = load_recipe(written[0]).recipe.data
    assert [f.path for f in copied.files] == [str(there / "rows.jsonl")]
    assert [f.path for f in copied.held_out_files] == [
        str(there / "sub" / "new.jsonl"),
        str(folder / "far" / "old.jsonl"),
    ]
    assert (there / "sub" / "new.jsonl").read_text(encoding="utf-8") == '{"text": "here/sub/new.jsonl"}\n'


def test_copy_of_ones_own_recipe_adjusts_what_lies_elsewhere(folder: Path) -> None:
    for name in ("far/rows.jsonl", "here/near.jsonl", "here/base.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("train: {epochs: 1}\n", encoding="utf-8")
    text = "extends: base.yaml\nmodel: a/b\nmethod: lora   # keep me\ndata: ['../far/rows.jsonl', near.jsonl]\n"
    (folder / "here" / "r.yaml").write_text(text, encoding="utf-8")
    written = copy("here/r.yaml", folder / "there" / "deep")
    copied = load_recipe(written[0])
    assert [f.path for f in copied.recipe.data.files] == [
        str(folder / "far" / "rows.jsonl"),
        str(folder / "there" / "deep" / "near.jsonl"),
    ]
    assert copied.recipe.train.epochs == 1
    assert "# keep me" in written[0].read_text(encoding="utf-8")
