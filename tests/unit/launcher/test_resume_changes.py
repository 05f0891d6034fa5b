"""Which changes of a recipe a resumed run takes, which it asks about, and which it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.errors import LaunchError
from launcher.recipe_fields import fields
from launcher.recipe_schema import Recipe
from launcher.resume_changes import BOUND, FREE, affects_report, affects_training, changes, require_allowed
from launcher.start import Request, _same_devices


def recipe(**sections: Any) -> Recipe:
    base: dict[str, Any] = {
        "model": {"source": "m"},
        "method": {"name": "lora"},
        "data": {"files": [{"path": "/a.jsonl"}]},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Recipe.model_validate(base)


def test_equal_recipes_change_nothing() -> None:
    found = changes(recipe(), recipe())
    assert found == []
    require_allowed(found, (), "r.yaml")
    assert not affects_training(found)


@pytest.mark.parametrize(
    ("section", "trains", "reports"),
    [
        ({"checkpoint": {"every_steps": 7, "async": False, "on_error": "continue"}}, False, False),
        ({"parallel": {"zero": 3, "sp": 2}}, False, False),
        ({"train": {"micro_batch": 2, "gradient_checkpointing": True}}, False, False),
        ({"run": {"timeout_s": 5}}, False, False),
        ({"evaluate": {"max_new_tokens": 5}}, False, True),
    ],
)
def test_what_changes_no_weight_is_taken_as_it_is(section: dict[str, Any], trains: bool, reports: bool) -> None:
    found = changes(recipe(), recipe(**section))
    assert len(found) == len(next(iter(section.values())))
    require_allowed(found, (), "r.yaml")
    assert (affects_training(found), affects_report(found)) == (trains, reports)


def test_what_alters_learning_must_be_named_each() -> None:
    after = recipe(train={"learning_rate": 1e-5, "seed": 1}, data={"files": [{"path": "/b.jsonl"}]})
    found = changes(recipe(), after)
    assert [str(c) for c in found] == [
        "data.files.0.path: /a.jsonl -> /b.jsonl",
        "train.learning_rate: 2e-4 -> 1e-5",
        "train.seed: 42 -> 1",
    ]
    with pytest.raises(LaunchError) as told:
        require_allowed(found, ("train.seed",), "r.yaml")
    assert "train.learning_rate: 2e-4 -> 1e-5" in told.value.message
    assert "train.seed" not in told.value.message
    assert "--force-key data.files.0.path --force-key train.learning_rate" in told.value.hint
    require_allowed(found, ("train.seed", "train.learning_rate", "data.files"), "r.yaml")
    assert affects_training(found)


def test_what_the_saved_weights_depend_on_cannot_be_forced() -> None:
    found = changes(recipe(), recipe(method={"rank": 4}, model={"source": "other"}))
    with pytest.raises(LaunchError) as told:
        require_allowed(found, ("method.rank", "model.source"), "r.yaml")
    assert "method.rank: 16 -> 4 (the saved adapters have another shape)" in told.value.message
    assert "model.source: m -> other" in told.value.message
    assert "Start a new run: launch r.yaml" in told.value.hint


def test_a_key_that_did_not_change_is_not_forced_in_vain() -> None:
    found = changes(recipe(), recipe(checkpoint={"keep": 5}))
    with pytest.raises(LaunchError) as told:
        require_allowed(found, ("train.seed",), "r.yaml")
    assert "train.seed" in told.value.message
    assert "checkpoint.keep" in told.value.hint


@pytest.mark.parametrize(("key", "nearest"), [("train.lerning_rate", "train.learning_rate"), ("foo", "")])
def test_a_forced_key_that_no_recipe_has_is_told_its_nearest(key: str, nearest: str) -> None:
    found = changes(recipe(), recipe(train={"seed": 1}))
    with pytest.raises(LaunchError) as told:
        require_allowed(found, ("train.seed", key), "r.yaml")
    assert f"--force-key {key}: a recipe has no such key" in told.value.message
    assert nearest in told.value.hint


def test_every_key_named_is_one_of_the_recipe() -> None:
    assert {*FREE, *BOUND} <= set(fields())


def test_a_run_of_an_earlier_version_is_resumed_where_it_was() -> None:
    """Its plan.json knows neither hosts nor nodes."""
    flags = {"gpus": "0,2", "cpu": None, "backend": "torchrun", "debug": False}
    old = {"flags": flags, "spec": {"parallel": {"device": "cuda", "world_size": 2}}}
    request = _same_devices(Request("r.yaml", None, None, None, 1, None, (), False), old)
    assert (request.gpus, request.backend, request.nodes, request.hosts) == ("0,2", "torchrun", 1, ())
    old["flags"] = {**flags, "gpus": "free:2", "backend": "ray", "hosts": [], "nodes": 2}
    request = _same_devices(Request("r.yaml", None, None, None, 1, None, (), False), old)
    assert (request.gpus, request.backend, request.nodes) == ("free:2", "ray", 2)
