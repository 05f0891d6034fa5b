"""Prepared rows as people can read them: `launch data preview`. Writes JSON; the launcher shows it."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from .data import TokenData
from .disk import write_json
from .spec import Prepared, read_plan
from .template import LEARNT_AS_END, load_template

NUM_BINS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker preview`."""
    parser.add_argument("--plan", required=True, help="plan.json of a run whose data is prepared")
    parser.add_argument("--documents", type=int, required=True, help="how many documents to show")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them, counted from 0")
    parser.add_argument("--out", required=True, help="JSON file to write")


def run(args: argparse.Namespace) -> None:
    """Write `--out`."""
    spec = read_plan(args.plan)
    prepared = Prepared.read(spec.paths.prepared)
    data = TokenData.open(prepared.data_dir)
    tokenizer = load_template(prepared.model_dir, spec.data.template, spec.model.trust_remote_code).tokenizer
    lengths = data.document_lengths
    shown = range(args.first, min(args.first + args.documents, len(lengths)))
    found = {
        "num_documents": len(lengths),
        "documents": [shown_document(data, tokenizer, number) for number in shown],
        "histogram": histogram(lengths),
        "max_length": spec.data.max_length,
        "packing": spec.data.packing,
        "num_rows": data.num_rows,
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(data.supervised_per_row.sum()),
    }
    write_json(Path(args.out), found)


def shown_document(data: TokenData, tokenizer: Any, number: int) -> dict[str, Any]:
    """One document as runs of tokens that are learnt or not: {"source", "tokens", "learnt", "spans": [[text, kind]]}.

    The text of a run is what its tokens decode to; kind is that of `Document.supervised`. The first token is never learnt,
    since nothing comes before it.
    """
    ids, kinds = data.document(number)
    kinds = kinds.copy()
    kinds[:1] = 0
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    spans = [
        [tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False), int(kinds[start])]
        for start, end in itertools.pairwise(borders)
        if end > start
    ]
    learnt = int((kinds > 0).sum())
    as_end = int((kinds == LEARNT_AS_END).sum())
    return {
        "source": data.source(number),
        "tokens": len(ids),
        "learnt": learnt,
        "learnt_as_end": as_end,
        "spans": spans,
    }


def histogram(lengths: np.ndarray) -> dict[str, Any]:
    """Lengths in tokens: counts between edges (one more than counts, ascending), and some percentiles."""
    counts, edges = np.histogram(lengths, bins=min(NUM_BINS, max(1, int(np.ptp(lengths)))))
    percentiles = {str(p): int(np.percentile(lengths, p)) for p in (50, 90, 99)}
    return {
        "counts": counts.tolist(),
        "edges": [int(e) for e in np.ceil(edges)],
        "percentiles": percentiles,
        "longest": int(lengths.max()),
        "mean": round(float(lengths.mean()), 1),
    }
