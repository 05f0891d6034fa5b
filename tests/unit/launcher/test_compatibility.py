"""The table of combinations: it refuses what it should, knows what is nearest, and each reason can be checked."""

from __future__ import annotations

import itertools
import json
import re
from importlib import metadata, util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.inventory import Selection
from launcher.cli import app
from launcher.combinations import change_lines
from launcher.compatibility import broken, cells, count, holds, nearest, remedies, run_by, working, works
from launcher.compatibility_page import MAX_CELLS, as_json, page, parse_filters
from launcher.compatibility_table import AXES, CAUTIONS, MANY, RULES, TRIALS, Rule, Source
from launcher.errors import RecipeError
from launcher.layout import decide_layout
from launcher.recipe_fields import fields
from launcher.recipe_schema import Recipe

ROOT = Path(__file__).parents[3]
BY_NAME = {rule.name: rule for rule in RULES}
PLAIN = {
    "method": "lora", "quantisation": "none", "zero": "2", "offload": "none", "dtype": "bf16", "sp": "1", "packing": "on",
    "attention": "full", "device": "cuda", "processes": "1", "generation": "off", "compile": "off",
}  # fmt: skip
SOURCES = sorted({source for rule in (*RULES, *CAUTIONS) for source in rule.sources}, key=lambda s: s.where)


@pytest.mark.parametrize(
    ("changed", "changes"),
    [
        ({}, []),
        ({"zero": "0", "dtype": "fp16"}, ["zero=1", "zero=2", "zero=3", "dtype=bf16", "dtype=fp32"]),
        ({"zero": "0", "offload": "optimizer"}, ["zero=1", "zero=2", "zero=3", "offload=none"]),
        ({"zero": "1", "offload": "parameters"}, ["zero=3", "offload=optimizer", "offload=none"]),
        ({"zero": "0", "offload": "parameters", "dtype": "fp16"}, ["zero=3"]),
        (
            {"method": "qlora", "quantisation": "nf4-double", "zero": "3", "offload": "parameters"},
            ["offload=optimizer", "offload=none", "method=lora quantisation=none", "method=full quantisation=none"],
        ),
        ({"zero": "3", "generation": "on"}, ["generation=off", "zero=2", "zero=1", "zero=0"]),
        ({"zero": "3", "generation": "on", "offload": "parameters"}, ["generation=off"]),
        ({"zero": "3", "compile": "on", "generation": "on"}, ["zero=2", "zero=1", "zero=0"]),
        ({"zero": "3", "compile": "on", "generation": "on", "offload": "parameters"}, ["generation=off compile=off"]),
        ({"sp": MANY, "processes": "1"}, ["sp=1"]),
        ({"sp": MANY, "processes": MANY, "attention": "latent"}, ["sp=1"]),
        ({"method": "full", "quantisation": "nf4"}, ["quantisation=none", "method=lora quantisation=none", "method=qlora"]),
        ({"method": "qlora"}, ["quantisation=nf4", "quantisation=nf4-double", "method=lora", "method=full"]),
        ({"attention": "sinks"}, ["attention=full", "attention=sliding window", "attention=latent"]),
        ({"attention": "sinks", "zero": "0", "dtype": "fp16"}, ["zero=1", "zero=2", "zero=3", "dtype=bf16", "dtype=fp32"]),
        ({"quantisation": "stored"}, ["quantisation=none"]),
    ],
)  # fmt: skip
def test_the_nearest_that_works_changes_least(changed: dict[str, str], changes: list[str]) -> None:
    choice = {**PLAIN, **changed}
    found = [" ".join(f"{axis}={value}" for axis, value in change.items()) for change in nearest(choice)]
    assert found[: len(changes)] == changes
    assert bool(found) == bool(changes)


def test_nothing_nearer_works() -> None:
    """By brute force: no combination that differs in fewer choices works, and each that is proposed does."""
    fixed = {"attention": ("full",), "packing": ("on",), "quantisation": ("none",), "method": ("lora", "full")}
    everything = list(cells(fixed))
    for cell in everything[::131]:
        found = nearest(cell)
        assert bool(found) == bool(broken(cell))
        for change in found:
            assert works({**cell, **change}), (cell, change)
        if found:
            asked = [other for other in everything if works(other) and other["device"] == cell["device"]]
            same = [other for other in asked if other["processes"] == cell["processes"]]
            least = min(sum(other[axis] != cell[axis] for axis in AXES) for other in same)
            assert {len(change) for change in found} == {least}, cell


def test_a_remedy_ends_its_refusal_and_brings_no_other() -> None:
    for cell in itertools.islice(cells({"attention": ("full",)}), 0, None, 149):
        before = {rule.name for rule in broken(cell)}
        for rule in broken(cell):
            for axis, value in remedies(rule, cell):
                method = {"quantisation": "none" if value != "qlora" else "nf4"} if axis == "method" else {}
                after = {r.name for r in broken({**cell, axis: value, **method})}
                assert rule.name not in after
                assert after <= before


def test_what_is_not_known_yet_is_not_held_against_a_choice() -> None:
    assert works({"offload": "parameters"})
    assert not works({"offload": "parameters", "zero": "2"})
    assert works({"offload": "parameters", "zero": "3", "method": "qlora"})
    assert nearest({"offload": "parameters", "zero": "2"})[0] == {"zero": "3"}


def test_counting_is_going_through_each() -> None:
    fixed = {"attention": ("full", "latent", "sinks"), "device": ("cuda",), "packing": ("on",), "zero": ("0", "3")}
    assert count(fixed) == (sum(works(cell) for cell in cells(fixed)), len(list(cells(fixed))))
    assert list(working(fixed)) == [cell for cell in cells(fixed) if works(cell)]
    assert count(PLAIN_ONLY) == (1, 1)


PLAIN_ONLY = {axis: (value,) for axis, value in PLAIN.items()}


@pytest.mark.parametrize("rule", [*RULES, *CAUTIONS], ids=lambda rule: rule.name)
def test_each_rule_is_well_formed(rule: Rule) -> None:
    assert rule.key in fields()
    assert rule.sources
    assert rule.when or rule.condition
    for axis, values in rule.when.items():
        assert set(values) <= set(AXES[axis].values)
        assert values
    if rule in RULES and rule.when and not rule.condition:
        for picked in itertools.product(*rule.when.values()):
            assert nearest({**PLAIN, **dict(zip(rule.when, picked, strict=True))})


def test_each_rule_refuses_what_no_other_does() -> None:
    lora = {**PLAIN, "processes": MANY}
    bases = (lora, {**lora, "method": "qlora", "quantisation": "nf4"})
    for rule in RULES:
        if not rule.condition:
            choices = [
                {**base, **dict(zip(rule.when, picked, strict=True))}
                for base in bases
                for picked in itertools.product(*rule.when.values())
            ]
            assert [rule] in [broken(choice) for choice in choices], rule.name


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.where)
def test_each_source_says_what_it_is_cited_for(source: Source) -> None:
    """Of the version that constraints.txt pins: with another one, look again and move the line."""
    if "://" in source.where:
        assert re.fullmatch(r"https://(github\.com/[\w.-]+/[\w.-]+/(issues|pull|blob)/\S+|arxiv\.org/abs/[\d.]+|huggingface\.co/docs/\S+)", source.where)  # fmt: skip
        return
    found = re.fullmatch(r"(\w+)==(\S+) (\S+):(\d+)", source.where)
    if not found:
        assert (ROOT / source.where).is_file()
        return
    package, version, file, line = found.groups()
    assert f"{package}=={version}" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert metadata.version(package).partition("+")[0] == version
    spec = util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent.parent / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert source.quote
    assert source.quote in text, text


def test_the_checker_refuses_what_the_table_refuses_and_nothing_else() -> None:
    names = ("method", "zero", "offload", "dtype", "device", "generation")
    devices = {"cpu": Selection("cpu", (), 2, 1), "cuda": Selection("cuda", (), 2, 1)}
    for picked in itertools.product(*(AXES[name].values for name in names)):
        method, zero, offload, dtype, device, generation = picked
        recipe = Recipe.model_validate(
            {
                "model": {"source": "a/b", "dtype": dtype},
                "method": {"name": method},
                "data": {"files": [{"path": "x.jsonl"}]},
                "parallel": {"zero": int(zero), "offload": offload},
                "evaluate": {"samples_every_steps": 5 * (generation == "on"), "prompts": [{"user": "q"}]},
            }
        )
        found = decide_layout(recipe, devices[device], None)
        choice = dict(zip(names, picked, strict=True))
        expected = broken({**choice, "quantisation": "nf4-double" if method == "qlora" else "none"})
        assert [(p.where, p.source) for p in found.refusals] == [
            (rule.key, "; ".join(s.where for s in rule.sources)) for rule in expected
        ]
        changed = {**found.choice, **(nearest(found.choice) or [{}])[0]}
        assert works(changed)
        for problem in found.refusals:
            assert problem.change == change_lines(nearest(found.choice)[0])


def test_filters_take_choices_and_recipe_keys() -> None:
    assert parse_filters(["method=qlora", "parallel.zero=3,2", "sp=4", "samples=true", "devices=gpu"]) == {
        "method": ("qlora",), "zero": ("2", "3"), "sp": (MANY,), "generation": ("on",), "device": ("cuda",),
    }  # fmt: skip


def test_wrong_filters_are_all_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_filters(["metod=qlora", "zero=5", "dtype", "sp=1", "sp=2"])
    text = str(caught.value)
    assert "metod=qlora: there is no such choice\n    Did you mean method?" in text
    assert "zero=5: zero is never 5\n    Allowed: 0, 1, 2, 3" in text
    assert "dtype: there is no such choice" in text
    assert "sp=2: sp is given twice" in text


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["explain", "compatibility", *args])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_page_says_what_works_why_not_and_what_is_nearest() -> None:
    text = run("method=qlora", "zero=3", "device=cuda", "attention=full")
    assert re.search(r"^compile +off +works\n +on +refused: see (\d), (\d)$", text, re.MULTILINE)
    below = text.partition("method=qlora offload=parameters zero=3 device=cuda\n")[2].splitlines()
    assert "their constants are no parameters" in below[0]
    assert below[1].strip() == "nearest that works: offload=optimizer, or offload=none, or method=lora"
    assert below[3].strip().startswith("source: bitsandbytes==")
    assert "none of these has been run here" in text
    assert "H100" not in text
    assert "H100" in run("method=qlora", "zero=2")


def test_json_has_each_cell_where_there_are_few() -> None:
    data = json.loads(run("method=qlora", "zero=2", "device=cuda", "attention=full", "packing=on", "--json"))
    assert len(data["cells"]) == data["combinations"] <= MAX_CELLS
    assert sum(cell["works"] for cell in data["cells"]) == data["working"]
    assert [cell["run"] for cell in data["cells"] if cell["run"]] == [trial.where for trial in TRIALS]
    refused = next(cell for cell in data["cells"] if cell["offload"] == "parameters" and cell["quantisation"] == "nf4")
    assert refused["refused_by"] == ["parameters-without-stage-3"]
    assert refused["nearest"] == [{"offload": "optimizer"}]
    assert as_json({})["cells"] is None


def test_what_has_run_is_told_for_cells_that_work() -> None:
    assert all(works(trial.choice) for trial in TRIALS)
    assert all(set(trial.choice) == set(AXES) for trial in TRIALS)
    assert run_by({**PLAIN, "device": "cpu"}) == "make matrix"
    assert run_by({**PLAIN, "device": "cpu", "compile": "on"}) == ""
    assert run_by(PLAIN) == ""


def test_a_page_of_one_combination_names_what_refuses_it() -> None:
    fixed = {axis: (value,) for axis, value in {**PLAIN, "zero": "0", "dtype": "fp16"}.items()}
    assert page(fixed).splitlines()[0].endswith(": 0 of 1 combinations work")
    assert all(holds(rule, {**PLAIN, "zero": "0", "dtype": "fp16"}) for rule in RULES if rule.name == "fp16-without-loss-scale")  # fmt: skip
