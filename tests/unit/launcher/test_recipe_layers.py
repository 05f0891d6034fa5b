"""extends, --set, short forms, origins, and the way back to YAML."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import LaunchError, RecipeError
from launcher.recipe import dump_recipe, load_recipe

HEAD = "model: Qwen/Qwen2.5-7B-Instruct\nmethod: lora\ndata: d.jsonl\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("d.jsonl", "e.jsonl", "f.jsonl"):
        Path(name).write_text('{"text": "a"}\n', encoding="utf-8")
    return tmp_path


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def failure(path: Path, *sets: str) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, sets)
    return [(p.where, p.message) for p in caught.value.problems]


def test_short_forms_are_written_out(folder: Path) -> None:
    values = load_recipe(write("r.yaml", HEAD + "evaluate: [Hi, {user: Ho, contains: [x]}]\n")).values
    assert values == {
        "model": {"source": "Qwen/Qwen2.5-7B-Instruct"},
        "method": {"name": "lora"},
        "data": {"files": [{"path": str(folder / "d.jsonl")}]},
        "evaluate": {"prompts": [{"user": "Hi"}, {"user": "Ho", "contains": ["x"]}]},
    }


@pytest.mark.parametrize(
    "data",
    [
        "d.jsonl",
        "[d.jsonl]",
        "{files: d.jsonl}",
        "{files: [d.jsonl]}",
        "{files: {path: d.jsonl}}",
        "[{path: d.jsonl}]",
        "\n  files:\n    - path: ./d.jsonl",
    ],
)
def test_ways_to_name_one_file(folder: Path, data: str) -> None:
    recipe = load_recipe(write("r.yaml", f"model: a/b\nmethod: lora\ndata: {data}\n")).recipe
    assert [f.path for f in recipe.data.files] == [str(folder / "d.jsonl")]


def test_whole_numbers_are_fine_where_decimal_ones_are_wanted() -> None:
    train = load_recipe(
        write("r.yaml", HEAD + "train: {epochs: 2, learning_rate: 2e-4, weight_decay: 0}\n")
    ).recipe.train
    assert (train.epochs, train.learning_rate) == (2.0, 2e-4)


def test_extends_merges_mappings_and_replaces_lists(folder: Path) -> None:
    write("base.yaml", HEAD + "train:\n  epochs: 3\n  seed: 1\nevaluate: [a, b]\n")
    write("middle.yaml", "extends: base.yaml\ntrain: {seed: 2}\n")
    loaded = load_recipe(write("top.yaml", "extends: middle\ntrain:\n  learning_rate: 1e-5\nevaluate: [c]\n"))
    assert loaded.values["train"] == {"epochs": 3, "seed": 2, "learning_rate": 1e-5}
    assert [p.user for p in loaded.recipe.evaluate.prompts] == ["c"]
    assert loaded.files == tuple(folder / name for name in ("top.yaml", "middle.yaml", "base.yaml"))
    assert loaded.origins["train.epochs"] == "base.yaml:5"
    assert loaded.origins["train.seed"] == "middle.yaml:2"
    assert loaded.origins["train.learning_rate"] == "top.yaml:3"
    assert loaded.origins["evaluate.prompts.0.user"] == "top.yaml:4"
    assert loaded.origins["model.source"] == "base.yaml:1"
    assert loaded.name == "top"


def test_extends_a_shipped_recipe_by_name() -> None:
    loaded = load_recipe(write("mine.yaml", "extends: qwen_qlora\ndata: d.jsonl\n"))
    assert loaded.recipe.model.source == "Qwen/Qwen2.5-7B-Instruct"
    assert loaded.recipe.data.max_length == 2048
    assert [Path(f.path).name for f in loaded.recipe.data.files] == ["d.jsonl"]
    assert loaded.files[1].name == "qwen_qlora.yaml"


def test_circles_are_refused_with_the_whole_chain() -> None:
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "extends: c.yaml\n")
    write("c.yaml", "\nextends: a.yaml\n")
    assert failure(Path("a.yaml"))[0] == (
        "c.yaml:2:10",
        "extends goes in a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml",
    )
    assert "circle: self.yaml -> self.yaml" in failure(write("self.yaml", "extends: self.yaml\n"))[0][1]


@pytest.mark.parametrize(
    ("line", "where", "message", "hint"),
    [
        ("extends: bsae.yaml\n", "r.yaml:1:10", "extends: there is no recipe bsae.yaml", "Did you mean base.yaml"),
        ("extends: qwen_qlroa\n", "r.yaml:1:10", "extends: there is no recipe qwen_qlroa", "qwen_qlora.yaml"),
        ("extends: [base.yaml]\n", "r.yaml:1:10", "extends takes the name of one recipe", "let one extend the next"),
        ("extends:\n", "r.yaml:1:9", "extends takes the name of one recipe", ""),
    ],
)
def test_extends_of_nothing(line: str, where: str, message: str, hint: str) -> None:
    write("base.yaml", HEAD)
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("r.yaml", line + HEAD))
    problem = caught.value.problems[0]
    assert (problem.where, problem.message) == (where, message)
    assert hint in problem.hint


def test_mistakes_in_an_extended_file_are_reported_there() -> None:
    write("sub/base.yaml", HEAD.replace("d.jsonl", "../d.jsonl") + "train: {epochs: x}\ntypo: 1\n")
    found = failure(write("r.yaml", "extends: sub/base.yaml\nlr: 1\n"))
    assert [where for where, _ in found] == ["r.yaml:2:1", "sub/base.yaml:4:17", "sub/base.yaml:5:1"]


def test_paths_start_at_the_file_that_names_them(folder: Path) -> None:
    write("sub/rows.jsonl", "{}\n")
    write("sub/base.yaml", "model: a/b\nmethod: lora\ndata: rows.jsonl\n")
    loaded = load_recipe(write("r.yaml", "extends: sub/base.yaml\n"))
    assert loaded.values["data"]["files"][0]["path"] == str(folder / "sub" / "rows.jsonl")


def test_set_flags_win_and_are_named_as_origin(folder: Path) -> None:
    path = write("deep/r.yaml", HEAD.replace("d.jsonl", "../d.jsonl") + "train:\n  epochs: 3\n")
    loaded = load_recipe(
        path, ["train.epochs=1", "train.learning_rate=1e-4", "data.files=[e.jsonl, f.jsonl]", "method=qlora"]
    )
    assert loaded.recipe.train.epochs == 1
    assert loaded.recipe.train.learning_rate == 1e-4
    assert loaded.recipe.method.name == "qlora"
    assert [f.path for f in loaded.recipe.data.files] == [str(folder / "e.jsonl"), str(folder / "f.jsonl")]
    assert loaded.origins["train.epochs"] == "--set"
    assert loaded.origins["data.files.1.path"] == "--set"
    assert loaded.origins["model.source"] == "deep/r.yaml:1"


def test_set_flags_add_up() -> None:
    loaded = load_recipe(write("r.yaml", HEAD), ["model=x/y", "model.dtype=fp32", "data.system=Be kind: always"])
    assert loaded.values["model"] == {"source": "x/y", "dtype": "fp32"}
    assert loaded.recipe.data.system == "Be kind: always"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("train.leaning_rate=1", "unknown key `leaning_rate`; did you mean learning_rate?"),
        ("lr=1", "unknown key `lr`; a recipe calls it train.learning_rate"),
        ("train.epochs", "a setting is written key=value"),
        ("=3", "a setting is written key=value"),
        ("train.epochs=", "train.epochs has no value; null is not 'default': remove the line"),
        ("train.epochs=x", "train.epochs: 'x' is a string; expected a number, more than 0"),
        ("train.packing=yes", "unknown key `packing` here; it belongs under data"),
        ("data.packing=yes", "data.packing: 'yes' is a string; expected true or false"),
        ("data.files.0.path=e.jsonl", "items of data.files cannot be set one by one"),
        ("train.betas.0=0.5", "items of train.betas cannot be set one by one"),
        ("train.epochs.x=1", "train.epochs is a single value; it has no x"),
        ("extends=a.yaml", "extends cannot be set by a flag"),
        ("data=absent.jsonl", "the data file absent.jsonl does not exist"),
        ("train.seed=.nan", ".nan is not a finite number"),
        ("evaluate.prompts=[a", "this [list] or {mapping} is not closed, or lacks a comma"),
    ],
)
def test_bad_flags_are_named_whole(flag: str, message: str) -> None:
    assert failure(write("r.yaml", HEAD), flag) == [(f"--set {flag}", message)]


def test_two_flags_for_one_value() -> None:
    found = failure(write("r.yaml", HEAD), "train.epochs=1", "train={epochs: 2}")
    assert found == [("--set train={epochs: 2}", "train.epochs is set by two flags")]


def test_a_later_layer_replaces_what_it_makes_void() -> None:
    text = "model: {source: a/b, revision: v1}\nmethod: {name: lora, rank: 8}\ndata: d.jsonl\ntrain: {epochs: 3}\n"
    loaded = load_recipe(write("r.yaml", text), ["train.max_steps=5", "method=full", "model=c/d"])
    assert loaded.recipe.train.epochs is None
    assert loaded.recipe.train.max_steps == 5
    assert loaded.values["method"] == {"name": "full"}
    assert loaded.values["model"] == {"source": "c/d"}
    assert sorted(loaded.notes) == [
        "method.rank (r.yaml:2) no longer holds: replaced by method.name (--set)",
        "model.revision (r.yaml:1) no longer holds: replaced by model.source (--set)",
        "train.epochs (r.yaml:4) no longer holds: replaced by train.max_steps (--set)",
    ]


@pytest.mark.parametrize(
    ("line", "flag", "values", "note"),
    [
        (
            "held_out: 0.1",
            "data.held_out_files=[e.jsonl]",
            (0.0, ["e.jsonl"]),
            "data.held_out (r.yaml:5) no longer holds: replaced by data.held_out_files (--set)",
        ),
        (
            "held_out_files: [e.jsonl]",
            "data.held_out=0.2",
            (0.2, []),
            "data.held_out_files (r.yaml:5) no longer holds: replaced by data.held_out (--set)",
        ),
        ("held_out: 0.1", "data.held_out=0.2", (0.2, []), ""),
        ("held_out_files: [e.jsonl]", "data.held_out_files=f.jsonl", (0.0, ["f.jsonl"]), ""),
    ],
)
def test_a_later_layer_holds_out_other_rows(
    folder: Path, line: str, flag: str, values: tuple[float, list[str]], note: str
) -> None:
    path = write("r.yaml", f"model: a/b\nmethod: lora\ndata:\n  files: d.jsonl\n  {line}\n")
    loaded = load_recipe(path, [flag])
    data = loaded.recipe.data
    assert (data.held_out, [f.path for f in data.held_out_files]) == (values[0], [str(folder / f) for f in values[1]])
    assert list(loaded.notes) == ([note] if note else [])
    assert [f.path for f in data.files] == [str(folder / "d.jsonl")]


def test_one_layer_may_not_contradict_itself() -> None:
    found = failure(write("r.yaml", HEAD), "train.epochs=1", "train.max_steps=5")
    assert [where for where, _ in found] == ["--set train.max_steps=5"]
    assert "(--set train.epochs=1)" in found[0][1]
    write("base.yaml", HEAD + "train: {max_steps: 1}\n")
    assert len(failure(write("c.yaml", "extends: base.yaml\ntrain: {epochs: 1, max_steps: 2}\n"))) == 1


TEXTS = [
    "yes",
    "off",
    "null",
    "~",
    "",
    "017",
    "1_000",
    "1e5",
    "2.5",
    "12:30:00",
    "2024-01-02",
    ".inf",
    "true",
    "=",
    "<<",
]
TEXTS += [
    "a: b",
    "# no comment",
    " lead",
    "trail ",
    "two\nlines\n",
    "'quoted'",
    '"double"',
    "*star",
    "&and",
    "!bang",
    "- dash",
]
TEXTS += [
    "你好，世界：一",
    "emoji 😀",
    "tab\there",
    "\u00a0nbsp",
    "back\\slash",
    "{brace",
    "[bracket",
    "%",
    "@",
    "`",
    "x" * 300,
]


def _random_recipe(rng: random.Random) -> dict[str, Any]:
    """A valid recipe with awkward texts and numbers."""
    prompts = [
        {
            "user": rng.choice([t for t in TEXTS if t]),
            "contains": rng.sample(TEXTS, 2),
            "system": rng.choice([None, *TEXTS]),
        }
        for _ in range(rng.randint(1, 4))
    ]
    length: dict[str, Any] = rng.choice([{"epochs": rng.uniform(0.01, 9)}, {"max_steps": rng.randint(1, 10**6)}, {}])
    return {
        "model": {"source": "a/b", "revision": rng.choice([t for t in TEXTS if t])},
        "method": rng.choice(
            ["full", "lora", {"name": "lora", "alpha": rng.uniform(1e-9, 100), "targets": ["q", "1e3"]}]
        ),
        "data": {"files": ["d.jsonl"], "system": rng.choice([None, *TEXTS]), "packing": rng.random() < 0.5},
        "train": {
            **length,
            "learning_rate": 10 ** rng.uniform(-12, 1),
            "seed": rng.randint(-5, 5),
            "betas": [0, rng.random()],
        },
        "parallel": {"zero": rng.choice(["auto", 0, 1, 2, 3]), "sp": rng.choice(["auto", 1, 2])},
        "evaluate": {"prompts": prompts, "strict": False},
    }


@pytest.mark.parametrize("seed", range(40))
def test_dump_loads_to_an_equal_recipe(seed: int, folder: Path) -> None:
    written = yaml.safe_dump(_random_recipe(random.Random(seed)), allow_unicode=True, default_style='"')
    loaded = load_recipe(write("r.yaml", _unquote_numbers(written)))
    again = load_recipe(write("elsewhere/copy.yaml", dump_recipe(loaded)))
    assert again.recipe == loaded.recipe
    assert again.values == loaded.values
    assert dump_recipe(again) == dump_recipe(loaded)


def _unquote_numbers(text: str) -> str:
    """safe_dump quotes every scalar and tags those that are no texts: write these plain."""
    lines = []
    for line in text.splitlines(keepends=True):
        for tag in ("!!int", "!!float", "!!bool", "!!null"):
            if f'{tag} "' in line:
                line = line.replace(f'{tag} "', "").replace('"\n', "\n")
                break
        lines.append(line)
    return "".join(lines)


def test_dump_is_one_file_with_absolute_paths(folder: Path) -> None:
    write("base.yaml", HEAD)
    text = dump_recipe(load_recipe(write("r.yaml", "extends: base.yaml\ntrain: {learning_rate: 0.00002}\n")))
    assert "extends" not in text
    assert f"path: {folder}/d.jsonl" in text
    assert "&" not in text


def test_folders_and_python_files_are_no_recipes(folder: Path) -> None:
    write("cfg.py", "a = 1\n")
    with pytest.raises(LaunchError, match="is a Python file"):
        load_recipe(Path("cfg.py"))
    with pytest.raises(LaunchError, match="is a folder"):
        load_recipe(folder)
