"""The same rows for everybody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.inputs import DEFAULT_ROWS, DataRow, default_rows, num_parameters, read_rows, write_inputs
from benchmarks.matmul import chosen_dtype, layer_shapes, model_rate
from benchmarks.peer_venvs import BenchError
from trainer.data import step_rows
from trainer.spec import OptimSpec

REPO = Path(__file__).resolve().parents[3]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def optim(micro_batch: int, accumulate: int) -> OptimSpec:
    return OptimSpec(
        0.0, 3, micro_batch, accumulate, 1e-4, "constant", 0.0, 0.0, (0.9, 0.999), 1e-8, 1.0, 42, False, False
    )


def test_peers_read_the_rows_in_the_order_in_which_this_project_trains_on_them(tmp_path: Path) -> None:
    rows = [DataRow(f"q{i}", f"a{i}") for i in range(50)]
    inputs = write_inputs(rows, tmp_path, 42)
    ours, theirs = lines(inputs.product_rows), lines(inputs.llamafactory_dir / "rows.jsonl")
    trained = [i for step in range(3) for micro in step_rows(step, 0, 50, optim(4, 2), 1) for i in micro]
    assert [ours[i] for i in trained] == theirs[: len(trained)]
    completions = [row["completion"][0]["content"] for row in lines(inputs.trl_dir / "train.jsonl")]
    assert completions == [row["output"] for row in theirs]
    assert {row["prompt"][0]["role"] for row in lines(inputs.trl_dir / "train.jsonl")} == {"system"}


def test_alpaca_rows_are_read_as_list_or_lines(tmp_path: Path) -> None:
    values = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "output": "Hello"}]
    (tmp_path / "a.json").write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    expected = [DataRow("Add.\n1 2", "3"), DataRow("Hi", "Hello")]
    assert read_rows(tmp_path / "a.json") == read_rows(tmp_path / "a.jsonl") == expected


@pytest.mark.parametrize("text", ['[{"text": "x"}]', "{", '["x"]'])
def test_other_data_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(BenchError, match="instruction"):
        read_rows(tmp_path / "a.json")


def test_a_stranger_has_data_too() -> None:
    rows = default_rows(REPO / "recipes/data")
    assert len(rows) == DEFAULT_ROWS
    assert all(row.question and row.answer for row in rows)


def test_parameters_and_layers_are_counted_alike(tmp_path: Path) -> None:
    config = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "vocab_size": 20}
    counts = layer_shapes(config)
    assert counts == {(8, 8): 6, (4, 8): 6, (12, 8): 6, (8, 12): 3, (20, 8): 1}
    tensors = {f"{i}.{n}": torch.zeros(*shape) for i, (shape, times) in enumerate(counts.items()) for n in range(times)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert num_parameters(tmp_path) == sum(a * b * times for (a, b), times in counts.items())


def test_rate_of_a_model_is_that_of_its_time() -> None:
    rates = {
        "forward 1024x8x8": 100.0,
        "gradient 1024x8x8": 100.0,
        "forward 1024x8x16": 50.0,
        "gradient 1024x16x8": 50.0,
    }
    # Half of the work (2 x 64 of 128 + 128) at 100, half at 50.
    assert model_rate(rates, {(8, 8): 2, (16, 8): 1}) == pytest.approx(2 / (1 / 100 + 1 / 50))


@pytest.mark.parametrize(
    ("bf16_instructions", "wanted", "dtype"),
    [
        (True, "auto", "bf16"),
        (False, "auto", "fp32"),
        (True, "fp32", "fp32"),
        (False, "bf16", "bf16"),
    ],
)
def test_the_dtype_is_what_the_cpu_is_quick_at_or_what_is_wanted(
    bf16_instructions: bool, wanted: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16_instructions)
    assert chosen_dtype(wanted) == dtype
