"""`launch submit`: a recipe to a Ray cluster, from any machine that reaches its dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_runs import Sets

Recipe = Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.", metavar="RECIPE")]
Gpus = Annotated[
    str | None, typer.Option(help="free:N under Ray, for each node; with --backend torchrun as `launch --gpus`.")
]
Cpu = Annotated[int | None, typer.Option(help="Train on the CPU with this many processes, on each node.", min=1)]
Nodes = Annotated[int, typer.Option(help="Number of nodes.", min=1)]
Backend = Annotated[str, typer.Option(help="Where processes run: ray | torchrun (the head node alone).")]
Debug = Annotated[bool, typer.Option(help="All stages for 10 steps, with the first batch shown.")]


def submit_command(
    recipe: Recipe,
    ray: Annotated[str, typer.Option(help="Address of the cluster's dashboard: https://HOST, http://localhost:8265.")],
    gpus: Gpus = None,
    cpu: Cpu = None,
    nodes: Nodes = 1,
    backend: Backend = "ray",
    run_dir: Annotated[
        str | None, typer.Option(help="Run folder on the cluster (/... or ~/...). Default: <run.dir>/<run id>, from ~.")
    ] = None,
    sets: Sets = None,
    debug: Debug = False,
    shared: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that the cluster sees by this path; files in it are not sent.", metavar="DIR"),
    ] = None,
    upload_limit: Annotated[str, typer.Option(help="Largest upload, such as 50MB.", metavar="SIZE")] = "100MB",
    python: Annotated[str, typer.Option(help="Python on the cluster that has tunelaunch.")] = "python",
    insecure: Annotated[
        bool, typer.Option(help="Also plain http to another machine, and a cluster that asks for no token.")
    ] = False,
    ca: Annotated[Path | None, typer.Option(help="Certificates to trust, in PEM format.", metavar="FILE")] = None,
    timeout_s: Annotated[float, typer.Option(help="Limit of each request, in seconds.", min=1)] = 60.0,
    dry_run: Annotated[bool, typer.Option(help="Show what would be sent and stop.")] = False,
    follow: Annotated[bool, typer.Option(help="Watch it until it ends; Ctrl-C leaves it running.")] = False,
) -> None:
    """Send a recipe with its local files to a Ray cluster, and start it there. Needs the cluster's token."""
    from . import submit

    request = submit.SubmitRequest(
        recipe=recipe,
        address=ray,
        backend=backend,
        gpus=gpus,
        cpu=cpu,
        nodes=nodes,
        run_dir=run_dir,
        sets=tuple(sets or ()),
        debug=debug,
        shared=tuple(shared or ()),
        upload_limit=upload_limit,
        insecure=insecure,
        ca=ca,
        python=python,
        timeout_s=timeout_s,
    )
    raise typer.Exit(submit.submit(request, dry_run, follow))


def submitted_command(
    recipe: str,
    run_dir: Annotated[Path, typer.Option()],
    expects: Annotated[str, typer.Option()],
    package: Annotated[str, typer.Option()],
    backend: Backend = "ray",
    gpus: Gpus = None,
    cpu: Cpu = None,
    nodes: Nodes = 1,
    debug: Debug = False,
) -> None:
    """What Ray starts on the cluster for `launch submit`."""
    from .job_entry import run_submitted
    from .start import Request

    request = Request(recipe, gpus, cpu, backend, nodes, run_dir, (), debug)
    raise typer.Exit(run_submitted(request, expects, package))
