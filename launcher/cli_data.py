"""`launch data ...`: look at a recipe's data as the model will."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Recipe = Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.", metavar="RECIPE")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; may be repeated.")
]


@app.callback()
def data() -> None:
    """Look at data, check it, and change its form."""


@app.command()
def preview(
    recipe: Recipe,
    documents: Annotated[int, typer.Option("-n", "--documents", help="How many documents to show.", min=0)] = 3,
    first: Annotated[int, typer.Option(help="Number of the first one, counted from 0.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Write an HTML page as well.")] = None,
    sets: Sets = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the page.")] = False,
) -> None:
    """Show documents as the model reads them, with what is learnt of them, and how long all of them are. Needs no device."""
    from .data_preview import preview as show
    from .start import Request

    raise typer.Exit(
        show(Request(recipe, None, None, None, 1, None, tuple(sets or ()), False), documents, first, out, json)
    )
