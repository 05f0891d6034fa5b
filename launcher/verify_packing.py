"""`launch verify packing`: the losses of documents in packed rows, against those of the same documents alone.

One process, on the recipe's own model and data: forward passes only. Nothing is saved but numbers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.job import JobSpec
from cluster.retry import RetryLimits
from trainer.spec import EXIT_OK, TrainSpec

from .errors import LaunchError, PlanError
from .run_dir import new_run_id, read_json, write_json
from .start import Request, make_plan, write_run
from .verify_folder import EXIT_DIFFERS, VerifyDir, run_quietly
from .verify_parallel import Wanted, request_for

TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
"""Of the mean distance of a row's losses (nats). In 16 bits single losses are rounded by more, up and down."""
_GREEN, _RED, _PLAIN = "\033[32m", "\033[31m", "\033[0m"


def verify_packing(request: Request, num_rows: int, as_json: bool) -> int:
    """Compare, print and keep the result. Returns 0 when the losses agree, 1 when not, else the code of what failed.

    Raises LaunchError and PlanError.
    """
    plan, loaded, own = plan_packing(request)
    folder = VerifyDir(Path(plan.spec.paths.run_dir).parent)
    run = folder.layout(0)
    jobs = {job.name: job for job in plan.jobs}
    probe = _probe_job(jobs["train"], plan.spec, folder, num_rows)
    run.create()
    write_run(run, dataclasses.replace(plan, jobs=(jobs["prepare"], probe), retry=RetryLimits()), loaded, 1, own)
    code = run_quietly(run, as_json)
    if code != EXIT_OK:
        from .follow import print_end

        print_end(run, code)
        return code
    result = judged(read_json(folder.probe(0)))
    write_json(folder.result, result)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else "\n" + page(result, color))
    if not result["equal"]:
        print(f"numbers and logs: {folder.root}", file=sys.stderr)
    return EXIT_OK if result["equal"] else EXIT_DIFFERS


def plan_packing(request: Request) -> tuple[Any, Any, Request]:
    """(plan of one process, loaded recipe, its request). Writes nothing. Raises LaunchError, PlanError."""
    plan, loaded, _ = make_plan(request)
    if not loaded.recipe.data.packing:
        raise LaunchError(
            "data.packing is false: every row holds one document, and there is nothing to compare",
            "Compare what packing would do: --set data.packing=true",
        )
    folder = VerifyDir(Path(plan.spec.paths.run_dir).parent / new_run_id(f"verify-{plan.spec.recipe_name}"))
    own = request_for(request, plan, Wanted(1, 1, 1, "none", 1))
    planned = make_plan(own, folder.layout(0))[0]
    if planned.refusals:
        raise PlanError(list(planned.refusals))
    return planned, loaded, own


def _probe_job(train: JobSpec, spec: TrainSpec, folder: VerifyDir, num_rows: int) -> JobSpec:
    run = folder.layout(0)
    log_dir = str(run.logs(1, "packing"))
    what = ("--plan", str(run.plan), "--rows", str(num_rows), "--out", str(folder.probe(0)))
    args = ("packing", "--log-dir", log_dir, "--package-root", spec.package_root, *what)
    return dataclasses.replace(train, name="packing", args=args, log_dir=log_dir)


def judged(probe: Mapping[str, Any]) -> dict[str, Any]:
    """The probe's numbers with the limit, the worst row, and whether all rows are within it. Pure."""
    allowed = TOLERANCES[probe["dtype"]]
    worst = max(probe["rows"], key=lambda row: (row["mean_apart"], row["max_apart"]))
    return {**probe, "allowed": allowed, "worst_row": worst["row"], "equal": worst["mean_apart"] <= allowed}


def page(result: Mapping[str, Any], color: bool) -> str:
    """For people. Pure."""
    rows = result["rows"]
    worst = next(row for row in rows if row["row"] == result["worst_row"])
    at = worst["worst"]
    counts = (sum(row[key] for row in rows) for key in ("documents", "tokens"))
    verdict = "ok" if result["equal"] else "DIFFERS"
    if color:
        verdict = f"{_GREEN if result['equal'] else _RED}{verdict}{_PLAIN}"
    return "\n".join(
        [
            "compared      {:,} of {:,} packed rows: {:,} documents, {:,} losses ({})".format(
                len(rows), result["rows_in_all"], *counts, result["dtype"]
            ),
            f"worst row     {worst['row']}, {worst['documents']} documents: losses {worst['mean_apart']:.1e} apart on average "
            f"(allowed {result['allowed']:.0e}), {worst['max_apart']:.1e} at most",
            f"              mean loss packed {worst['loss_packed']:.6f}, alone {worst['loss_alone']:.6f}",
            f"  its token   number {at['token'] + 1} that is learnt of document {at['document'] + 1}, {at['source']}: "
            f"packed {at['packed']:.6f}, alone {at['alone']:.6f}",
            f"packed == unpacked: {verdict}",
        ]
    )
