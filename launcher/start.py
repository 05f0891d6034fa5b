"""From flags to a running run: read the recipe and the machine, plan, write the run folder, start the stages."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.spec import EXIT_OK, EXIT_USER

from .errors import LaunchError, PlanError
from .run_dir import RunDir, new_run_id, read_json, write_atomic, write_json

RECORDED_PACKAGES = ("tunelaunch", "torch", "transformers", "peft", "bitsandbytes", "datasets", "deepspeed", "ray")
FOLLOW_WAIT_S = 10.0
MAX_PROFILE_STEPS = 10


@dataclass(frozen=True)
class Request:
    """The flags of `launch RECIPE`, as typed."""

    recipe: str
    gpus: str | None
    cpu: int | None
    backend: str | None
    """None: torchrun, or the backend of the run that is resumed."""
    nodes: int
    run_dir: Path | None
    sets: tuple[str, ...]
    debug: bool
    profile_steps: tuple[int, ...] = ()
    """1-based optimizer steps to record; see `parse_profile`."""
    forced_keys: tuple[str, ...] = ()
    """Recipe keys that a resumed run may change although they change what it learns."""
    hosts: tuple[str, ...] = ()
    """As typed: `a:0,1`, or a hosts.yaml."""


def cache_dir() -> Path:
    """Converted models and token caches: $TUNELAUNCH_CACHE, else ~/.cache/tunelaunch."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunelaunch"
    return Path(os.environ.get("TUNELAUNCH_CACHE") or default).absolute()


def runs_dir() -> Path:
    """Where runs are looked for by name: $TUNELAUNCH_RUNS, else ./runs."""
    return Path(os.environ.get("TUNELAUNCH_RUNS") or "runs")


@dataclass(frozen=True)
class Placed:
    """A recipe, and where its run will take place."""

    loaded: Any
    source: Any
    run: RunDir
    where: Any


def make_plan(request: Request, run: RunDir | None = None) -> tuple[Any, Any, RunDir]:
    """(plan, loaded recipe, run folder); nothing is written. Raises LaunchError, PlanError or ClusterError."""
    placed = find_place(request, run)
    return plan_placed(request, placed), placed.loaded, placed.run


def find_place(request: Request, run: RunDir | None = None) -> Placed:
    """The first half of `make_plan`: read the recipe, and ask the hosts. Raises as it does."""
    from .model_source import resolve_source
    from .recipe import load_recipe
    from .recipe_library import find
    from .where import Flags, choose

    loaded = load_recipe(find(request.recipe), request.sets)
    recipe = loaded.recipe
    source = resolve_source(recipe.model.source, loaded.files[0].parent)
    if run is None:
        name = recipe.run.name or loaded.files[0].stem
        run = RunDir((request.run_dir or Path(recipe.run.dir) / new_run_id(name)).absolute())
    flags = Flags(request.gpus, request.cpu, request.backend, request.nodes, request.debug, request.hosts)
    return Placed(loaded, source, run, choose(flags, recipe, source, run.root, cache_dir()))


def plan_placed(request: Request, placed: Placed) -> Any:
    """The other half: the plan. Raises as it does."""
    from cluster.environment import environment_warnings

    from .compiler import find_compiler
    from .model_facts import read_facts, stored_quantisation
    from .plan import Options, plan_run

    where, selection = placed.where, placed.where.selection
    facts = read_facts(placed.source, placed.loaded.recipe.model.revision)
    options = Options(
        backend=where.backend,
        nodes=where.nodes,
        ray=where.ray,
        placement=where.reasons,
        debug=request.debug,
        cache_dir=cache_dir(),
        host_memory_gb=where.host_memory_gb,
        command=_command_line(),
        warnings=tuple(environment_warnings(os.environ)),
        profile_steps=request.profile_steps,
        compiler=find_compiler(selection.kind, os.environ),
        free_memory=where.free_memory,
        stored_as=stored_quantisation(placed.source, placed.loaded.recipe.model.revision),
    )
    plan = plan_run(placed.loaded, selection, placed.source, facts, placed.run, options)
    _check_profile(request.profile_steps, plan.spec.optim.max_steps)
    return plan


def parse_profile(text: str) -> tuple[int, ...]:
    """`10`, `3-5` or `3,4,5` -> step numbers. Raises LaunchError for anything but a few consecutive steps from 1 on."""
    hint = f"Allowed: one step (10), or at most {MAX_PROFILE_STEPS} consecutive ones (3-5, or 3,4,5), counted from 1."
    match = re.fullmatch(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*", text)
    if match:
        first, last = int(match[1]), int(match[2])
        if last - first >= MAX_PROFILE_STEPS:
            raise LaunchError(f"--profile {text}: {last - first + 1} steps are too many for one trace", hint)
        steps = list(range(first, last + 1))
    elif re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})*\s*", text):
        steps = sorted({int(part) for part in text.split(",")})
    else:
        raise LaunchError(f"--profile {text}: is not a list of steps", hint)
    if not steps or steps[0] < 1:
        raise LaunchError(f"--profile {text}: there is no such step", hint)
    if len(steps) > MAX_PROFILE_STEPS:
        raise LaunchError(f"--profile {text}: {len(steps)} steps are too many for one trace", hint)
    if steps != list(range(steps[0], steps[-1] + 1)):
        raise LaunchError(f"--profile {text}: the steps are not consecutive, and one trace holds all of them", hint)
    return tuple(steps)


def _check_profile(steps: tuple[int, ...], max_steps: int) -> None:
    """Where the recipe gives epochs, the number of steps is only known once the data is prepared; then the run says it."""
    if max_steps and steps and steps[-1] > max_steps:
        raise LaunchError(f"--profile: step {steps[-1]} does not exist", f"This run has {max_steps} steps.")


def _command_line() -> str:
    return shlex.join(["launch", *sys.argv[1:]])


def show_plan(request: Request, as_json: bool) -> int:
    """Print the plan. Returns 0, or 2 when it could not be started."""
    from .render import plan_page

    plan, _, _ = make_plan(request)
    print(json.dumps(plan.to_dict(), indent=2, ensure_ascii=False) if as_json else plan_page(plan))
    return EXIT_USER if plan.refusals else EXIT_OK


def start(request: Request, detached: bool) -> int:
    """A new run from its first stage. Returns the run's exit code."""
    from .render import plan_page

    plan, loaded, run = make_plan(request)
    if plan.refusals:
        raise PlanError(list(plan.refusals))
    print(plan_page(plan), end="\n\n", flush=True)
    run.create()
    write_run(run, plan, loaded, 1, request)
    return _go(run, 1, frozenset(), detached)


def resume(name: str, request: Request, detached: bool) -> int:
    """Continue a run: the stages that are done stay done, training goes on from its newest verified checkpoint."""
    from trainer.checkpoint_format import MANIFEST, list_checkpoints

    from .fetch import fetch, is_url
    from .resume_changes import affects_report, affects_training
    from .status import DONE, RUNNING, find_run, read_status
    from .supervise import hold

    if request.run_dir is not None or request.debug:
        raise LaunchError(
            "--run-dir and --debug do not go with --resume", "Leave them out: the run has its own folder."
        )
    run = fetch(name, runs_dir()) if is_url(name) else find_run(name, runs_dir())
    status = read_status(run)
    if status.state == RUNNING:
        raise LaunchError(f"{run.run_id} is running (pid {status.pid})", "Watch it: launch runs watch " + run.run_id)
    done = frozenset(stage for stage, state in status.stages.items() if state == DONE)
    if "train" not in done:
        done = frozenset()  # `connect` and `prepare` again: they take no time, unless a cache is gone
    steps = [step for step, path in list_checkpoints(run.checkpoints) if (path / MANIFEST).is_file()]
    if "train" not in done and not steps:
        raise LaunchError(
            f"{run.run_id} has no checkpoint: it ended ({status.state}) before the first one was saved",
            f"Start it anew: launch {run.recipe}\nSave more often: checkpoint.every_steps",
        )
    old = read_json(run.plan)
    if old["spec"]["debug"]:
        raise LaunchError(f"{run.run_id} is a debug run of a few steps", f"Start it anew: launch {run.recipe} --debug")
    request = _same_devices(request, old)
    given, found = _changed_recipe(request, run)
    if affects_training(found):
        last_step = given.recipe.train.max_steps
        if last_step is not None and steps and steps[0] >= last_step:
            raise LaunchError(
                f"training has ended at step {steps[0]} of {last_step}: nothing would be learnt with the new values",
                "Raise train.max_steps too (--force-key train.max_steps), or start a new run.",
            )
        done = frozenset()
    elif affects_report(found):
        done -= {"evaluate"}
    plan, loaded, _ = make_plan(request if found else replace(request, recipe=str(run.recipe), sets=()), run)
    if plan.refusals:
        raise PlanError(list(plan.refusals))
    if "train" not in done:
        _require_same_batch(plan, given.recipe.train, old)
    spec = replace(plan.spec, recipe_name=old["spec"]["recipe_name"])
    plan = replace(plan, spec=spec, command=old["command"])
    attempt = status.attempt + 1
    with hold(run):
        if found:
            _change_recipe(run, status, done, given, found)
        write_run(run, plan, loaded, attempt, request)
    kept = ", ".join(sorted(done)) or "none"
    print(f"resuming {run.run_id}, attempt {attempt}; stages already done: {kept}", flush=True)
    return _go(run, attempt, done, detached)


def _change_recipe(run: RunDir, status: Any, done: frozenset[str], given: Any, found: list[Any]) -> None:
    """Put `given` in the place of the run's recipe, which is kept beside it; stages that are not in `done` have to run again."""
    from .recipe import dump_recipe
    from .status import STOPPED

    print("changed since it was started:", *(f"  {change}" for change in found), sep="\n", flush=True)
    # First: were this command to end before the stages run again, the next resume must not find them done.
    status.stages = {stage: state if stage in done else "waiting" for stage, state in status.stages.items()}
    status.state = STOPPED
    status.write(run)
    write_atomic(run.earlier_recipe(status.attempt + 1), run.recipe.read_text(encoding="utf-8"))
    write_atomic(run.recipe, dump_recipe(given))


def _same_devices(request: Request, old: dict[str, Any]) -> Request:
    """The request with the old attempt's backend and devices, or as many, where it names none."""
    flags, parallel = old["flags"], old["spec"]["parallel"]
    if request.hosts or request.gpus or request.cpu:
        # Other hosts, or none: the backend follows from the flags, unless it is one that can take both.
        kept = None if flags["backend"] == "ssh" or request.hosts else flags["backend"]
        return replace(request, backend=request.backend or kept)
    request = replace(request, backend=request.backend or flags["backend"])
    if flags.get("hosts"):  # runs of earlier versions know none
        return replace(request, hosts=tuple(flags["hosts"]), gpus=flags["gpus"], cpu=flags["cpu"])
    nodes = flags.get("nodes", 1)
    if (flags["gpus"] or flags["cpu"]) and (nodes == 1 or request.backend == "ray"):
        return replace(request, gpus=flags["gpus"], cpu=flags["cpu"], nodes=max(request.nodes, nodes))
    if parallel["device"] == "cpu":
        return replace(request, cpu=parallel["world_size"])
    return replace(request, gpus=f"free:{parallel['world_size']}")


def _changed_recipe(request: Request, run: RunDir) -> tuple[Any, list[Any]]:
    """The recipe to go on with, and what differs from the run's. Raises LaunchError for what a run may not change."""
    from .recipe import load_recipe
    from .recipe_library import find
    from .resume_changes import changes, require_allowed

    own = load_recipe(run.recipe)
    if Path(request.recipe) == run.recipe and not request.sets:
        given = own
    else:
        given = load_recipe(find(request.recipe), request.sets)
    found = changes(own.recipe, given.recipe)
    require_allowed(found, request.forced_keys, request.recipe)
    return given, found


def _require_same_batch(plan: Any, train: Any, old: dict[str, Any]) -> None:
    """Raises LaunchError where another global batch would repeat or skip rows. `train`: the recipe's section."""
    optim, spec = old["spec"]["optim"], plan.spec
    before = optim["micro_batch"] * optim["accumulate"] * old["spec"]["parallel"]["dp"]
    at_once = spec.optim.micro_batch * spec.parallel.dp
    if before == at_once * spec.optim.accumulate:
        return
    if before % at_once:
        hint = f"Use a number of devices that divides {before}, with train.micro_batch=1."
    elif train.accumulate is None:
        hint = f"Keep it: --set train.global_batch={before}"
    else:
        hint = f"Keep it: --set train.accumulate={before // at_once}"
    raise LaunchError(
        f"the global batch would be {at_once * spec.optim.accumulate} rows (micro {spec.optim.micro_batch} x accumulate "
        f"{spec.optim.accumulate} x data-parallel {spec.parallel.dp}), the run's is {before}: rows would be repeated or skipped",
        hint,
    )


def write_run(run: RunDir, plan: Any, loaded: Any, attempt: int, request: Request) -> None:
    """Write recipe.yaml, plan.json and env.json of an attempt. The device flags are kept for a resume."""
    from .recipe import dump_recipe
    from .stages import renumbered

    flags = {"gpus": request.gpus, "cpu": request.cpu, "backend": plan.backend, "debug": plan.spec.debug}
    flags |= {"hosts": list(request.hosts), "nodes": request.nodes}
    plan = replace(plan, jobs=tuple(renumbered(job, run, attempt) for job in plan.jobs))
    if attempt == 1:
        write_atomic(run.recipe, dump_recipe(loaded))
    write_json(run.plan, {**plan.to_dict(), "flags": flags})
    write_json(run.env, environment())


def environment() -> dict[str, Any]:
    """Versions and machine, without secrets: no environment variable is copied."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _go(run: RunDir, attempt: int, done: frozenset[str], detached: bool) -> int:
    from .supervise import detach, supervise

    if detached:
        pid = detach(run, attempt, done)
        _wait_for_supervisor(run, pid)
        print(f"{run.run_id} runs in the background (pid {pid})")
        print(f"  watch: launch runs watch {run.root}\n  stop:  launch runs stop {run.root}")
        return EXIT_OK
    from .progress import terminal

    code = supervise(run, attempt, done, terminal(run))
    _say_end(run, code)
    return code


def _wait_for_supervisor(run: RunDir, pid: int) -> None:
    """Return once the supervisor has reported. Raises LaunchError with what it printed when it does not."""
    deadline = time.monotonic() + FOLLOW_WAIT_S
    while not (run.status.is_file() and read_json(run.status)["pid"] == pid):
        if time.monotonic() > deadline:
            said = run.supervisor_log.read_text(encoding="utf-8", errors="replace").strip()
            raise LaunchError(f"the supervisor (pid {pid}) did not start", said or f"See {run.supervisor_log}", 70)
        time.sleep(0.05)


def _say_end(run: RunDir, code: int) -> None:
    """Print the result. When the terminal is gone, what is left of the output goes nowhere and the exit code stays."""
    from .follow import print_end

    try:
        print_end(run, code)
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def supervise_detached(root: Path, attempt: int, done: str) -> int:
    """The body of `launch _supervise`: standard output is supervisor.log."""
    from .progress import terminal
    from .supervise import supervise

    run = RunDir(root)
    code = supervise(run, attempt, frozenset(done.split(",")) - {""}, terminal(run))
    _say_end(run, code)
    return code
