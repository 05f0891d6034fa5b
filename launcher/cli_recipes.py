"""`launch recipes ...`: look at the shipped recipes, copy one, write a new one, check one's own."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from trainer.turn_templates import turn_templates

from .errors import LaunchError, RecipeError
from .recipe_library import copy, find, list_recipes, near_recipes, shipped_names
from .recipe_yaml import shown

app = typer.Typer(no_args_is_help=True, help="Recipes: list, show, copy, new, check.", rich_markup_mode=None)

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; may be repeated.")
]


def complete_name(incomplete: str) -> list[str]:
    """Shell completion: shipped names that start as typed."""
    return [name for name in shipped_names() if name.startswith(incomplete)]


Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A shipped recipe, or a recipe file.", autocompletion=complete_name)
]


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Part of a name, model, method or purpose.")] = "",
) -> None:
    """List the shipped recipes, and the known models that fit PATTERN. Raises LaunchError when there is neither."""
    from .family_page import listed_models

    rows, models = list_recipes(pattern), listed_models(pattern)
    if not rows and not models:
        raise LaunchError(f"no shipped recipe and no known model fits '{pattern}'", near_recipes(pattern))
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        typer.echo(f"{row.name:<{width}}  {row.purpose}")
        typer.echo(f"{'':<{width}}  {row.model}, {row.method}; {row.hardware}")
    for line in models:
        typer.echo(line)


@app.command()
def new(
    model: Annotated[str, typer.Option(help="Hub id, modelscope:ID, folder, .gguf or package:NAME/FILE.")],
    data: Annotated[list[str], typer.Option(help="Data file; may be repeated.")],
    method: Annotated[str, typer.Option(help="full | lora | qlora.")] = "qlora",
    out: Annotated[Path | None, typer.Option(help="The new file. Default: MODEL_METHOD.yaml.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="Memory of one GPU in GB. Default: this machine's, else 24.", min=1)
    ] = None,
) -> None:
    """Write a short recipe for a model, a method and data, sized for a GPU. Raises LaunchError where none can be."""
    from .recipe_new import Wanted, memory_here, write_new

    written = write_new(Wanted(model, method, tuple(data), gpu_memory or memory_here(), out))
    for note in written.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"wrote {shown(written.path)} ({written.text.count(chr(10))} lines)")
    typer.echo(f"see what it would do: launch plan {shown(written.path)}")


@app.command()
def show(
    name: Name,
    origin: Annotated[bool, typer.Option("--origin", help="Show where each value comes from.")] = False,
    sets: SetOption = None,
) -> None:
    """Print a recipe as written; with --set, the merged values; with --origin, every value and what set it."""
    path = find(name)
    if not origin and not sets:
        typer.echo(path.read_text(encoding="utf-8-sig"), nl=False)
        return
    from .recipe import dump_recipe, load_recipe
    from .recipe_docs import origin_rows

    loaded = load_recipe(path, sets or ())
    if not origin:
        typer.echo(dump_recipe(loaded), nl=False)
        return
    rows = origin_rows(loaded)
    widths = [min(max(len(row[i]) for row in rows), 60) for i in (0, 1)]
    for key, value, source in rows:
        typer.echo(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}")
    for note in loaded.notes:
        typer.echo(f"note: {note}")


@app.command("copy")
def copy_command(
    name: Name,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A new file, or a folder.")],
) -> None:
    """Copy a recipe, with the data files that it names, to a place where you can change it."""
    written = copy(name, dest)
    for path in written:
        typer.echo(f"wrote {shown(path)}")
    typer.echo(f"run it: launch {shown(written[0])}")


@app.command()
def templates(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Part of a name.")] = "",
) -> None:
    """List the chat templates of XTuner and LLaMA-Factory that data.template takes by name. Raises LaunchError when none fits."""
    named = {key: template for key, template in turn_templates().items() if pattern in key}
    if not named:
        near = ", ".join(difflib.get_close_matches(pattern, turn_templates(), n=3, cutoff=0.3))
        raise LaunchError(f"no template's name has '{pattern}' in it", f"Nearest: {near}" if near else "")
    width = max(map(len, named))
    for key, template in named.items():
        typer.echo(f"{key:<{width}}  stops at {' '.join(template.stop_words) or 'end of text'}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from .recipe_docs import schema_text

    typer.echo(schema_text(), nl=False)


@app.command()
def check(file: Annotated[str, typer.Argument(metavar="FILE", help="A recipe.")], sets: SetOption = None) -> None:
    """Check a recipe, its model and the files that it names, without a device or a download. Raises RecipeError with every mistake."""
    from .combinations import refusals_anywhere
    from .recipe import load_recipe
    from .recipe_model import check_model

    loaded = load_recipe(Path(file), sets or ())
    recipe, model = loaded.recipe, check_model(loaded)
    if refused := [*loaded.located(refusals_anywhere(recipe)), *model.problems]:
        raise RecipeError(refused)
    for note in (*loaded.notes, *model.notes):
        typer.echo(f"note: {note}")
    files = ", ".join(shown(Path(f.path)) for f in recipe.data.files)
    typer.echo(f"ok: {shown(loaded.files[0])}: {recipe.method.name} on {recipe.model.source}, data {files}")


@app.command("import")
def import_command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="XTuner .py, LLaMA-Factory, Axolotl or TRL YAML, ms-swift args.json, or a script."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The recipe to write. Default: FILE's name, here.")] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="xtuner | llamafactory | axolotl | swift | trl. Default: told by the content."),
    ] = None,
) -> None:
    """Make a recipe of another program's settings, and say what became of each. Exits with 2 where a person must choose."""
    from .import_recipe import import_recipe, write
    from .import_report import report

    imported = import_recipe(file, format or "", out)
    problems = write(imported)
    typer.echo(report(imported, problems))
    devices = next((str(n.value) for k, n in imported.foreign.started if k == "CUDA_VISIBLE_DEVICES"), "")
    typer.echo(f"\nwrote {shown(imported.out)}")
    if imported.draft.choices or problems:
        typer.echo(f"decide what is listed above, then: launch recipes check {shown(imported.out)}")
        raise typer.Exit(2)
    typer.echo(
        f"it passes `launch recipes check`; run it: launch {shown(imported.out)}{f' --gpus {devices}' if devices else ''}"
    )
