"""`launch data ...`: look at a recipe's data as the model will."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import LaunchError

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


@app.command()
def check(
    recipe: Recipe,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit", metavar="NAME=SHARE", help="Allow this share of a finding (0.05 or 5%); may be repeated."
        ),
    ] = None,
    sets: Sets = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the page.")] = False,
) -> None:
    """Look for what is wrong with the rows: file:line, counts and shares. Exit code 2 over a limit. Needs no device."""
    from .data_check import check as run
    from .start import Request

    request = Request(recipe, None, None, None, 1, None, tuple(sets or ()), False)
    raise typer.Exit(run(request, limits or (), json))


@app.command()
def identity(
    name: Annotated[str, typer.Option(help="What the model is to be called.")],
    author: Annotated[str, typer.Option(help="Who made it.")],
    out: Annotated[Path, typer.Option(help="A new jsonl file.")],
    language: Annotated[str, typer.Option(help="en | zh.")] = "en",
) -> None:
    """Write rows that teach a model its name and author, in many wordings, among others that keep what it knew."""
    from .data_identity import write_identity

    count = write_identity(name, author, language, out)
    typer.echo(f"wrote {count} rows to {out}; train on them: data: {out}")


@app.command()
def replace(
    source: Annotated[Path, typer.Argument(metavar="IN", help="json or jsonl.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new file.")],
    old: Annotated[list[str], typer.Option(help="The text to replace; may be repeated, with as many --new.")],
    new: Annotated[list[str], typer.Option(help="What stands there instead.")],
) -> None:
    """Replace a text in every string of a file. Keys and all else stay as they are, byte for byte."""
    from .data_replace import replace as run

    if len(old) != len(new):
        raise LaunchError(f"{len(old)} --old and {len(new)} --new", "Give one --new for each --old, in the same order.")
    found = run(source, out, list(zip(old, new, strict=True)))
    typer.echo(f"wrote {out}: {found.replacements:,} replaced, in {found.changed_rows:,} of {found.rows:,} rows")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Rows as training reads them: a file, folder or pattern.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new file: .jsonl, or .json for one array.")],
    to: Annotated[str, typer.Option(help="messages | alpaca | sharegpt | conversation | pair | text.")],
    format: Annotated[str, typer.Option("--from", help="Format of IN; auto: by its first row.")] = "auto",
    lossy: Annotated[bool, typer.Option("--lossy", help="Write what --to can hold; count what is lost.")] = False,
) -> None:
    """Write rows in another format. What it cannot hold is an error that names the rows, and then nothing is written."""
    from .data_convert import convert as run

    found = run(source, out, to, format, lossy)
    typer.echo(f"wrote {out}: {found.rows:,} rows as `{to}`")
    for what, count in found.lost.most_common():
        typer.echo(f"lost, in {count:,} rows: {what}")
    if found.left_out:
        typer.echo(f"left out: {found.left_out:,} rows, which `{to}` cannot hold at all")
