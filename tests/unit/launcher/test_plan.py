"""What a plan says of the rows that are held out, and of how checkpoints are written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from cluster.inventory import Selection
from launcher.memory import inputs_of
from launcher.model_facts import read_facts
from launcher.model_source import resolve_source
from launcher.plan import Options, Plan, plan_run
from launcher.plan_memory import has_room_for_a_copy
from launcher.recipe import load_recipe
from launcher.render import plan_page
from launcher.run_dir import RunDir
from trainer.spec import DataFile

RECIPE = "model: Qwen/Qwen2.5-0.5B\nmethod: lora\ndata:\n  files: rows.jsonl\n"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


def plan(folder: Path, lines: str = "") -> Plan:
    (folder / "r.yaml").write_text(RECIPE + lines, encoding="utf-8")
    for name in ("rows.jsonl", "new.jsonl", "newer.jsonl"):
        (folder / name).write_text('{"text": "x"}\n', encoding="utf-8")
    loaded = load_recipe(folder / "r.yaml")
    source = resolve_source(loaded.recipe.model.source, folder)
    options = Options("torchrun", False, folder / "cache", 64.0, "launch r.yaml", ())
    return plan_run(loaded, Selection("cpu", (), 2, 1), source, read_facts(source), RunDir(folder / "run"), options)


def held_out_reasons(plan: Plan) -> list[str]:
    return [reason.text for reason in plan.reasons if reason.name == "held out"]


def test_a_plan_without_held_out_rows_says_nothing_of_them(tmp_path: Path) -> None:
    found = plan(tmp_path)
    assert (found.spec.data.held_out, found.spec.data.held_out_files) == (0.0, ())
    assert held_out_reasons(found) == []


def test_a_share_is_carried_over_with_its_reason(tmp_path: Path) -> None:
    found = plan(tmp_path, "  held_out: 0.05\nevaluate: {loss_every_steps: 20}\n")
    assert (found.spec.data.held_out, found.spec.data.held_out_files) == (0.05, ())
    assert held_out_reasons(found) == [
        "0.05 of the rows; their loss is taken every 20 steps, before the first step and after the last"
    ]


def test_files_are_carried_over_with_their_reason(tmp_path: Path) -> None:
    lines = "  held_out_files: [new.jsonl, {path: newer.jsonl, format: text}]\nevaluate: {loss_every_steps: 0}\n"
    found = plan(tmp_path, lines)
    new, newer = str(tmp_path / "new.jsonl"), str(tmp_path / "newer.jsonl")
    assert found.spec.data.held_out == 0.0
    assert found.spec.data.held_out_files == (DataFile(new, "auto"), DataFile(newer, "text"))
    assert found.spec.data.files == (DataFile(str(tmp_path / "rows.jsonl"), "auto"),)
    assert held_out_reasons(found) == [f"{new}, {newer}; their loss is taken before the first step and after the last"]


@pytest.mark.parametrize(
    ("lines", "every"),
    [
        ("checkpoint: {every_steps: 70}\n", 70),
        ("checkpoint: {every_steps: 0}\n", 0),
        ("checkpoint: {every_steps: 70}\nevaluate: {loss_every_steps: 5}\n", 5),
        ("checkpoint: {every_steps: 70}\nevaluate: {loss_every_steps: 0}\n", 0),
    ],
)
def test_the_loss_is_taken_where_checkpoints_are_unless_said(tmp_path: Path, lines: str, every: int) -> None:
    spec = plan(tmp_path, f"  held_out: 0.1\n{lines}").spec
    assert spec.evaluate.loss_every_steps == every
    assert spec.checkpoint.every_steps == (70 if "70" in lines else 0)


@pytest.mark.parametrize(
    ("kind", "method", "host_gb", "beside"),
    [
        ("cpu", "lora", 64.0, True),
        ("cpu", "full", 64.0, False),
        ("cpu", "lora", 0.0, False),
        ("cpu", "lora", 0.5, False),
        ("cuda", "full", 64.0, True),
        ("cuda", "full", 2.0, False),
        ("cuda", "full", 0.0, False),
    ],
)
def test_checkpoints_are_copied_where_there_is_room(
    tmp_path: Path, kind: Literal["cpu", "cuda"], method: str, host_gb: float, beside: bool
) -> None:
    facts = read_facts(resolve_source("Qwen/Qwen2.5-0.5B", tmp_path))
    assert facts is not None
    inputs = dataclasses.replace(inputs_of(plan(tmp_path).spec, facts), device=kind, method=method, dp=1)
    assert has_room_for_a_copy(inputs, Selection(kind, (), 1, 1), host_gb) == beside


@pytest.mark.parametrize(("written", "beside"), [("auto", True), ("true", True), ("false", False)])
def test_what_the_recipe_says_of_saving_is_what_is_planned(tmp_path: Path, written: str, beside: bool) -> None:
    found = plan(tmp_path, f"checkpoint: {{async: {written}, on_error: continue}}\n")
    assert found.spec.checkpoint.asynchronous == beside
    assert found.spec.checkpoint.on_error == "continue"
    told = plan_page(found)
    assert ("written while training goes on" in told) == beside
    assert ("training waits" in told) != beside
