"""What one rank of a test does: several trainings or probes in one process group.

Starting processes and importing torch, transformers and DeepSpeed takes longer than a tiny model's whole training.
Run by `support.many_runs`; the only argument is a JSON list of items.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from trainer.disk import write_json
from trainer.engine import init_ranks
from trainer.parallel_probe import PROBE, differences, probe
from trainer.spec import Prepared, read_plan
from trainer.storage_copy import Copier
from trainer.train import train


def do(item: dict[str, Any]) -> None:
    """{"plan"}: train it; with "probe" (a folder): probe it for "steps", and compare it with the folder "against"."""
    spec = read_plan(item["plan"])
    prepared = Prepared.read(spec.paths.prepared)
    ranks = init_ranks(spec)
    if "probe" not in item:
        train(spec, prepared, ranks, item.get("attempt", 1), Copier(spec, ranks))
        return
    out = Path(item["probe"])
    found = probe(spec, prepared, ranks, item["steps"], out)
    if ranks.rank == 0:
        against = item.get("against")
        found["differences"] = differences(out, Path(against), found["steps"]) if against else []
        write_json(out / PROBE, found)


if __name__ == "__main__":
    for work in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print("=====", json.dumps(work), flush=True)
        do(work)
        gc.collect()
        if not gc.get_freeze_count():
            # What was imported stays: looking through it after each training takes as long as a tiny one.
            gc.freeze()
    print("===== done", flush=True)
    sys.stdout.flush()
    os._exit(0)
