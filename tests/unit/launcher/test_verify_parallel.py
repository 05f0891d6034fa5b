"""Which layouts are compared, when their numbers agree, and what the table says."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.commands import ROOT
from support.handmade_run import make_spec

from cluster.inventory import Device, Inventory
from launcher.errors import LaunchError
from launcher.start import Request
from launcher.verify_compare import Comparison, Side, compare, to_json, tolerance_of
from launcher.verify_page import page
from launcher.verify_parallel import Wanted, parse_against, plan_layouts, reference_layout
from trainer.spec import TrainSpec

NAMES = ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "model.norm.weight")


def spec(tmp_path: Path) -> TrainSpec:
    """micro 2 x accumulate 4 x dp 2 under ZeRO 2."""
    return make_spec(tmp_path)


def step(number: int, rows: list[list[int]], loss: float, positions: int = 512) -> dict[str, Any]:
    return {
        "step": number,
        "loss": loss,
        "grad_norm": 2.5,
        "skipped": False,
        "tokens": 500,
        "supervised_tokens": 90,
        "supervised_seen": 90,
        "positions": positions,
        "rows": rows,
        "seconds": 0.5,
    }


def sides() -> tuple[Side, Side]:
    """dp 2 and one process, after two steps that agree but for rounding."""
    plan = {"digest": "a", "num_layers": 2, "steps": [step(1, [[3, 1], [0, 2]], 4.0), step(2, [[4, 6], [5, 7]], 3.5)]}
    same = {"digest": "b", "num_layers": 2, "steps": [step(1, [[3, 0, 1, 2]], 4.00001), step(2, [[4, 5, 6, 7]], 3.5)]}
    same["differences"] = [
        {"step": number, "name": name, "relative": 2e-6 * number, "max_abs": 1e-9}
        for number in (1, 2)
        for name in NAMES
    ]
    return Side(2, 1, 2, "none", 1, 2, plan), Side(1, 1, 1, "none", 1, 4, same)


def changed(path: tuple[Any, ...], value: Any) -> Comparison:
    """The comparison after one value of the reference's probe was replaced."""
    plan, reference = sides()
    result = copy.deepcopy(reference.result)
    at = result
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return compare(plan, Side(1, 1, 1, "none", 1, 4, result), "fp32")


def test_against_is_read() -> None:
    assert parse_against("sp=1") == {"sp": 1}
    assert parse_against("dp=2, zero=0，accumulate=8") == {"dp": 2, "zero": 0, "accumulate": 8}


@pytest.mark.parametrize("text", ["", "sp", "sp=", "sp=one", "sp=0", "zero=4", "tp=2", "sp=1,sp=2", "dp=-1", "dp=1,"])
def test_against_refuses_what_it_does_not_know(text: str) -> None:
    with pytest.raises(LaunchError, match=f"--against {text}:") as caught:
        parse_against(text)
    assert "zero=(0 to 3)" in caught.value.hint


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, Wanted(dp=1, sp=1, zero=1, offload="none", accumulate=8)),
        ({"zero": 3}, Wanted(dp=2, sp=1, zero=3, offload="none", accumulate=4)),
        ({"dp": 4}, Wanted(dp=4, sp=1, zero=2, offload="none", accumulate=2)),
        ({"accumulate": 8, "sp": 2}, Wanted(dp=1, sp=2, zero=2, offload="none", accumulate=8)),
        ({"dp": 8, "accumulate": 1}, Wanted(dp=8, sp=1, zero=2, offload="none", accumulate=1)),
    ],
)
def test_reference_keeps_the_rows_of_a_step(tmp_path: Path, given: dict[str, int] | None, expected: Wanted) -> None:
    assert reference_layout(spec(tmp_path), given) == expected


@pytest.mark.parametrize("given", [{"dp": 3}, {"accumulate": 3}, {"dp": 2, "accumulate": 2}, {"dp": 16}])
def test_rows_that_cannot_be_divided_are_refused(tmp_path: Path, given: dict[str, int]) -> None:
    with pytest.raises(LaunchError, match="16 rows of a step cannot be micro 2 x dp") as caught:
        reference_layout(spec(tmp_path), given)
    assert "dp=4,accumulate=2" in caught.value.hint


@pytest.fixture
def request_4_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A recipe on the last two of four pretended GPUs."""
    gpus = tuple(Device(str(i), "NVIDIA A100", f"GPU-{i:04d}", 80.0, 79.0, False, False, "") for i in range(4))
    monkeypatch.setattr("cluster.nvml.read_inventory", lambda: Inventory("cuda", gpus, 16, 256.0))
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    (tmp_path / "r.yaml").write_text(
        f"model: random:{ROOT / 'recipes' / 'tiny'}\nmethod: full\ndata: rows.jsonl\ntrain: {{global_batch: 8, epochs: 1}}\n"
        f"evaluate: {{prompts: [Hi], samples_every_steps: 5}}\nrun: {{dir: {tmp_path / 'runs'}}}\n",
        encoding="utf-8",
    )
    return Request(str(tmp_path / "r.yaml"), "2,3", None, None, 1, None, ("parallel.zero=2", "train.seed=7"), False)


def test_references_run_on_the_first_of_the_plans_devices(request_4_gpus: Request) -> None:
    plans = [plan for plan, _, _ in plan_layouts(request_4_gpus, ["dp=1,zero=1", "dp=1,sp=2,zero=3"])]
    assert [tuple(d["uuid"] for d in plan.devices) for plan in plans] == [
        ("GPU-0002", "GPU-0003"),
        ("GPU-0002",),
        ("GPU-0002", "GPU-0003"),
    ]
    layouts = [(p.spec.parallel.dp, p.spec.parallel.sp, p.spec.parallel.zero_stage) for p in plans]
    assert layouts == [(2, 1, 2), (1, 1, 1), (1, 2, 3)]
    assert [p.spec.optim.accumulate for p in plans] == [4, 8, 8]
    assert {p.spec.optim.seed for p in plans} == {7}
    folders = [Path(p.spec.paths.run_dir) for p in plans]
    assert [f.name for f in folders] == ["plan", "reference_1", "reference_2"]
    assert len({f.parent for f in folders}) == 1
    assert not folders[0].parent.exists()


def test_the_simplest_layout_needs_one_device(request_4_gpus: Request) -> None:
    (_, _, _), (simplest, _, request) = plan_layouts(request_4_gpus, ())
    assert simplest.spec.parallel == dataclasses.replace(
        simplest.spec.parallel, world_size=1, dp=1, sp=1, zero_stage=1, offload="none"
    )
    assert request.gpus == "GPU-0002"


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (["zero=2"], "is the plan's own layout"),
        (["dp=4"], "needs 4 devices, 2 are chosen"),
        (["dp=1", "dp=8"], "needs 8 devices"),
    ],
)
def test_a_layout_that_cannot_be_compared_is_refused(request_4_gpus: Request, against: list[str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        plan_layouts(request_4_gpus, against)


def test_rounding_is_equal() -> None:
    comparison = compare(*sides(), "fp32")
    assert comparison.equal
    assert [d.name for d in comparison.deviations] == ["loss", "gradient norm", *NAMES]
    assert comparison.deviations[0].step == 1
    assert comparison.deviations[2].step == 2


def test_deeper_models_and_coarser_numbers_may_differ_more() -> None:
    assert tolerance_of("fp32", 80) == tolerance_of("fp32", 2)
    allowed = [tolerance_of(dtype, n).gradient for dtype, n in (("fp32", 30), ("fp16", 30), ("bf16", 2), ("bf16", 30))]
    assert allowed == sorted(allowed)
    # Seen between dp 2 and one process: SmolLM2-135M in bf16; and what a mean of means does to a model of two layers.
    assert 0.07 < tolerance_of("bf16", 30).gradient < 0.15
    assert tolerance_of("bf16", 2).gradient < 0.09


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("steps", 1, "loss"), 3.5001, "loss"),
        (("steps", 0, "loss"), None, "loss"),
        (("steps", 0, "grad_norm"), 2.501, "gradient norm"),
        (("differences", 1, "relative"), 2e-4, NAMES[1]),
        (("differences", 3, "relative"), None, NAMES[1]),
    ],
)
def test_a_number_beyond_its_tolerance_differs(path: tuple[Any, ...], value: Any, name: str) -> None:
    comparison = changed(path, value)
    assert not comparison.equal
    assert [d.name for d in comparison.deviations if not d.ok] == [name]
    assert not comparison.problems


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("steps", 1, "rows"), [[4, 5, 6, 8]], "step 2: the rows differ: 7 only in the plan, 8 only there"),
        (("steps", 0, "supervised_seen"), 45, "45 supervised tokens reached the model, the rows have 90"),
        (("steps", 0, "positions"), 256, "512 positions in the plan's layout, 256 there"),
        (
            ("steps", 1, "skipped"),
            True,
            "the plan tried 2 steps and skipped none, the other tried 2 steps and skipped 2",
        ),
    ],
)
def test_other_inputs_are_said_in_words(path: tuple[Any, ...], value: Any, said: str) -> None:
    comparison = changed(path, value)
    assert not comparison.equal
    assert any(said in problem for problem in comparison.problems), comparison.problems


def test_ranks_of_a_sequence_group_must_read_the_same_rows() -> None:
    plan, reference = sides()
    shared = {**plan.result, "steps": [step(1, [[0, 1, 2, 3], [0, 1, 2, 9]], 4.0)]}
    problems = compare(Side(1, 2, 2, "none", 1, 4, shared), reference, "fp32").problems
    assert any("ranks that should share a row read different ones" in p for p in problems)


def test_padding_to_a_multiple_of_sp_is_no_difference() -> None:
    plan, reference = sides()
    steps = [step(1, [[0, 1, 2, 3]] * 3, 4.0, positions=520), step(2, [[4, 5, 6, 7]] * 3, 3.5, positions=520)]
    padded = {**plan.result, "steps": steps}
    assert compare(Side(1, 3, 2, "none", 1, 4, padded), reference, "fp32").equal
    steps[0]["positions"] = 521
    assert not compare(Side(1, 3, 2, "none", 1, 4, padded), reference, "fp32").equal


def test_nothing_compared_is_not_equal() -> None:
    plan, reference = sides()
    skipped = [{**s, "skipped": True} for s in plan.result["steps"]]
    nothing = {**reference.result, "steps": skipped, "differences": []}
    comparison = compare(
        Side(2, 1, 2, "none", 1, 2, {**plan.result, "steps": skipped}), Side(1, 1, 1, "none", 1, 4, nothing), "fp16"
    )
    assert not comparison.equal
    assert "no step was taken by both" in " ".join(comparison.problems)


def test_page_is_aligned_and_plain() -> None:
    plan, reference = sides()
    bad = changed(("steps", 1, "loss"), 4.5)
    text = page("fp32", plan, [(reference, compare(plan, reference, "fp32")), (reference, bad)], color=False)
    assert "\033" not in text
    loss = next(line for line in text.splitlines() if line.startswith("  loss"))
    assert "2.5e-06 (step 1, 1.0e-05 absolute) ok" in loss
    assert "2.2e-01 (step 2, 1.0e+00 absolute) DIFFERS" in loss
    head = next(line for line in text.splitlines() if line.startswith("largest deviation"))
    assert head.index("reference 2") == loss.index("2.2e-01")
    assert "  model.layers.0.self_attn.q_proj.lora_A " in text
    assert "reference 2: dp 1 x sp 1, ZeRO 1: DIFFERS" in text


def test_page_shows_steps_that_only_one_layout_tried_or_took() -> None:
    plan, reference = sides()
    third = {**step(3, [[1, 2], [3, 4]], 3.0), "grad_norm": None, "skipped": True}
    longer = dataclasses.replace(plan, result={**plan.result, "steps": [*plan.result["steps"], third]})
    text = page("fp16", longer, [(reference, compare(longer, reference, "fp16"))], color=False)
    (line,) = [line for line in text.splitlines() if line.startswith("gradient norm, step 3")]
    assert line.split() == ["gradient", "norm,", "step", "3", "skipped", "not", "tried"]
    assert "the plan tried 3 steps and skipped 3, the other tried 2 steps and skipped none" in text


def test_page_on_a_terminal_is_colored() -> None:
    plan, reference = sides()
    text = page("fp32", plan, [(reference, changed(("steps", 1, "loss"), 4.5))], color=True)
    assert "\033[31mDIFFERS\033[0m" in text
    assert "\033[32mok\033[0m" in text


def test_json_holds_every_step_and_the_verdict() -> None:
    plan, reference = sides()
    result = to_json("fp32", plan, [(reference, compare(plan, reference, "fp32"))], "/runs/verify")
    assert result["equal"] is True
    assert result["plan"]["layout"] == {
        "dp": 2, "sp": 1, "zero": 2, "offload": "none", "micro_batch": 1, "accumulate": 2,
    }  # fmt: skip
    (other,) = result["references"]
    assert [s["loss"] for s in other["steps"]] == [4.00001, 3.5]
    assert other["largest"][0]["ok"]
    assert len(other["gradient_differences"]) == 4
