"""Combinations that the compatibility table says work on CPU processes: two steps of each, and what must be true of them."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.attention_kinds import kinds_of_config
from launcher.compatibility import ON_CPU, working
from launcher.compatibility_table import LATENT, MANY, SLIDING
from support.commands import ROOT, losses
from support.many_runs import carry_out

Cell = dict[str, str]

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-3}
"""Relative, of a step's loss, from that of one process which computes in the same number format."""
ROUNDING = 1e-2
"""Relative, of 16 bits from 32."""
AT_A_TIME = 240
"""Cells of one process: what DeepSpeed leaves behind of each grows."""
RECIPE = """
model: {{source: "random:{model}", dtype: {dtype}}}
method: {{name: {method}{adapter}}}
data: {{files: rows.jsonl, max_length: 64, packing: {packing}}}
train: {{max_steps: 2, global_batch: 2, learning_rate: 5e-3}}
parallel: {{zero: {zero}, sp: {sp}, offload: {offload}}}
checkpoint: {{every_steps: 0}}
evaluate: {{prompts: [q], max_new_tokens: 2, samples_every_steps: {samples}}}
"""
MODELS = {
    SLIDING: {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8},
    LATENT: {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 2,
    },
}
"""Kind of attention -> what makes of recipes/tiny/config.json a model that has it."""


def all_cells() -> list[Cell]:
    """Every combination that works on CPU, without torch.compile."""
    return list(working(ON_CPU))


def pairwise(cells: Sequence[Cell]) -> list[Cell]:
    """So many of `cells` that every two values which meet in one of them meet in one of these."""
    numbers: dict[tuple[str, str, str, str], int] = {}
    masks = []
    for cell in cells:
        pairs = [(a, cell[a], b, cell[b]) for a, b in itertools.combinations(cell, 2)]
        masks.append(sum(1 << numbers.setdefault(pair, len(numbers)) for pair in pairs))
    missing, chosen = (1 << len(numbers)) - 1, []
    while missing:
        best = max(range(len(cells)), key=lambda i: (masks[i] & missing).bit_count())
        chosen.append(cells[best])
        missing &= ~masks[best]
    return chosen


def name_of(cell: Cell) -> str:
    parts = (
        "method",
        "quantisation",
        "zero",
        "offload",
        "dtype",
        "sp",
        "packing",
        "attention",
        "processes",
        "generation",
    )
    short = {"optimizer": "opt", "parameters": "par", "sliding window": "window", MANY: "2", "none": "no"}
    return "-".join(short.get(cell[part], cell[part]) for part in parts)


def plain(cell: Cell) -> Cell:
    """The same model and rows in the same number format, in one process that shards and moves nothing that can be left."""
    return {**cell, "zero": "1", "offload": "none", "sp": "1", "processes": "1", "generation": "off"}


def exact(cell: Cell) -> Cell:
    """The same model and rows in fp32, everything whole in one process."""
    return {**plain(cell), "zero": "0", "dtype": "fp32"}


def scaled_alike(cell: Cell) -> Cell:
    """`plain`, in which fp16 has to skip the same steps.

    DeepSpeed 0.19.8 adds up the micro batches of one process in fp16 before it looks at them under ZeRO 1 (reduced as one) and
    under ZeRO 2 with offload (accumulated_grads_in_cpu has the dtype of the weights): their sum overflows at half the loss
    scale. ZeRO 2 without offload and ZeRO 3 look at each. With communication_data_type fp32 stage 1 skips what they skip. Two
    processes have one micro batch each here.
    """
    each = cell["zero"] == "3" or (cell["zero"] == "2" and cell["offload"] == "none")
    alone = cell["dtype"] == "fp16" and cell["processes"] == "1"
    return {**plain(cell), "zero": "2"} if each and alone else plain(cell)


@dataclass(frozen=True)
class Runs:
    """Cells that were carried out."""

    folder: Path
    losses: dict[str, dict[int, float]]
    """Name of a cell -> step -> loss."""
    skipped: dict[str, list[int]]
    """Name of a cell -> steps that changed no weight: fp16 finds its loss scale so."""
    samples: dict[str, list[int]]
    """Name of a cell -> the steps at which it answered."""


def run_cells(folder: Path, wanted: Iterable[Cell]) -> Runs:
    """Two steps of each, and of those that they are compared with; a process takes many, one after the other."""
    cells = {name_of(c): c for cell in wanted for c in (cell, plain(cell), exact(cell), scaled_alike(cell))}
    lines = [{"role": "assistant", "content": "a b " * (1 + 5 * (i % 3))} for i in range(12)]
    rows = [{"messages": [{"role": "user", "content": "q" * (i % 4 + 1)}, line]} for i, line in enumerate(lines)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    models = {kind: _model(folder, kind) for kind in {cell["attention"] for cell in cells.values()}}
    prepared: dict[tuple[str, str], Path] = {}
    plans: dict[str, list[Path]] = {"1": [], MANY: []}
    for name, cell in cells.items():
        plans[cell["processes"]].append(_planned(folder, name, cell, models[cell["attention"]], prepared))
    found = Runs(folder, {}, {}, {})
    alone = [plans["1"][i::2] for i in range(2)]
    with ThreadPoolExecutor(2) as both:
        list(both.map(lambda i: _carry_out(folder / f"alone_{i}", 1, alone[i], found), range(2)))
    _carry_out(folder / "together", 2, plans[MANY], found)
    return found


def check(runs: Runs, cell: Cell) -> None:
    """It took both steps, with the losses of one plain process, and answered where it should."""
    own, alone, whole = (runs.losses[name_of(c)] for c in (cell, plain(cell), exact(cell)))
    assert sorted(own) == [1, 2]
    for step, loss in own.items():
        assert math.isfinite(loss)
        assert loss == pytest.approx(alone[step], rel=TOLERANCE[cell["dtype"]]), f"{name_of(cell)}, step {step}"
        if not any(before < step for before in runs.skipped[name_of(cell)]):
            assert loss == pytest.approx(whole[step], rel=ROUNDING), f"{name_of(cell)}, step {step}, against fp32"
    assert runs.skipped[name_of(cell)] == runs.skipped[name_of(scaled_alike(cell))]
    assert cell["dtype"] == "fp16" or not runs.skipped[name_of(cell)]
    assert runs.samples[name_of(cell)] == ([0, 1, 2] if cell["generation"] == "on" else [])


def _model(folder: Path, kind: str) -> Path:
    tiny = ROOT / "recipes" / "tiny"
    if kind not in MODELS:
        return tiny
    model = folder / kind.replace(" ", "_")
    shutil.copytree(tiny, model)
    config = {**json.loads((model / "config.json").read_text(encoding="utf-8")), **MODELS[kind]}
    assert kind in kinds_of_config(config)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def _planned(folder: Path, name: str, cell: Cell, model: Path, prepared: dict[tuple[str, str], Path]) -> Path:
    """Plan a cell by the command line's own way; the first of a model and packing prepares the data for all of them."""
    from launcher.run_dir import write_json
    from launcher.start import Request, make_plan
    from trainer import prepare

    adapter = "" if cell["method"] == "full" else ", rank: 4"
    if cell["method"] == "qlora":
        adapter += f", double_quant: {str(cell['quantisation'] == 'nf4-double').lower()}"
    values = {**cell, "model": model, "adapter": adapter, "packing": "true" if cell["packing"] == "on" else "false"}
    values |= {"sp": 1 if cell["sp"] == "1" else 2, "samples": int(cell["generation"] == "on")}
    recipe = folder / f"{name}.yaml"
    recipe.write_text(RECIPE.format(**values), encoding="utf-8")
    processes = 1 if cell["processes"] == "1" else 2
    plan, _, run = make_plan(Request(str(recipe), None, processes, "torchrun", 1, folder / name, (), False))
    assert not plan.refusals, plan.refusals
    run.create()
    # Two are at work at a time, each on a core of its own.
    data = plan.to_dict()
    data["spec"]["parallel"]["threads_per_process"] = 1
    write_json(run.plan, data)
    key = (cell["attention"], cell["packing"])
    if key in prepared:
        shutil.copyfile(prepared[key] / "prepared.json", run.root / "prepared.json")
    else:
        prepare.run(argparse.Namespace(plan=str(run.plan)))
        prepared[key] = run.root
    return run.root


def _carry_out(folder: Path, num_processes: int, runs: Sequence[Path], found: Runs) -> None:
    """Train them; what is looked at is kept in memory, since so many runs fill a disk."""
    folder.mkdir()
    for first in range(0, len(runs), AT_A_TIME):
        part = runs[first : first + AT_A_TIME]
        carry_out(folder, num_processes, [{"plan": str(run / "plan.json")} for run in part], timeout_s=1800)
        for run in part:
            rows = _lines(run / "metrics.jsonl")
            found.losses[run.name] = losses(run)
            found.skipped[run.name] = [row["step"] for row in rows if row["skipped"]]
            found.samples[run.name] = [row["step"] for row in _lines(run / "samples.jsonl")]
            shutil.rmtree(run)
            run.with_name(f"{run.name}.yaml").unlink()


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
