"""Every shipped recipe loads, is short, says how to run it, and plans on hosts of every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.inventory import Device, Inventory, Selection, cpu_selection, select
from launcher.recipe import LoadedRecipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NUM_RECIPES = 9
MAX_RECIPE_LINES = 40


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


def pretended_host(num_gpus: int) -> Inventory:
    """A host with `num_gpus` free cards of 80 GB."""
    devices = tuple(
        Device(
            index=str(i),
            name="NVIDIA H100 80GB HBM3",
            uuid=f"GPU-{i:08d}-0000-0000-0000-000000000000",
            memory_total_gb=79.6,
            memory_free_gb=79.0,
            is_mig=False,
            mig_mode=False,
            parent_uuid="",
        )
        for i in range(num_gpus)
    )
    return Inventory(kind="cuda" if devices else "cpu", devices=devices, cpu_count=32, memory_gb=256.0)


def selection(num_gpus: int) -> Selection:
    host = pretended_host(num_gpus)
    return select(host, "all", {}) if num_gpus else cpu_selection(1, host)


def plan(loaded: LoadedRecipe, chosen: Selection, run_root: Path) -> Any:
    from launcher.model_facts import read_facts, resolve_source
    from launcher.plan import Options, plan_run
    from launcher.run_dir import RunDir

    source = resolve_source(loaded.recipe.model.source, loaded.files[0].parent)
    options = Options(
        backend="torchrun",
        debug=False,
        cache_dir=run_root / "cache",
        host_memory_gb=256.0,
        command="launch recipe.yaml",
        warnings=(),
    )
    return plan_run(loaded, chosen, source, read_facts(source), RunDir(run_root / "run"), options)


def test_all_recipes_are_found() -> None:
    assert len(RECIPES) == NUM_RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_recipe_loads(path: Path) -> None:
    assert load_recipe(path).recipe.model.source


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_recipe_is_short_and_opens_with_its_command(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_RECIPE_LINES
    assert lines[0].startswith("# yaml-language-server: $schema=")
    comments = "\n".join(line for line in lines[:12] if line.startswith("#"))
    assert f"launch recipes/{ids(path)}" in comments


@pytest.mark.parametrize("num_gpus", [0, 1, 2, 4])
@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_recipe_plans(path: Path, num_gpus: int, tmp_path: Path) -> None:
    loaded = load_recipe(path)
    chosen = selection(num_gpus)
    planned = plan(loaded, chosen, tmp_path)
    assert planned.spec.parallel.world_size == chosen.num_processes
    assert planned.spec.parallel.dp * planned.spec.parallel.sp == chosen.num_processes
    assert [job.name for job in planned.jobs][:2] == ["prepare", "train"]
