"""`launch cluster ...`: do the hosts fit together?"""

from __future__ import annotations

from typing import Annotated

import typer

from .cli_runs import Sets

app = typer.Typer(no_args_is_help=True)


@app.callback()
def cluster() -> None:
    """Hosts of a run that spans several."""


@app.command("check")
def check_command(
    recipe: Annotated[
        str | None, typer.Argument(help="Look for this recipe's data and model too.", metavar="[RECIPE]")
    ] = None,
    hosts: Annotated[
        list[str] | None, typer.Option(help="As for a run; again for each host.", metavar="HOST[:DEVICES]")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="For hosts that name no devices; under Ray free:N, of each node.")
    ] = None,
    cpu: Annotated[
        int | None, typer.Option(help="CPU processes on hosts that name no devices; under Ray, of each node.", min=1)
    ] = None,
    backend: Annotated[str | None, typer.Option(help="ssh (default, with --hosts) | ray (a running cluster).")] = None,
    nodes: Annotated[int, typer.Option(help="Under Ray: on this many nodes.", min=1)] = 1,
    sets: Sets = None,
) -> None:
    """Compare hosts (versions, devices, files, shared folders, clocks), and measure the network between them."""
    from . import cluster_check

    flags = cluster_check.Check(recipe, tuple(hosts or ()), gpus, cpu, tuple(sets or ()), backend, nodes)
    raise typer.Exit(cluster_check.check(flags))
