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

from cluster.job import ClusterError, JobSpec, JobState
from cluster.registry import load
from trainer.spec import EXIT_BUG, EXIT_OK

from .errors import LaunchError
from .run_dir import RunDir, read_json
from .stages import ENTRYPOINT, PACKAGE_ROOT, qlora_flags
from .start import runs_dir
from .supervise import failure_text

POLL_S = 0.01


def _find(target: str, files: bool = False) -> RunDir | Path:
    """A run, or an existing folder (or with `files` a file) that is none. Raises LaunchError when it is neither."""
    from .status import find_run

    path = Path(target)
    if path.is_dir() and not (path / "status.json").is_file():
        return path.resolve()
    if path.is_file():
        if files:
            return path.resolve()
        raise LaunchError(f"{target} is a file", "Give a folder: a run, an adapter or a model.")
    if "/" in target and not path.exists():
        raise LaunchError(f"{target} does not exist", "Give the id of a run, `last`, or the path of a folder.")
    return find_run(target, runs_dir())


def _flags(options: dict[str, Any]) -> list[str]:
    """{"dtype": "bf16", "step": None} -> ["--dtype", "bf16"]."""
    return [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]


def consolidate(target: str, out: Path | None, options: dict[str, Any]) -> int:
    """Returns the job's exit code. Raises LaunchError for a run whose result exists and no --out."""
    found = _find(target, files=True)
    if isinstance(found, RunDir):
        spec = read_json(found.plan)["spec"]
        default = found.merged if spec["method"]["name"] == "full" else found.adapter
        options = {**options, "base": options["base"] or _model_dir(found), "template": spec["data"]["template"]}
        source = found.checkpoints
    else:
        source, default = (
            found,
            found.parent / f"{found.stem if found.is_file() else found.name}-consolidated",
        )
    return _run_stage("consolidate", ["--source", str(source), "--out", _out(out, default), *_flags(options)])


def merge(target: str, out: Path | None, others: list[str], weight: float, proof: bool, options: dict[str, Any]) -> int:
    """`target` is a run or an adapter folder, `others` are more of them, each with `=WEIGHT` or without.

    Returns the job's exit code. Raises LaunchError for what is neither a run nor a folder, and for an unknown base.
    """
    found = _find(target)
    adapters = [(_adapter_of(found), weight), *(_weighted(text) for text in others)]
    arguments = [part for adapter, factor in adapters for part in ("--adapter", str(adapter), f"--weight={factor!r}")]
    if isinstance(found, RunDir):
        default = found.merged
        spec = read_json(found.plan)["spec"]
        options = {**options, "template": spec["data"]["template"]}
        method = spec["method"]
        arguments += qlora_flags(method["name"], spec["model"]["dtype"], method["double_quant"])
        arguments += ["--trust-remote-code"] if spec["model"]["trust_remote_code"] else []
        base = options["base"] or _model_dir(found)
    else:
        default = found.parent / f"{found.name}-merged"
        base = options["base"] or _base_named_by(found / "adapter_config.json")
    options = {**options, **_base_flags(base, given=options["base"] is not None)}
    arguments += [] if proof else ["--no-proof"]
    arguments += ["--out", _out(out, default), *_flags(options)]
    return _run_stage("merge", arguments, on_gpu=options["device"] == "cuda")


def _adapter_of(found: RunDir | Path) -> Path:
    folder = found.adapter if isinstance(found, RunDir) else found
    if not (folder / "adapter_config.json").is_file():
        raise LaunchError(
            f"{folder} holds no adapter_config.json",
            "Give an adapter folder, or a run that has one; after full training there is nothing to merge.",
        )
    return folder


def _base_named_by(config: Path) -> str | None:
    try:
        named = read_json(config)["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        # The stage reads it again, and says what is wrong with it.
        return None
    return named if isinstance(named, str) else None


def _weighted(text: str) -> tuple[Path, float]:
    """`RUN_OR_PATH[=WEIGHT]`."""
    name, equals, number = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return _adapter_of(_find(text)), 1.0
    try:
        return _adapter_of(_find(name)), float(number)
    except ValueError:
        raise LaunchError(f"--add {text}: {number!r} is not a number", "Write ADAPTER=0.5, or ADAPTER alone.") from None


def _base_flags(base: str | None, given: bool) -> dict[str, Any]:
    """Flags for a base as a recipe's model.source may name it: a folder, a GGUF file, a package, a Hub id.

    `given` on the command line; otherwise the adapter names it, and a stranger's adapter may only name a model of the Hub.
    """
    from .model_source import resolve_source
    from .start import cache_dir

    # A folder's own shortcomings are told by the stage, which knows what it needs of it.
    if base is None or os.path.isdir(base):
        return {"base": base}
    said = f"--base {base}" if given else f"the adapter's base {base[:200]!r}"
    hint = "Give the model that it was trained on: --base FOLDER, FILE.gguf, package:NAME/FILE or ORG/NAME."
    try:
        if len(base) > 200 or (not given and ":" in base):
            raise LaunchError("is no model of the Hub")
        ref = resolve_source(base, Path.cwd())
    except LaunchError as e:
        reason = e.message.partition(": ")[2] or e.message
        raise LaunchError(f"{said} is not here: {reason}", hint) from e
    if ref.kind == "random":
        raise LaunchError(f"{said}: random weights are no base of an adapter", hint)
    return {"base": ref.location, "base-kind": ref.kind, "cache-dir": cache_dir()}


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
    template: str | None,
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


def _device_of(stage: str, run: RunDir | None, on_gpu: bool) -> tuple[tuple[str, ...], dict[str, str]]:
    """(UUIDs, environment) for one process on this host. Raises LaunchError when it needs a GPU and none is free."""
    job = None if run is None else next(j for j in read_json(run.plan)["jobs"] if j["name"] == stage)
    if job is not None and not job.get("nodes"):  # runs of earlier versions know none
        return tuple(job["devices"]), job["env"]
    from cluster.environment import device_env
    from cluster.inventory import cpu_selection, select
    from cluster.nvml import read_inventory

    inventory = read_inventory()
    # Unless it is asked for, only answering questions is worth a GPU.
    on_gpu = on_gpu or (stage == "evaluate" and bool(inventory.devices))
    try:
        selection = select(inventory, "free:1", os.environ) if on_gpu else cpu_selection(1, inventory)
    except ClusterError as e:
        reason = e.message.removeprefix("--gpus free:1: ")
        raise LaunchError(f"{stage} needs a free GPU: {reason}", "Leave --device out to run on the CPU.") from e
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


def _run_stage(name: str, arguments: list[str], run: RunDir | None = None, on_gpu: bool = False) -> int:
    """Run one stage as a job on this host, print what it printed, and its first cause if it fails.

    It gets the device that the same stage of `run` had; without a run, the first free one.
    """
    devices, environment = _device_of(name, run, on_gpu)
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
