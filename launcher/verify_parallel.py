"""`launch verify parallel`: a few steps of a recipe in its own layout and in simpler ones, and whether the numbers agree.

Everything of the recipe stays, so the layouts read the same rows in the same order; only dropout is off, which draws other
random numbers in every layout. Each layout is a run folder of its own, inside one folder for the whole comparison.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.job import JobSpec
from cluster.retry import RetryLimits
from trainer.spec import EXIT_INTERRUPTED, EXIT_OK, TrainSpec

from .errors import LaunchError, PlanError
from .run_dir import new_run_id, read_json, write_json
from .start import Request, make_plan, write_run
from .verify_compare import Comparison, Side, compare, to_json
from .verify_folder import EXIT_DIFFERS, VerifyDir, run_quietly

KEYS = {"sp": "1 or more", "dp": "1 or more", "zero": "0 to 3", "accumulate": "1 or more"}
"""What --against may set, and the values."""
_PLANNED_KEYS = ("parallel.sp", "parallel.zero", "parallel.offload", "train.accumulate", "train.global_batch")
_QUIET = "evaluate.samples_every_steps"


@dataclass(frozen=True)
class Wanted:
    """A layout to run. Rows of a step = micro batch x accumulate x dp are those of the plan."""

    dp: int
    sp: int
    zero: int
    offload: str
    accumulate: int

    @property
    def num_processes(self) -> int:
        return self.dp * self.sp


def verify(request: Request, against: Sequence[str], num_steps: int, as_json: bool) -> int:
    """Run every layout one after the other on the same devices, and print the comparison.

    Returns 0 when they agree, 1 when they do not, else the exit code of what failed. Raises LaunchError, PlanError.
    """
    plans = plan_layouts(request, against)
    folder = VerifyDir(Path(plans[0][0].spec.paths.run_dir).parent)
    for number, (plan, loaded, chosen) in enumerate(plans):
        _write_layout(plan, loaded, chosen, folder, number, num_steps)
    out = sys.stderr if as_json else sys.stdout
    for number, (plan, _, _) in enumerate(plans):
        name = "the plan" if number == 0 else f"reference {number} of {len(plans) - 1}"
        print(f"{name}: {side_of(plan.spec, {}).text}", file=out, flush=True)
        code = run_quietly(folder.layout(number), as_json)
        if code != EXIT_OK:
            _say_failed(folder, number, code)
            return code
    spec = plans[0][0].spec
    ours, *others = (
        side_of(plan.spec, read_json(folder.probe(i) / "probe.json")) for i, (plan, _, _) in enumerate(plans)
    )
    references = [(side, compare(ours, side, spec.model.dtype)) for side in others]
    return _show(spec, ours, references, folder, as_json)


def plan_layouts(request: Request, against: Sequence[str]) -> list[tuple[Any, Any, Request]]:
    """(plan, loaded recipe, request) of the recipe's own layout and of each reference. Starts and writes nothing.

    Raises PlanError or LaunchError for whatever could not be run, so that nothing is run in vain.
    """
    plan = make_plan(request)[0]
    name = new_run_id(f"verify-{plan.spec.recipe_name}")
    folder = VerifyDir(Path(plan.spec.paths.run_dir).parent / name)
    given = [parse_against(text) for text in against] or [None]
    wanted = [reference_layout(plan.spec, g) for g in given]
    own = reference_layout(plan.spec, {})
    for text, layout in zip([*against, ""], wanted, strict=False):
        _check_wanted(plan, own, layout, text)
    requests = [request, *(request_for(request, plan, layout) for layout in wanted)]
    planned = [(*make_plan(r, folder.layout(i))[:2], r) for i, r in enumerate(requests)]
    refused = [problem for other, _, _ in planned for problem in other.refusals]
    if refused:
        raise PlanError(list(dict.fromkeys(refused)))
    return planned


def parse_against(text: str) -> dict[str, int]:
    """`sp=1,zero=2` -> {"sp": 1, "zero": 2}. Raises LaunchError with the allowed keys and values."""
    allowed = (
        "Allowed: " + ", ".join(f"{key}=({values})" for key, values in KEYS.items()) + ", such as --against sp=1,zero=1"
    )
    found: dict[str, int] = {}
    for part in text.replace("，", ",").split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in KEYS or not value.isdecimal() or key in found:
            raise LaunchError(f"--against {text}: {part.strip() or 'an empty setting'!r} cannot be read", allowed)
        found[key] = int(value)
        if found[key] > 3 if key == "zero" else found[key] < 1:
            raise LaunchError(f"--against {text}: {key} {value} is out of range", allowed)
    return found


def reference_layout(spec: TrainSpec, given: Mapping[str, int] | None) -> Wanted:
    """The layout that `--against` means; what it leaves out stays as in the plan. None: one process under ZeRO-1.

    Stage 1, because under stage 0 DeepSpeed adds up 16-bit gradients in 16 bits. Raises LaunchError when the rows of a
    step cannot be divided.
    """
    optim, parallel = spec.optim, spec.parallel
    parts = optim.accumulate * parallel.dp
    if given is None:
        return Wanted(1, 1, 1, "none", parts)
    dp, accumulate = given.get("dp"), given.get("accumulate")
    if dp is None:
        dp = parallel.dp if accumulate is None else max(1, parts // accumulate)
    if parts % dp or (accumulate is not None and accumulate * dp != parts):
        named = f"dp {dp}" + ("" if accumulate is None else f" x accumulate {accumulate}")
        allowed = ", ".join(f"dp={n},accumulate={parts // n}" for n in range(1, parts + 1) if parts % n == 0)
        raise LaunchError(
            f"--against: the {parts * optim.micro_batch} rows of a step cannot be micro {optim.micro_batch} x {named}",
            f"Allowed: {allowed}.",
        )
    zero = given.get("zero", parallel.zero_stage)
    fits = {"none": True, "optimizer": zero >= 1, "parameters": zero == 3}[parallel.offload]
    return Wanted(dp, given.get("sp", parallel.sp), zero, parallel.offload if fits else "none", parts // dp)


def _check_wanted(plan: Any, own: Wanted, wanted: Wanted, text: str) -> None:
    flag = f"--against {text}" if text else "the simplest layout"
    if wanted == own:
        raise LaunchError(
            f"{flag} is the plan's own layout (dp {own.dp} x sp {own.sp}, ZeRO {own.zero})",
            "Use more devices, or name another one: --against zero=3",
        )
    if plan.devices and wanted.num_processes > len(plan.devices):
        raise LaunchError(
            f"{flag}: dp {wanted.dp} x sp {wanted.sp} needs {wanted.num_processes} devices, {len(plan.devices)} are chosen",
            "Choose more with --gpus, or name a smaller layout: --against dp=1,sp=1",
        )


def request_for(request: Request, plan: Any, wanted: Wanted) -> Request:
    """The recipe in another layout, on the first of the plan's devices."""
    sets = [s for s in request.sets if s.partition("=")[0].strip() not in (*_PLANNED_KEYS, _QUIET)]
    rows = plan.spec.optim.micro_batch * wanted.accumulate * wanted.dp
    values = (wanted.sp, wanted.zero, wanted.offload, wanted.accumulate, rows)
    ours = [f"{key}={value}" for key, value in zip(_PLANNED_KEYS, values, strict=True)]
    sets += [*ours, f"{_QUIET}=0"]
    uuids = [d["uuid"] for d in plan.devices[: wanted.num_processes]]
    if uuids:
        return dataclasses.replace(request, gpus=",".join(uuids), cpu=None, sets=tuple(sets))
    return dataclasses.replace(request, gpus=None, cpu=wanted.num_processes, sets=tuple(sets))


def side_of(spec: TrainSpec, result: dict[str, Any]) -> Side:
    """A layout with what its probe found."""
    optim, parallel = spec.optim, spec.parallel
    return Side(
        dp=parallel.dp,
        sp=parallel.sp,
        zero=parallel.zero_stage,
        offload=parallel.offload,
        micro_batch=optim.micro_batch,
        accumulate=optim.accumulate,
        result=result,
    )


def _write_layout(plan: Any, loaded: Any, request: Request, folder: VerifyDir, number: int, num_steps: int) -> None:
    """The run folder of a layout. The first one prepares the data for all."""
    run = folder.layout(number)
    paths = dataclasses.replace(plan.spec.paths, prepared=str(folder.layout(0).prepared))
    spec = dataclasses.replace(plan.spec, paths=paths)
    jobs = {job.name: job for job in plan.jobs}
    probe = _probe_job(jobs["train"], spec, folder, number, num_steps)
    run.create()
    write_run(
        run,
        dataclasses.replace(
            plan, spec=spec, jobs=(jobs["prepare"], probe) if number == 0 else (probe,), retry=RetryLimits()
        ),
        loaded,
        1,
        request,
    )


def _probe_job(train: JobSpec, spec: TrainSpec, folder: VerifyDir, number: int, num_steps: int) -> JobSpec:
    run = folder.layout(number)
    log_dir = str(run.logs(1, "probe"))
    steps = ("--plan", str(run.plan), "--steps", str(num_steps), "--out", str(folder.probe(number)))
    against = ("--against", str(folder.probe(0))) if number else ()
    args = ("probe", "--log-dir", log_dir, "--package-root", spec.package_root, *steps, *against)
    return dataclasses.replace(train, name="probe", args=args, log_dir=log_dir)


def _say_failed(folder: VerifyDir, number: int, code: int) -> None:
    from .follow import print_end

    print_end(folder.layout(number), code)
    if number and code != EXIT_INTERRUPTED:
        print("This was a reference. Where it does not fit, name another one: --against dp=2,zero=3", file=sys.stderr)
    print(f"folder: {folder.root}", file=sys.stderr)


def _show(
    spec: TrainSpec, plan: Side, references: Sequence[tuple[Side, Comparison]], folder: VerifyDir, as_json: bool
) -> int:
    """Print and keep the result. Gradients are kept only where they differ."""
    from .verify_page import page

    dtype = spec.model.dtype
    result = to_json(dtype, plan, references, str(folder.root))
    write_json(folder.result, result)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print("\n" + page(dtype, plan, references, sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if not result["equal"]:
        print(f"numbers, gradients and logs: {folder.root}", file=sys.stderr)
        return EXIT_DIFFERS
    for number in range(len(references) + 1):
        for path in folder.probe(number).glob("gradients_step_*.safetensors"):
            path.unlink()
    return EXIT_OK
