"""Are the losses of documents in a packed row those of the same documents alone? `launch verify packing`. One process.

Forward passes of the model that training loads, on the run's own rows: once as they are packed, and once each document as a
row of its own under transformers' plain attention, which knows nothing of packing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import attention
from .data import Batch, TokenData
from .disk import read_json, write_json
from .loss import IGNORE
from .model import PackedLanguageModel, load_model
from .parallel_probe import turn_dropout_off
from .spec import Prepared, TrainError, TrainSpec, read_plan

PLAIN_ATTENTION = "sdpa"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker packing`."""
    parser.add_argument("--plan", required=True, help="plan.json of the run")
    parser.add_argument("--rows", type=int, required=True, help="packed rows to compare; 0: all")
    parser.add_argument("--out", required=True, help="JSON file to write")


def run(args: argparse.Namespace) -> None:
    """Compare, and write `--out`. Raises TrainError where no row has two documents."""
    spec = read_plan(args.plan)
    print(f"plan {spec.digest()} run {spec.run_id}", flush=True)
    prepared = Prepared.read(spec.paths.prepared)
    data = TokenData.open(prepared.data_dir)
    rows = choose_rows(data, args.rows)
    device = torch.device("cuda" if spec.parallel.device == "cuda" else "cpu")
    torch.set_num_threads(spec.parallel.threads_per_process)
    model = load_model(spec, prepared.model_dir, device)
    turn_dropout_off(model)
    write_json(
        Path(args.out),
        {**compare_rows(model, data, rows, device), "rows_in_all": data.num_rows, **_about(spec, prepared)},
    )


def _about(spec: TrainSpec, prepared: Prepared) -> dict[str, Any]:
    config = read_json(Path(prepared.model_dir) / "config.json")
    layers = config.get("num_hidden_layers") or config.get("text_config", {}).get("num_hidden_layers")
    return {"dtype": spec.model.dtype, "num_layers": layers}


def choose_rows(data: TokenData, num_wanted: int) -> list[int]:
    """Row numbers, ascending: half of them those with the most documents, the others spread evenly. Raises TrainError."""
    counts = np.array([len(data.documents(row)) for row in range(data.num_rows)])
    several = np.flatnonzero(counts > 1)
    if not len(several):
        raise TrainError(
            f"no packed row has two documents: each of the {data.num_rows} rows holds one",
            "There is nothing to compare. Raise data.max_length, or give more rows (data.packing must be true).",
        )
    if not num_wanted or num_wanted >= len(several):
        return several.tolist()
    fullest = several[np.argsort(-counts[several], kind="stable")][: (num_wanted + 1) // 2]
    others = np.setdiff1d(several, fullest)
    spread = others[np.linspace(0, len(others) - 1, num_wanted - len(fullest)).astype(int)] if len(others) else others
    return sorted({*fullest.tolist(), *spread.tolist()})


def compare_rows(model: PackedLanguageModel, data: TokenData, rows: list[int], device: torch.device) -> dict[str, Any]:
    """{"rows": what each gave, in order, "seconds": ...}. The model is left in evaluation mode."""
    began = time.monotonic()
    model.eval()
    found = []
    for row in rows:
        found.append(_compare_row(model, data, row, device))
        worst = found[-1]
        print(
            f"row {row}: {worst['documents']} documents, {worst['tokens']} losses, apart {worst['mean_apart']:.1e} on "
            f"average, {worst['max_apart']:.1e} at most",
            flush=True,
        )
    return {"rows": found, "seconds": round(time.monotonic() - began, 2)}


def _compare_row(model: PackedLanguageModel, data: TokenData, row: int, device: torch.device) -> dict[str, Any]:
    packed = data.batch([row], data.row_length([row]))
    together = _losses(model, packed, device)
    sources = data.sources(row)
    ends = np.cumsum(packed.document_lengths)[: len(sources)].tolist()  # behind them there is padding
    model.base.set_attn_implementation(PLAIN_ATTENTION)
    parts = [_losses(model, _part(packed, *span), device) for span in zip([0, *ends], ends, strict=False)]
    model.base.set_attn_implementation(attention.NAME)
    alone = torch.cat(parts)
    apart = (together - alone).abs()
    at = int(apart.argmax())
    starts = np.cumsum([0, *map(len, parts)])
    document = int(np.searchsorted(starts, at, side="right")) - 1
    return {
        "row": row,
        "documents": len(sources),
        "tokens": len(apart),
        "mean_apart": float(apart.mean()),
        "max_apart": float(apart[at]),
        "loss_packed": float(together.mean()),
        "loss_alone": float(alone.mean()),
        "worst": {
            "source": sources[document],
            "document": document,
            "token": at - int(starts[document]),
            "packed": float(together[at]),
            "alone": float(alone[at]),
        },
    }


def _part(batch: Batch, start: int, end: int) -> Batch:
    """One document of a row, as a row of its own."""
    cut = [t[:, start:end] for t in (batch.input_ids_1T, batch.labels_1T, batch.position_ids_1T)]
    return Batch(*cut, document_lengths=(end - start,))


def _losses(model: PackedLanguageModel, batch: Batch, device: torch.device) -> torch.Tensor:
    """losses_N on the CPU, fp64."""
    if not bool((batch.labels_1T != IGNORE).any()):
        return torch.zeros(0, dtype=torch.float64)
    ids_1T, labels_1T, positions_1T = (
        t.to(device) for t in (batch.input_ids_1T, batch.labels_1T, batch.position_ids_1T)
    )
    return model.losses(ids_1T, labels_1T, positions_1T, batch.document_lengths).double().cpu()
