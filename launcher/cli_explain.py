"""`launch explain ...`: what is decided before a run, and why."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Explain what works together, and why not.", rich_markup_mode=None)


@app.callback()
def explain() -> None:
    """Explain what works together, and why not."""


@app.command()
def compatibility(
    choices: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHOICE=VALUE]...", help="Only these, such as method=qlora zero=3 or offload=none,optimizer."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Which methods, ZeRO stages, dtypes ... go together, why the others do not, and what is nearest to them."""
    from .compatibility_page import as_json, page, parse_filters

    fixed = parse_filters(choices or ())
    if not json:
        typer.echo(page(fixed))
        return
    from json import dumps

    typer.echo(dumps(as_json(fixed), indent=1, ensure_ascii=False))
