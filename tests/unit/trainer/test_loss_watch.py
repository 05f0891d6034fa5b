"""Spikes, steps that must not count, and what is kept of their rows."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.handmade_run import make_spec

from trainer.data import TokenData, TokenWriter
from trainer.engine import Ranks
from trainer.loss_watch import (
    MAX_SKIPS_IN_A_ROW,
    LossWatch,
    Spike,
    find_spike,
    keep_batch,
    rows_of_step,
    sources_of,
    what_is_not_finite,
)
from trainer.pack import pack_documents
from trainer.progress import Step
from trainer.spec import TrainError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("before", "loss", "spike"),
    [
        ([2.0] * 14, 99.0, False),  # too few to expect anything
        ([2.0] * 15, 2.39, False),  # however quiet, a fifth more is no spike
        ([2.0] * 15, 2.41, True),
        ([0.01] * 15, 0.10, False),  # ten times as much, and nothing
        ([0.01] * 15, 0.12, True),
        ([0.0] * 15, 0.2, True),
        ([2.0, 2.2] * 10, 2.9, False),  # within what such losses scatter
        ([2.0, 2.2] * 10, 4.0, True),
        ([2.0] * 19 + [9.0], 2.0, False),
        ([2.0] * 19 + [9.0], 5.0, True),  # one spike does not hide the next
        ([7.0 - 0.2 * n for n in range(20)], 3.2, False),  # the steep fall of the first steps
        ([7.0 - 0.2 * n for n in range(20)], 7.0, False),
        ([9.0] * 40 + [2.0] * 40, 4.0, True),  # what lies long ago is forgotten
        ([2.0] * 15, INF, True),
    ],
)
def test_find_spike(before: list[float], loss: float, spike: bool) -> None:
    assert (find_spike(before, loss) is not None) == spike


def test_a_spike_says_what_was_expected() -> None:
    assert find_spike([2.0, 2.1, 2.2] * 10, 4.0) == Spike(4.0, 2.1)


def noisy(kind: str, steps: int, generator: random.Random) -> list[float]:
    """A falling loss as small batches give it."""
    losses = []
    for n in range(steps):
        base = 1.2 + 2.3 * math.exp(-n / 60)
        if kind == "even":
            losses.append(base + 0.1 * generator.gauss(0, 1))
        elif kind == "factor":
            losses.append(base * generator.lognormvariate(0, 0.25))
        else:  # every hundredth row is twice as hard
            losses.append(base * generator.lognormvariate(0, 0.15) * (1.3 if n % 100 == 99 else 1))
    return losses


# 80 steps of recipes/smollm2_identity.yaml, which learns a few answers by heart: a steep fall, then scatter by a factor of 5.
REAL = (
    "3.95 4.06 3.66 2.06 2.51 1.69 1.35 0.97 1.02 0.73 0.62 1.28 0.82 0.94 0.85 0.53 0.84 0.33 0.73 0.41 "
    "0.60 0.89 0.29 0.67 0.38 0.67 0.32 0.23 0.27 0.46 0.46 0.21 0.15 0.21 0.39 0.39 0.50 0.39 0.58 0.31 "
    "0.18 0.37 0.28 0.20 0.15 0.21 0.25 0.18 0.18 0.10 0.12 0.29 0.31 0.07 0.24 0.10 0.14 0.08 0.13 0.11 "
    "0.09 0.15 0.09 0.04 0.17 0.09 0.12 0.14 0.10 0.05 0.10 0.09 0.09 0.09 0.12 0.09 0.08 0.08 0.13 0.09 "
)


@pytest.mark.parametrize("kind", ["even", "factor", "hard rows"])
def test_ordinary_curves_raise_no_alarm(kind: str) -> None:
    curve = noisy(kind, 600, random.Random(1))
    assert [n for n, loss in enumerate(curve) if find_spike(curve[:n], loss)] == []
    broken = [*curve[:300], 3 * curve[300], *curve[301:]]
    assert [n for n, loss in enumerate(broken) if find_spike(broken[:n], loss)] == [300]


def test_a_real_curve_raises_no_alarm() -> None:
    curve = [float(x) for x in REAL.split()]
    assert len(curve) == 80
    assert not any(find_spike(curve[:n], loss) for n, loss in enumerate(curve))
    assert find_spike(curve, 3.0)


@pytest.mark.parametrize(
    ("dtype", "loss", "norm", "skipped", "what"),
    [
        ("bf16", 1.0, 1.0, False, ""),
        ("bf16", NAN, INF, True, "loss"),
        ("bf16", 1.0, INF, True, "gradient"),
        ("bf16", 1.0, INF, False, "gradient"),  # an engine without a check of its own
        ("fp32", INF, 1.0, False, "loss"),
        ("fp32", 1.0, NAN, False, "gradient"),
        ("fp16", 1.0, INF, True, ""),
        ("fp16", NAN, INF, True, ""),
        ("fp16", NAN, 1.0, False, "loss"),  # the update went through
        ("fp16", 1.0, 1.0, False, ""),
    ],
)
def test_what_is_not_finite(dtype: str, loss: float, norm: float, skipped: bool, what: str) -> None:
    assert what_is_not_finite(dtype, loss, norm, skipped) == what


@pytest.fixture
def watch(tmp_path: Path) -> LossWatch:
    """Of a run of 2 x 2 micro batches of 2 rows, over 16 rows of 3 tokens."""
    folder = tmp_path / "entry"
    folder.mkdir()
    writer = TokenWriter(folder)
    for n in range(16):
        writer.add([10 + n, 20, 30], [False, True, True], 0, n + 1)
    offsets, order = pack_documents(np.asarray(writer.lengths), 4, packing=True)
    index = {"packing": True, "max_length": 4, "pad_token_id": 9, "eos_token_id": 8, "data_files": ["/数.jsonl"]}
    writer.finish(offsets, order, {**index, "num_rows": len(offsets) - 1, "num_held_out_rows": 0})
    spec = make_spec(tmp_path)
    spec = dataclasses.replace(spec, optim=dataclasses.replace(spec.optim, accumulate=2))
    ranks = Ranks(rank=0, local_rank=0, world_size=2, dp_rank=0, sp_rank=0, device=torch.device("cpu"))
    return LossWatch(spec, ranks, TokenData.open(folder))


def step(loss: float, skipped: bool = False) -> Step:
    return Step(loss, 24, 16, 1.0, skipped, 4.0 if skipped else None, False, 1.0, 1.0, {})


def test_a_spike_names_the_rows_of_its_step(watch: LossWatch) -> None:
    for n in range(20):
        assert watch.look(step(2.0), n % 2 + 1) is None
    found = watch.look(step(9.0), 2)
    assert found is not None
    assert (found["loss"], found["expected"], found["rows_left_out"]) == (9.0, 2.0, 0)
    rows = [r for of_rank in rows_of_step(1, watch.spec, watch.data) for micro in of_rank for r in micro]
    assert len(rows) == 8
    assert found["rows"] == sources_of(rows, watch.data)
    assert all(source.startswith("/数.jsonl:") for source in found["rows"])


def test_a_skipped_step_is_expected_of_nothing(watch: LossWatch) -> None:
    for n in range(20):
        assert watch.look(step(2.0), n + 1) is None
    assert watch.look(step(math.nan, skipped=True), 1) is None
    assert watch.look(step(math.inf, skipped=True), 1) is None
    assert list(watch.recent) == [2.0] * 20


def test_skips_in_a_row_have_a_limit(watch: LossWatch) -> None:
    for _ in range(MAX_SKIPS_IN_A_ROW - 1):
        watch.look(step(math.nan, skipped=True), 1)
    watch.look(step(2.0), 1)
    for _ in range(MAX_SKIPS_IN_A_ROW - 1):
        watch.look(step(math.nan, skipped=True), 1)
    with pytest.raises(TrainError, match=rf"{MAX_SKIPS_IN_A_ROW} steps in a row were skipped.*loss scale 4\n") as error:
        watch.look(step(math.nan, skipped=True), 2)
    file = Path(watch.spec.paths.bad_batches_dir) / "step_000002.json"
    assert str(file) in error.value.hint
    assert len(json.loads(file.read_text(encoding="utf-8"))["micro_batches"]) == 4


def test_the_batch_is_kept_with_its_rows_and_tokens(watch: LossWatch) -> None:
    file = keep_batch("loss", 1, [(1, 0)], watch.spec, watch.ranks, watch.data)
    kept = json.loads(file.read_text(encoding="utf-8"))
    (batch,) = kept.pop("micro_batches")
    assert kept == {"step": 2, "not_finite": "loss", "dtype": "fp32"}
    rows = rows_of_step(1, watch.spec, watch.data)[1][0]
    assert (batch["dp_rank"], batch["micro_batch"], batch["rows"]) == (1, 0, rows)
    assert batch["sources"] == sources_of(rows, watch.data)
    expected = watch.data.batch(rows, 8)
    assert batch["input_ids"] == expected.input_ids_1T[0].tolist()
    assert batch["labels"] == expected.labels_1T[0].tolist()
    assert tuple(batch["document_lengths"]) == expected.document_lengths


def test_only_rank_0_writes_the_batch(watch: LossWatch) -> None:
    other = dataclasses.replace(watch.ranks, rank=1, dp_rank=1)
    file = keep_batch("loss", 0, [(0, 0)], watch.spec, other, watch.data)
    assert file == Path(watch.spec.paths.bad_batches_dir) / "step_000001.json"
    assert not file.exists()
