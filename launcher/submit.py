"""`launch submit`: check, show what goes, send it, start the job. The run id is minted here, once."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.job import ClusterError
from cluster.ray_jobs import RayJobs
from trainer.spec import EXIT_OK, EXIT_RETRY

from . import upload
from .errors import LaunchError
from .recipe import LoadedRecipe, load_recipe
from .recipe_library import find
from .run_dir import RunDir, new_run_id
from .start import runs_dir
from .submission import PENDING, Submission, connect, write_submission
from .where import BY_NUMBER

BACKENDS = ("ray", "torchrun")
STOP_WAIT_S = 600
"""How long Ray waits after SIGTERM for the last checkpoint, before it kills; its own default is 3."""
TRAVELLING = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "NCCL_DEBUG")
"""The only variables that are sent: they say where models come from and how much is logged, on whatever machine."""
_LOOKS_SECRET = re.compile(r"://[^/@]*@|\b(hf|sk|ghp|gho|glpat|xox[bp])[_-]\w{8}|AKIA[A-Z0-9]{12}|eyJ\w{8}")


@dataclass(frozen=True)
class SubmitRequest:
    """The flags of `launch submit RECIPE`, as typed."""

    recipe: str
    address: str
    backend: str
    gpus: str | None
    cpu: int | None
    nodes: int
    run_dir: str | None
    sets: tuple[str, ...]
    debug: bool
    shared: tuple[Path, ...]
    upload_limit: str
    insecure: bool
    ca: Path | None
    python: str
    timeout_s: float


def submit(request: SubmitRequest, dry_run: bool, follow: bool) -> int:
    """Returns 0 once the cluster has accepted the job; with `follow`, the run's exit code."""
    shared = tuple(Path(os.path.normpath(folder)) for folder in request.shared)
    if bad := [str(folder) for folder in shared if not folder.is_absolute()]:
        raise LaunchError(f"--shared {bad[0]}: is not an absolute path", "Give it as the cluster sees it.")
    if request.backend not in BACKENDS:
        raise LaunchError(f'a cluster cannot run "{request.backend}"', f"Choose one of: {', '.join(BACKENDS)}")
    if request.backend == "ray" and not request.debug:
        _require_amounts(request.gpus, request.cpu)
    limit_bytes = upload.parse_size(request.upload_limit)
    loaded = load_recipe(find(request.recipe), request.sets, shared)
    run_dir = remote_run_dir(request.run_dir, loaded.recipe.run.dir, new_run_id(loaded.name))
    items = upload.collect(loaded, shared)
    env = travelling(os.environ)
    ca = str(request.ca.absolute()) if request.ca else None
    client = connect(request.address, request.insecure, ca, request.timeout_s)
    print(_page(loaded, items, env, run_dir, client), flush=True)
    upload.require_size(items, limit_bytes)
    if dry_run:
        return EXIT_OK
    if not request.insecure:
        client.require_protected()
    client.ray_version()
    package = upload.pack(items)
    try:
        _send(client, package)
    finally:
        package.file.close()
    run = RunDir((runs_dir() / Path(run_dir).name).absolute())
    command = entrypoint(request, run_dir, items[0].name, package.name)
    submission = Submission(
        run_id=run.run_id,
        address=str(client.address),
        insecure=request.insecure,
        ca=ca,
        timeout_s=request.timeout_s,
        run_dir=run_dir,
        recipe=str(loaded.files[0]),
        command=shlex.join(["launch", *sys.argv[1:]]),
        package=package.name,
        files=[{"name": item.name, "bytes": item.size} for item in items],
        env=sorted(env),
        secrets=[secret.name for secret in loaded.recipe.secrets],
        submitted=time.time(),
    )
    _start(client, run, submission, command, env)
    return _say(run, submission, follow)


def _require_amounts(gpus: str | None, cpu: int | None) -> None:
    """Raises LaunchError for what every cluster refuses (ray_place.py), before anything is sent."""
    if cpu is None and not re.fullmatch(BY_NUMBER, (gpus or "").strip()):
        raise LaunchError(
            f"--gpus {gpus}: Ray gives devices away by number and cannot promise these"
            if gpus
            else "how many devices?",
            "For each node: --gpus free:N or --cpu N; on several: --nodes M.",
        )


def remote_run_dir(given: str | None, run_parent: str, run_id: str) -> str:
    """The run folder on the cluster. A relative one lies in the home folder there: the one place that every cluster has,
    and that most share between their nodes. Raises LaunchError for a --run-dir that could be meant in two ways."""
    if given is not None:
        if not given.startswith(("/", "~/")) or not Path(given).name:
            raise LaunchError(
                f"--run-dir {given}: is a folder on the cluster", "Write it in full: /shared/runs/NAME or ~/NAME"
            )
        return os.path.normpath(given)
    parent = run_parent if run_parent.startswith(("/", "~/")) else f"~/{run_parent}"
    return f"{os.path.normpath(parent)}/{run_id}"


def travelling(env: Mapping[str, str]) -> dict[str, str]:
    """What of `env` is sent. Raises LaunchError for a value that looks like a secret; it is not repeated."""
    found = {name: env[name] for name in TRAVELLING if env.get(name)}
    for name, value in found.items():
        if _LOOKS_SECRET.search(value):
            raise LaunchError(
                f"{name} looks as if it held a secret, and is not sent",
                "Unset it here; name secrets in the recipe (secrets: [HF_TOKEN]) and set them on the cluster.",
            )
    return found


def entrypoint(request: SubmitRequest, run_dir: str, recipe: str, package: str) -> str:
    """The command that Ray gives to a shell on the head node."""
    argv = [request.python, "-P", "-m", "launcher", "_submitted", recipe, "--run-dir", run_dir]
    argv += ["--expects", own_version(), "--package", package, "--backend", request.backend]
    argv += ["--gpus", request.gpus] if request.gpus is not None else []
    argv += ["--cpu", str(request.cpu)] if request.cpu is not None else []
    argv += ["--nodes", str(request.nodes)] if request.nodes > 1 else []
    argv += ["--debug"] if request.debug else []
    return f"exec {shlex.join(argv)}"


def own_version() -> str:
    """Of the installed tunelaunch."""
    return metadata.version("tunelaunch")


def _page(loaded: LoadedRecipe, items: list[upload.Item], env: Mapping[str, str], run_dir: str, client: RayJobs) -> str:
    secrets = [f"{s.name} (read on the workers, from {s.path or 'their environment'})" for s in loaded.recipe.secrets]
    variables = [f"{name}={value}" for name, value in sorted(env.items())]
    return "\n".join(
        [
            f"cluster       {client.address}",
            f"run folder    {run_dir} (on the cluster)",
            upload.page(items),
            f"environment   {' '.join(variables) or 'nothing of it is sent'}",
            *([f"secrets       {', '.join(secrets)}"] if secrets else []),
        ]
    )


def _send(client: RayJobs, package: upload.Package) -> None:
    if client.has_package(package.name):
        print("the cluster has these files already; nothing is sent", flush=True)
        return
    client.upload_package(package.name, package.file, package.size)
    print(f"sent {upload.shown_size(package.size)}, packed", flush=True)


def _start(client: RayJobs, run: RunDir, submission: Submission, command: str, env: Mapping[str, str]) -> None:
    """The record is written first: a job that the cluster has accepted is never one that nothing here knows of."""
    if client.job(run.run_id) is not None:
        raise LaunchError(
            f"{submission.address} has a job {run.run_id} already", "Choose another last part of --run-dir."
        )
    run.create()
    write_submission(run, submission)
    variables = {**env, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    runtime_env: dict[str, Any] = {"working_dir": f"gcs://{submission.package}", "env_vars": variables}
    try:
        client.submit(run.run_id, command, runtime_env, {"tunelaunch": own_version()})
    except ClusterError as e:
        if not _is_there(client, run.run_id):
            if e.exit_code != EXIT_RETRY:
                run.submission.unlink()
                run.root.rmdir()
                raise
            hint = (
                f"{e.hint}\nIt may have been accepted all the same; see: launch runs show {shlex.quote(str(run.root))}"
            )
            raise ClusterError(e.message, hint, e.exit_code) from None
    write_submission(run, replace(submission, state=PENDING, seen=time.time()))


def _is_there(client: RayJobs, job_id: str) -> bool:
    """False where the cluster does not know it, or cannot be asked."""
    try:
        return client.job(job_id) is not None
    except ClusterError:
        return False


def _say(run: RunDir, submission: Submission, follow: bool) -> int:
    print(f"\n{run.run_id} is submitted to {submission.address}; it goes on without this terminal")
    print(
        f"  watch: launch runs watch {shlex.quote(str(run.root))}\n  stop:  launch runs stop {shlex.quote(str(run.root))}"
    )
    if not follow:
        return EXIT_OK
    from .submitted_runs import watch

    return watch(run)
