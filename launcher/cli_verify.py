"""`launch verify ...`: checks of a recipe's own computation."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def verify() -> None:
    """Check that the way a recipe is computed gives the right numbers."""


@app.command("parallel")
def parallel_command(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.", metavar="RECIPE")],
    gpus: Annotated[str | None, typer.Option(help="Physical GPUs, as for `launch run`.")] = None,
    cpu: Annotated[int | None, typer.Option(help="Use the CPU with this many processes.", min=1)] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="A layout to compare with: sp=1,dp=2,zero=1,accumulate=4; what is left out stays as planned. May be "
            "repeated. Default: one process, ZeRO 1."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 3,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Override a recipe key: train.learning_rate=1e-4.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every number as JSON in place of the table.")] = False,
) -> None:
    """Compare losses and gradients of a recipe's own layout with those of simpler ones.

    A few real steps on the recipe's own data, in each layout; nothing is saved but numbers. Exits with 0 when they agree
    up to rounding, with 1 when they do not.
    """
    from .start import Request
    from .verify_parallel import verify

    request = Request(recipe, gpus, cpu, None, 1, None, tuple(sets or ()), False)
    raise typer.Exit(verify(request, against or (), steps, json))


@app.command("packing")
def packing_command(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.", metavar="RECIPE")],
    gpus: Annotated[str | None, typer.Option(help="Physical GPUs, as for `launch run`; the first is used.")] = None,
    cpu: Annotated[int | None, typer.Option(help="Use the CPU.", min=1)] = None,
    rows: Annotated[int, typer.Option(help="Packed rows to compare; 0: all.", min=0)] = 16,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: model.dtype=fp32.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every number as JSON in place of the page.")] = False,
) -> None:
    """Compare the losses of documents in packed rows with those of the same documents alone.

    Token by token, on the recipe's own model and data; the rows with the most documents are among those compared. Exits with
    0 when they agree up to rounding, with 1 when they do not.
    """
    from .start import Request
    from .verify_packing import verify_packing

    request = Request(recipe, gpus, cpu, None, 1, None, tuple(sets or ()), False)
    raise typer.Exit(verify_packing(request, rows, json))
