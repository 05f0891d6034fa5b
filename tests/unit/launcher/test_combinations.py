"""Every combination of the keys that depend on one another either plans or is refused with what would work."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.inventory import Device, Selection
from launcher.combinations import Combination, compile_refusals, refusals, stored_refusals
from launcher.compatibility_table import JOINED_WHILE_LOADING
from launcher.errors import PlanError
from launcher.layout import Layout, decide_layout
from launcher.model_facts import ModelFacts, read_facts, stored_quantisation
from launcher.model_source import resolve_source
from launcher.plan import Options, Plan, plan_run
from launcher.recipe import load_recipe
from launcher.recipe_schema import Recipe
from launcher.run_dir import RunDir

GPUS = tuple(Device(str(i), "A100", f"GPU-{i}", 80.0, 79.0, False, False, "") for i in range(2))
SELECTIONS = {"cpu": Selection("cpu", (), 2, 1), "cuda": Selection("cuda", GPUS, 2, 4)}
METHODS, STAGES, DTYPES = ("full", "lora", "qlora"), (0, 1, 2, 3), ("bf16", "fp32", "fp16")
OFFLOADS = ("none", "optimizer", "parameters")
LEGEND = """Every combination of method, ZeRO stage, offload and dtype on 2 processes, 2 micro batches a step.
A number leads to the note below: what is warned of, or why it is refused and what works in its place.

"""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


def facts(**changes: Any) -> ModelFacts:
    found = read_facts(resolve_source("Qwen/Qwen2.5-0.5B", Path("/")))
    assert found is not None
    return dataclasses.replace(found, **changes)


def layout(
    device: str, method: str, zero: Any, dtype: str, offload: str, known: ModelFacts | None = None, **sections: Any
) -> Layout:
    recipe = Recipe.model_validate(
        {
            "model": {"source": "a/b", "dtype": dtype},
            "method": {"name": method},
            "data": {"files": [{"path": "x.jsonl"}]},
            "train": {"accumulate": 2},
            "parallel": {"zero": zero, "offload": offload},
            **sections,
        }
    )
    return decide_layout(recipe, SELECTIONS[device], known or facts())


def test_every_combination_works_or_is_refused(golden: Callable[[str, str], str]) -> None:
    notes: list[str] = []

    def cell(found: Layout) -> str:
        assert not found.problems
        texts = [f"{p.where}: {p.message}. {p.hint}" for p in found.refusals] or list(found.warnings)
        notes.extend(t for t in texts if t not in notes)
        numbers = ",".join(str(notes.index(t) + 1) for t in texts)
        return ("refused" if found.refusals else "works") + (f" {numbers}" if numbers else "")

    rows: list[tuple[str, ...]] = [("device", "method", "zero", "offload", *DTYPES)]
    for device, method, zero, offload in itertools.product(SELECTIONS, METHODS, STAGES, OFFLOADS):
        cells = [cell(layout(device, method, zero, dtype, offload)) for dtype in DTYPES]
        rows.append((device, method, str(zero), offload, *cells))
    table = "\n".join("  ".join(part.ljust(10) for part in row).rstrip() for row in rows)
    footnotes = "\n".join(f"{number}  {text}" for number, text in enumerate(notes, 1))
    text = f"{LEGEND}{table}\n\n{footnotes}\n"
    assert text == golden("combinations.txt", text), "if the change is meant: --update-golden"


@pytest.mark.parametrize("device", SELECTIONS)
def test_what_a_refusal_proposes_is_not_refused(device: str) -> None:
    for method, zero, offload in itertools.product(METHODS, STAGES, OFFLOADS):
        for refusal in layout(device, method, zero, "bf16", offload).refusals:
            stage, other = re.search(r"zero: (\d)", refusal.hint), re.search(r"offload: (\w+)", refusal.hint)
            assert stage or other
            if stage:
                assert not layout(device, method, int(stage[1]), "bf16", offload).refusals
            if other:
                assert not layout(device, method, zero, "bf16", other[1]).refusals


def test_samples_under_zero3_are_refused() -> None:
    wanted: dict[str, Any] = {"evaluate": {"samples_every_steps": 5, "prompts": [{"user": "a"}]}}
    (refusal,) = layout("cuda", "lora", 3, "bf16", "none", **wanted).refusals
    assert refusal.where == "evaluate.samples_every_steps"
    assert "parallel.zero: 2" in refusal.hint
    assert not layout("cuda", "lora", 2, "bf16", "none", **wanted).refusals
    (refusal,) = layout("cuda", "lora", "auto", "bf16", "parameters", **wanted).refusals
    assert "parallel.zero: 2" not in refusal.hint


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "internlm2"}, "transformers has no InternLM2"),
        ({"model_type": "gemma2", "attention": ("softcapped",)}, "attn_logit_softcapping"),
        ({"model_type": "gpt_oss", "attention": ("full", "sinks", "sliding window")}, "has sinks"),
        ({"model_type": "qwen3_next", "attention": ("full", "recurrent")}, "carry one document of a row into the next"),
        ({"model_type": "llama4_text", "attention": ("chunked",)}, "fixed positions"),
    ],
)
def test_models_that_cannot_be_packed_are_refused_even_without_sharing_rows(changes: dict, reason: str) -> None:
    (refusal,) = layout("cpu", "lora", 2, "bf16", "none", facts(**changes)).refusals
    assert refusal.where == "model.source"
    assert reason in refusal.message
    assert "convert2llama.py" in refusal.hint or "Qwen2.5" in refusal.hint


def test_sliding_windows_and_latent_attention_are_not_refused() -> None:
    for kinds in (("sliding window",), ("full", "sliding window"), ("latent",)):
        assert not layout("cpu", "lora", 2, "bf16", "none", facts(attention=kinds)).refusals


def test_compile_without_a_compiler_or_under_zero3_is_refused() -> None:
    (refusal,) = compile_refusals(True, 2, "", "Install one.")
    assert (refusal.where, refusal.hint) == ("train.compile", "Install one.")
    assert not compile_refusals(True, 2, "/usr/bin/g++", "")
    assert not compile_refusals(False, 3, "", "")
    (refusal,) = compile_refusals(True, 3, "/usr/bin/g++", "")
    assert "parallel.zero: 2" in refusal.hint


@pytest.mark.parametrize(("max_length", "micro_batch", "refused"), [(4096, 1, False), (4097, 1, True), (2048, 3, True)])
def test_rows_beyond_a_stretched_context_are_refused(max_length: int, micro_batch: int, refused: bool) -> None:
    """Phi-3-mini-128k: above 4096 tokens every position of the row turns by other angles."""
    long_context = dataclasses.replace(facts(), stretches_beyond=4096)
    document = {
        "data": {"files": [{"path": "r.jsonl"}], "max_length": max_length},
        "train": {"micro_batch": micro_batch},
    }
    recipe = Recipe.model_validate({"model": {"source": "m"}, "method": {"name": "lora"}, **document})
    found = refusals(Combination("lora", 2, "bf16", "none", "cuda", 1), recipe, long_context)
    assert [r.where for r in found] == (["data.max_length"] if refused else [])
    assert not refusals(Combination("lora", 2, "bf16", "none", "cuda", 1), recipe, facts())


RECIPE = """model: Qwen/Qwen2.5-0.5B
method: qlora
data: rows.jsonl
train:
  compile: true
parallel:
  zero: 3
  offload: parameters
  sp: {sp}
"""


def plan(folder: Path, sp: int, compiler: str = "") -> Plan:
    (folder / "r.yaml").write_text(RECIPE.format(sp=sp), encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    loaded = load_recipe(folder / "r.yaml")
    source = resolve_source(loaded.recipe.model.source, folder)
    options = Options("torchrun", False, folder / "cache", 64.0, "launch r.yaml", (), compiler=compiler)
    return plan_run(loaded, SELECTIONS["cuda"], source, read_facts(source), RunDir(folder / "run"), options)


def test_refusals_of_a_plan_name_file_and_line(tmp_path: Path) -> None:
    found = {r.where.rpartition("/")[2]: r.hint for r in plan(tmp_path, 2).refusals}
    assert set(found) == {"r.yaml:8: parallel.offload", "r.yaml:5: train.compile"}
    assert "parallel.zero: 2" in found["r.yaml:5: train.compile"]


def test_a_size_that_does_not_fit_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"r\.yaml:9: parallel\.sp: sp 3 does not fit 2 processes"):
        plan(tmp_path, 3)


@pytest.mark.parametrize(("method", "refused"), [("gptq", True), ("awq", True), (None, False)])
def test_a_base_whose_files_are_quantised_is_refused(method: str | None, refused: bool, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    found = stored_refusals(stored_quantisation(resolve_source(str(folder), tmp_path)))
    assert [(p.where, method in p.message, "16-bit weights" in p.hint) for p in found if method] == (
        [("model.source", True, True)] if refused else []
    )
    assert not stored_quantisation(resolve_source("Qwen/Qwen2.5-0.5B", tmp_path))


def test_experts_that_are_joined_while_loading_go_with_every_stage_but_three() -> None:
    mixture = facts(model_type="qwen3_moe", num_experts=8)
    (refusal,) = layout("cpu", "lora", 3, "bf16", "none", mixture).refusals
    assert refusal.hint == "Write parallel.zero: 2 (or 1, 0)."
    assert refusal.change == "parallel:\n  zero: 2"
    (refusal,) = layout("cpu", "lora", 3, "bf16", "parameters", mixture).refusals
    assert refusal.change == "parallel:\n  zero: 2\n  offload: optimizer"
    for zero in (0, 1, 2, "auto"):
        assert not layout("cpu", "lora", zero, "bf16", "none", mixture).refusals
    dense = facts(model_type="deepseek_v3", num_experts=0)
    assert not layout("cpu", "lora", 3, "bf16", "none", dense).refusals


def test_families_whose_experts_are_joined_are_those_that_transformers_converts() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for family in JOINED_WHILE_LOADING:
        assert "experts" in str(get_checkpoint_conversion_mapping(family)), family
    for family in ("qwen2", "qwen3", "llama", "mistral", "gemma3_text", "jetmoe"):
        assert not get_checkpoint_conversion_mapping(family)
        assert family not in JOINED_WHILE_LOADING
