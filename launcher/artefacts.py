"""`launch consolidate | merge | evaluate | chat`: one stage alone, on a run or on plain folders."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.job import JobSpec, JobState
from cluster.registry import load
from trainer.spec import EXIT_BUG, EXIT_OK

from .errors import LaunchError
from .plan import PACKAGE_ROOT
from .run_dir import RunDir, read_json
from .stages import ENTRYPOINT
from .start import runs_dir
from .supervise import failure_text

POLL_S = 0.05


def _find(target: str) -> RunDir | Path:
    """A run, or an existing folder that is none. Raises LaunchError when it is neither."""
    from .status import find_run

    path = Path(target)
    if path.is_dir() and not (path / "status.json").is_file():
        return path.resolve()
    if path.is_file():
        raise LaunchError(
            f"{target} is a file", "Give a folder: a run, its checkpoints, DeepSpeed's shards, or a model."
        )
    return find_run(target, runs_dir())


def _flags(options: dict[str, Any]) -> list[str]:
    """{"dtype": "bf16", "step": None} -> ["--dtype", "bf16"]."""
    return [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]


def consolidate(target: str, out: Path | None, options: dict[str, Any]) -> int:
    """Returns the job's exit code. Raises LaunchError for a run whose result exists and no --out."""
    found = _find(target)
    if isinstance(found, RunDir):
        spec = read_json(found.plan)["spec"]
        default = found.merged if spec["method"]["name"] == "full" else found.adapter
        options = {**options, "base": options["base"] or _model_dir(found), "template": spec["data"]["template"]}
        source = found.checkpoints
    else:
        source, default = found, found.parent / f"{found.name}-consolidated"
    return _run_stage("consolidate", ["--source", str(source), "--out", _out(out, default), *_flags(options)])


def merge(target: str, out: Path | None, options: dict[str, Any]) -> int:
    """`target` is a run or an adapter folder. Returns the job's exit code."""
    found = _find(target)
    if isinstance(found, RunDir):
        adapter, default = found.adapter, found.merged
        spec = read_json(found.plan)["spec"]
        options = {**options, "base": options["base"] or _model_dir(found), "template": spec["data"]["template"]}
        trust = ["--trust-remote-code"] if spec["model"]["trust_remote_code"] else []
    else:
        adapter, default, trust = found, found.parent / f"{found.name}-merged", []
    return _run_stage("merge", ["--adapter", str(adapter), "--out", _out(out, default), *_flags(options), *trust])


def evaluate(target: str, strict: bool, prompts: Path | None, base: Path | None, out: Path | None) -> int:
    """`target` is a run, or a model folder with --prompts. Returns the job's exit code."""
    found = _find(target)
    extra = ["--strict"] if strict else []
    if isinstance(found, RunDir):
        if prompts or base or out:
            raise LaunchError(
                "--prompts, --base and --out are for a model given by path; a run has its own",
                f"Give the model folder: launch evaluate {found.merged} --prompts ...",
            )
        return _run_stage("evaluate", ["--plan", str(found.plan), *extra], found)
    if prompts is None:
        raise LaunchError(f"{found} is no run, so its prompts are not known", "Give them: --prompts prompts.json")
    options = {"prompts": prompts.absolute(), "base": base}
    report = _out(out, found.parent / f"{found.name}-report")
    return _run_stage("evaluate", ["--model", str(found), "--out", report, *_flags(options), *extra])


def chat(
    target: str,
    adapter: Path | None,
    template: Path | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
) -> int:
    """Talk on this terminal until /exit. Returns the exit code of the chat."""
    found = _find(target)
    options: dict[str, Any] = {"adapter": adapter, "template": template, "system": system}
    if isinstance(found, RunDir):
        spec = read_json(found.plan)["spec"]
        data, trust = spec["data"], ["--trust-remote-code"] if spec["model"]["trust_remote_code"] else []
        model, options = _tuned(found, options)
        own_template = data["template"] if data["template"] != "model" else None
        options["template"] = template or own_template
        options["system"] = system if system is not None else data["system"]
    else:
        model, trust = found, []
    options |= {"max-new-tokens": max_new_tokens, "temperature": temperature}
    argv = [sys.executable, "-P", "-m", ENTRYPOINT, "chat", "--package-root", str(PACKAGE_ROOT)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    # Ctrl-C belongs to the chat, which stops its answer; here it would end the launcher and take the chat with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return subprocess.call([*argv, "--model", str(model), *_flags(options), *trust], env=environment)


def _tuned(run: RunDir, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """(model folder, options with the adapter): the merged model, else base + adapter."""
    if run.merged.is_dir():
        return run.merged, options
    if run.adapter.is_dir():
        return Path(_model_dir(run)), {**options, "adapter": options["adapter"] or run.adapter}
    raise LaunchError(f"{run.run_id} has no tuned model yet", f"Make it: launch runs resume {run.root}")


def _device_of(stage: str, run: RunDir | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """(UUIDs, environment) for one process. Only answering questions is worth a GPU."""
    if run is not None:
        job = next(j for j in read_json(run.plan)["jobs"] if j["name"] == stage)
        return tuple(job["devices"]), job["env"]
    from cluster.environment import device_env
    from cluster.inventory import cpu_selection, select
    from cluster.nvml import read_inventory

    inventory = read_inventory()
    on_gpu = stage == "evaluate" and inventory.devices
    selection = select(inventory, "free:1", os.environ) if on_gpu else cpu_selection(1, inventory)
    return selection.uuids, device_env(selection)


def _model_dir(run: RunDir) -> str:
    if not run.prepared.is_file():
        raise LaunchError(f"{run.prepared} is missing: the run has not prepared its model", "Give --base FOLDER.")
    return read_json(run.prepared)["model_dir"]


def _out(out: Path | None, default: Path) -> str:
    """The output folder. Raises LaunchError when it exists: results are never overwritten."""
    path = (out or default).absolute()
    if path.exists():
        raise LaunchError(f"{path} exists", "Give another --out, or remove it.")
    return str(path)


def _run_stage(name: str, arguments: list[str], run: RunDir | None = None) -> int:
    """Run one stage as a job on this host, print what it printed, and its first cause if it fails.

    It gets the device that the same stage of `run` had; without a run, the first free one.
    """
    devices, environment = _device_of(name, run)
    log_dir = Path(tempfile.mkdtemp(prefix=f"tunelaunch-{name}-"))
    job = JobSpec(
        name=name,
        entrypoint=ENTRYPOINT,
        args=(name, "--log-dir", str(log_dir), "--package-root", str(PACKAGE_ROOT), *arguments),
        num_processes=1,
        devices=devices,
        env=environment,
        log_dir=str(log_dir),
        cwd=os.getcwd(),
        run_id=name,
    )
    backend = load("torchrun")
    handle = backend.start(job)
    try:
        import time

        while not (status := backend.poll(handle)).state.is_terminal:
            time.sleep(POLL_S)
    finally:
        backend.kill(handle)
    if status.state is JobState.SUCCEEDED:
        log = log_dir / "rank_0.log"
        print(log.read_text(encoding="utf-8").rstrip())
        shutil.rmtree(log_dir)
        return EXIT_OK
    if status.failure is not None:
        from dataclasses import asdict

        print(failure_text(asdict(status.failure)), file=sys.stderr)
    return EXIT_BUG if status.exit_code is None else status.exit_code
