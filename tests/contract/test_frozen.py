"""What users type and what programs read: flags, recipe keys, plan, argv, environment. A change is a deliberate diff."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.inventory import Device, Selection
from cluster.registry import load
from launcher.cli import app
from launcher.model_facts import read_facts
from launcher.model_source import resolve_source
from launcher.plan import Options, plan_run
from launcher.recipe import load_recipe
from launcher.recipe_schema import Recipe
from launcher.run_dir import RunDir

Golden = Callable[[str, str], str]
GPUS = tuple(Device(str(i), "NVIDIA A100", f"GPU-{i:04d}", 80.0, 79.0, False, False, "") for i in (0, 2))

RECIPE = """
model: Qwen/Qwen2.5-7B-Instruct
method: qlora
data: {files: rows.jsonl, max_length: 4096}
train: {epochs: 2, micro_batch: 2, global_batch: 64, learning_rate: 1e-4}
checkpoint: {every_steps: 100}
evaluate:
  - user: 你是谁？
    contains: [小鹪]
"""


def flags() -> Iterator[str]:
    from typer.main import get_command

    def walk(command: object, name: str) -> Iterator[str]:
        for parameter in sorted(command.params, key=lambda p: p.name):
            yield f"{name}  {' '.join(sorted([*parameter.opts, *parameter.secondary_opts]))}"
        for child, sub in sorted(getattr(command, "commands", {}).items()):
            yield from walk(sub, f"{name} {child}")

    yield from walk(get_command(app), "launch")


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for attribute, field in model.model_fields.items():
        name = field.alias or attribute
        inner = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(t, type)]
        sections = [t for t in inner if issubclass(t, BaseModel)]
        yield from (keys(sections[0], f"{prefix}{name}.") if sections else [f"{prefix}{name}"])


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    recipe = tmp_path / "qwen.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    loaded = load_recipe(recipe)
    source = resolve_source(loaded.recipe.model.source, tmp_path)
    run = RunDir(tmp_path / "runs" / "qwen-20260102-030405-abcd")
    options = Options("torchrun", False, tmp_path / "cache", 0.0, "launch qwen.yaml --gpus 0,2", ())
    selection = Selection("cuda", GPUS, 2, 4)
    result = plan_run(loaded, selection, source, read_facts(source), run, options)
    assert result == plan_run(loaded, selection, source, read_facts(source), run, options)
    data = result.to_dict()
    data["commands"] = [load("torchrun").command(job) for job in result.jobs]
    return data


def normalised(value: object, tmp_path: Path) -> str:
    import sys

    from launcher.stages import PACKAGE_ROOT

    text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)
    for path, name in ((tmp_path, "<tmp>"), (sys.executable, "<python>"), (PACKAGE_ROOT, "<package>")):
        text = text.replace(str(path), name)
    return text + "\n"


MEANT = "if the change is meant: --update-golden"


def test_flags_are_frozen(golden: Golden) -> None:
    text = "\n".join(flags()) + "\n"
    assert text == golden("cli_flags.txt", text), MEANT


def test_recipe_keys_are_frozen(golden: Golden) -> None:
    text = "\n".join(keys(Recipe)) + "\n"
    assert text == golden("recipe_keys.txt", text), MEANT


def test_plan_is_golden(plan: dict, tmp_path: Path, golden: Golden) -> None:
    # The digest is taken over absolute paths, which differ from machine to machine.
    assert len(plan.pop("digest")) == 16
    text = normalised(plan, tmp_path)
    assert text == golden("plan_qwen_qlora_2gpu.json", text), MEANT


def test_worker_reads_back_exactly_what_was_planned(plan: dict) -> None:
    from trainer.spec import TrainSpec

    spec = TrainSpec.from_dict(json.loads(json.dumps(plan["spec"])))
    assert spec.digest() == plan["digest"]
    assert json.loads(json.dumps(spec.to_dict())) == json.loads(json.dumps(plan["spec"]))
