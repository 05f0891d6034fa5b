"""Which gradients a probe keeps, and how two of them are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trainer.parallel_probe import MAX_GATHERED, PROBE, choose_tensors, differences, kept, turn_dropout_off

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def full_shapes(num_layers: int, tied: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (100, 8)}
    for layer in range(num_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": (8, 8) for name in PROJECTIONS}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (8,)
    shapes["model.norm.weight"] = (8,)
    return shapes if tied else {**shapes, "lm_head.weight": (100, 8)}


@pytest.mark.parametrize("tied", [True, False])
def test_full_chooses_over_the_whole_depth(tied: bool) -> None:
    shapes = full_shapes(6, tied)
    names = choose_tensors(shapes)
    assert 4 <= len(names) <= 8
    assert names == [name for name in shapes if name in names]
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"} <= set(names)
    assert "model.layers.5.mlp.down_proj.weight" in names
    assert any(name.startswith("model.layers.3.") for name in names)
    assert ("lm_head.weight" in names) != tied


def test_lora_chooses_both_matrices_of_a_module() -> None:
    names = choose_tensors(
        {
            f"base_model.model.model.layers.{layer}.{module}.lora_{ab}.default.weight": (4, 8)
            for layer in range(4)
            for module in PROJECTIONS
            for ab in "AB"
        }
    )
    assert len(names) == 6
    assert {name.replace("lora_A", "lora_B") for name in names} == {n for n in names if "lora_B" in n}
    assert [int(name.split(".")[4]) for name in names] == [0, 0, 2, 2, 3, 3]


def test_a_gradient_too_large_to_gather_is_left_out() -> None:
    shapes = {**full_shapes(2, True), "model.embed_tokens.weight": (MAX_GATHERED, 2)}
    assert "model.embed_tokens.weight" not in choose_tensors(shapes)


def test_a_large_gradient_is_thinned_over_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.parallel_probe.MAX_KEPT", 100)
    gradient = torch.arange(10_000.0).view(500, 20)
    sample = kept(gradient)
    assert sample.numel() <= 100
    assert set((sample % 20).int().tolist()) == set(range(20))
    small = torch.ones(3, 4, dtype=torch.bfloat16)
    assert kept(small).dtype == torch.float32
    kept(small).zero_()
    assert small.sum() == 12


def folder(path: Path, gradients: list[torch.Tensor | None]) -> Path:
    """A probe of one tensor; None is a step that was skipped."""
    path.mkdir()
    steps = [{"step": i, "skipped": g is None} for i, g in enumerate(gradients, 1)]
    (path / PROBE).write_text(json.dumps({"steps": steps}), encoding="utf-8")
    for i, gradient in enumerate(gradients, 1):
        if gradient is not None:
            save_file({"w": gradient}, str(path / f"gradients_step_{i}.safetensors"))
    return path


def test_differences_are_relative_and_finite(tmp_path: Path) -> None:
    ones, zeros, broken = torch.ones(4), torch.zeros(4), torch.full((4,), float("nan"))
    ours = folder(tmp_path / "a", [ones, zeros, zeros, ones, ones, None])
    theirs = folder(tmp_path / "b", [2 * ones, zeros, ones, broken, None, ones])
    steps = json.loads((ours / PROBE).read_text(encoding="utf-8"))["steps"]
    found = differences(ours, theirs, steps)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row["relative"] for row in found] == [0.5, 0.0, 1.0, None]
    assert [row["max_abs"] for row in found] == [1.0, 0.0, 1.0, None]


def test_every_kind_of_dropout_is_turned_off() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    model[1].attention_dropout = 0.3
    turn_dropout_off(model)
    assert torch.equal(model[0](torch.ones(100)), torch.ones(100))
    assert model[1].attention_dropout == 0.0
