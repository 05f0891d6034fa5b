"""From traces to figures, marks and the page."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import CONTENDERS, Case, cases_of
from benchmarks.table import compare, marks_of, table_page
from benchmarks.trace import Measured, Step, Trace, measure, read_peer, read_product
from benchmarks.verdict import CUT_SHORT, DONE, FAILED, REFUSED, first_error, judge

LOSSES = (1.7, 1.6, 1.65, 1.6)


def trace(tokens: tuple[int, ...], losses: tuple[float, ...] = LOSSES, seconds: float = 2.0) -> Trace:
    steps = [
        Step(100 + i * seconds, n, n - 10, n * 2, loss) for i, (n, loss) in enumerate(zip(tokens, losses, strict=True))
    ]
    return Trace(95.0, tuple(steps))


def measured(tokens: tuple[int, ...] = (50, 60, 70, 80), losses: tuple[float, ...] = LOSSES) -> Measured:
    found = measure(trace(tokens, losses), 90.0)
    assert found is not None
    return found


def test_first_steps_are_not_timed() -> None:
    short = measured()
    assert (short.skipped_steps, short.seconds_per_step) == (1, 2.0)
    assert short.tokens_per_s == pytest.approx((60 + 70 + 80) / 6)
    assert short.supervised_per_s == pytest.approx((50 + 60 + 70) / 6)
    assert (short.first_step_s, short.train_begins_s) == (10.0, 5.0)
    assert short.padding_share == pytest.approx(0.5)
    assert short.last_loss == pytest.approx((1.6 + 1.65 + 1.6) / 3)
    long = measure(trace((9, 9, 9, 50, 60, 70), (1.0,) * 6), 90.0)
    assert long is not None
    assert long.skipped_steps == 3
    assert long.tokens_per_s == pytest.approx(180 / 6)
    assert measure(trace((5,), (1.0,)), 90.0) is None


def test_traces_are_read_while_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [
        {"event": "train_begin", "time": 1.0},
        {"event": "step", "time": 2.0, "step": 1, "tokens": 5, "supervised": 3, "slots": 8},
        {"event": "loss", "time": 2.1, "step": 1, "loss": 1.5},
        {"event": "step", "time": 3.0, "step": 2, "tokens": 6, "supervised": 4, "slots": 8},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "lo', encoding="utf-8")
    assert read_peer(file) == Trace(1.0, (Step(2.0, 5, 3, 8, 1.5), Step(3.0, 6, 4, 8, None)))
    row = {"step": 1, "time": 4.0, "loss": 1.25, "tokens": 7, "supervised_tokens": 6, "seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert read_product(tmp_path) == Trace(None, (Step(4.0, 7, 6, 0, 1.25),))


def test_equal_losses_on_the_same_rows_are_not_marked() -> None:
    text = compare(measured().to_dict(), measured().to_dict(), 4)
    assert text.startswith("same rows; losses agree to 0.0000")


def test_line_ends_that_one_program_learns_are_no_disagreement() -> None:
    ours, theirs = measured(), measured((54, 64, 74, 84))
    scaled = [loss * (n - 14) / (n - 10) for loss, n in zip(LOSSES, (54, 64, 74, 84), strict=True)]
    theirs = replace(theirs, losses=tuple(scaled), first_loss=scaled[0])
    text = compare(theirs.to_dict(), ours.to_dict(), 4)
    assert text.startswith("same rows, 4 more tokens a step")
    assert "MARK" not in text
    assert "MARK: losses cannot be compared" in compare(theirs.to_dict(), ours.to_dict(), 0)


@pytest.mark.parametrize(
    ("tokens", "losses", "expected"),
    [
        ((50, 60, 70, 80), (1.72, 1.6, 1.65, 1.6), "MARK: losses disagree by 0.0200 in the first step"),
        ((50, 60, 70, 80), (1.7, 1.7, 1.65, 1.7), "MARK: losses disagree by 0.0"),
        ((50, 99, 70, 80), LOSSES, "MARK: other rows from step 2 on (99 tokens, not 60)"),
        ((99, 60, 70, 80), LOSSES, "other rows, 99 tokens in the first step and not 50"),
    ],
)
def test_disagreement_is_marked_with_its_reason(
    tokens: tuple[int, ...], losses: tuple[float, ...], expected: str
) -> None:
    assert expected in compare(measured(tokens, losses).to_dict(), measured().to_dict(), 0)


def result(case: Case, found: Measured | None, state: str = DONE, reason: str = "") -> dict[str, Any]:
    return {
        "case": asdict(case),
        "command": f"run {case.label}",
        "state": state,
        "reason": reason,
        "measured": found.to_dict() if found else None,
        "peak_mb": 2000.0,
        "tree_pss_mb": 2100.0,
    }


def test_the_page_shows_figures_failures_and_refusals() -> None:
    ours, lf, trl = cases_of(["padded"], list(CONTENDERS), None, 2)
    first, second, *_ = cases_of(["zero"], list(CONTENDERS), None, 2)
    results = [
        result(ours, measured((100, 200, 300, 400))),
        result(lf, measured((100, 150, 300, 200))),
        result(trl, None, FAILED, "exit code 1: ValueError: no | bf16\nhere"),
        result(first, None, REFUSED, "error: not yet"),
        result(second, measured()),
    ]
    document = {
        "settings": {"data": "d.json"},
        "machine": {"date": "today", "cpu": "a CPU", "cores": 2, "memory_gb": 24, "platform": "Linux"},
        "versions": {"trl": {"torch": "2.13.0"}},
        "dtype": "fp32",
        "matmul": {"forward": 400.0},
        "matmul_rate": 400.0,
        "num_parameters": 100_000_000,
        "num_rows": 999,
        "results": {str(i): r for i, r in enumerate(results)},
    }
    page = table_page(document)
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in page.splitlines() if " | " in line}
    assert rows["tunelaunch"][3:5] == ["150.0", "1.38 x"]
    assert rows["tunelaunch"][7] == "60 GF/s, 15%"
    assert "fp32 matmul, GFLOP/s: 400 over all layers of the model; forward 400." in page
    assert "MARK: other rows from step 2 on (150 tokens, not 200)" in rows["llamafactory"][-1]
    assert "failed: exit code 1: ValueError: no \\| bf16 here" in page
    assert "refused: error: not yet" in page
    assert "run ZeRO 0, 1 process" in page
    widths = {
        len(line.replace("\\|", "").split("|"))
        for line in page.splitlines()
        if line.startswith("| ") and "MARK" in line
    }
    assert widths == {14}
    assert marks_of(results[:2]) == {"llamafactory": rows["llamafactory"][-1].removesuffix(" |")}


def test_verdicts() -> None:
    ours, lf, _ = cases_of(["padded"], list(CONTENDERS), 4, 2)
    assert judge(ours, 4, 130, False, "") == (DONE, "")
    assert judge(ours, 0, 2, False, "plan\nerror: no ZeRO 0\nUse 1.\n") == (REFUSED, "error: no ZeRO 0\nUse 1.")
    assert judge(lf, 3, -9, True, "")[0] == CUT_SHORT
    assert judge(lf, 0, -9, True, "") == (FAILED, "0 of 4 steps within 300 s")
    log = "loading\r10%\rTraceback (most recent call last):\n  File x\nValueError: bad\nhint\nsubprocess.CalledProcessError: y\n"
    assert judge(lf, 0, 1, False, log)[1].startswith("exit code 1: ValueError: bad\nhint")
    assert first_error("a\nb\nc\nd\n") == "b\nc\nd"
    assert first_error("[rank0]: torch.OutOfMemoryError: x") == "[rank0]: torch.OutOfMemoryError: x"
