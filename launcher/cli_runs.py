"""`launch runs ...`: what ran, what runs, and how to watch, stop or continue it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=False, invoke_without_command=True)

RunArg = Annotated[str, typer.Argument(help="Run id, the start of one, `last`, or a folder.", metavar="RUN")]
RunsDir = Annotated[Path, typer.Option("--dir", help="Folder of run folders.", envvar="TUNELAUNCH_RUNS")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: train.learning_rate=1e-4.")]
ForceKey = Annotated[
    list[str] | None,
    typer.Option(help="On resume, let this recipe key change although it changes what is learnt.", metavar="KEY"),
]
DEFAULT_DIR = Path("runs")


@app.callback()
def default(context: typer.Context) -> None:
    """List the runs when no command is given."""
    if context.invoked_subcommand is None:
        list_command()


@app.command("list")
def list_command(runs_dir: RunsDir = DEFAULT_DIR) -> None:
    """Newest first: id, state, stage, attempt, start."""
    from .render import run_line
    from .status import list_runs, read_status

    runs = list_runs(runs_dir)
    if not runs:
        typer.echo(f"no runs in {runs_dir.resolve()}")
    lines = {}
    if submitted := [run for run in runs if run.submission.is_file()]:
        from . import submitted_runs

        seen = submitted_runs.observe_all(submitted)
        lines = {run: submitted_runs.run_line(run, seen[run]) for run in submitted}
    for run in runs:
        typer.echo(lines[run] if run in lines else run_line(run, read_status(run)))


@app.command("status", help="The same as show.")
@app.command("show")
def show_command(run: RunArg, runs_dir: RunsDir = DEFAULT_DIR) -> None:
    """State of each stage, every attempt with its cause, the first cause of a failure, and where the results are."""
    from .attempts import end_note
    from .render import run_page
    from .status import find_run, read_status
    from .supervise import failure_text

    found = find_run(run, runs_dir)
    if found.submission.is_file():
        from . import submitted_runs

        submitted_runs.show(found)
        return
    status = read_status(found)
    typer.echo(run_page(found, status))
    if status.failure:
        typer.echo("\n" + "\n".join(filter(None, (failure_text(status.failure), end_note(status.attempts)))))


@app.command("logs")
def logs_command(
    run: RunArg,
    runs_dir: RunsDir = DEFAULT_DIR,
    stage: Annotated[str | None, typer.Option(help="Default: the stage that ran last.")] = None,
    rank: Annotated[int | None, typer.Option(help="Default: every rank.")] = None,
    lines: Annotated[int, typer.Option("-n", help="Lines from the end of each log.")] = 40,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Print what is added until the run ends.")] = False,
) -> None:
    """What the workers printed."""
    from .follow import print_logs
    from .status import find_run

    found = find_run(run, runs_dir)
    if found.submission.is_file() and stage is None and rank is None:
        from . import submitted_runs

        submitted_runs.print_logs(found, lines, follow)
        return
    print_logs(found, stage, rank, lines, follow)


@app.command("watch")
def watch_command(run: RunArg, runs_dir: RunsDir = DEFAULT_DIR) -> None:
    """The live line of a run that was detached, until it ends. Ctrl-C leaves it running."""
    from .follow import watch
    from .status import find_run

    found = find_run(run, runs_dir)
    if found.submission.is_file():
        from . import submitted_runs

        raise typer.Exit(submitted_runs.watch(found))
    raise typer.Exit(watch(found))


@app.command("stop")
def stop_command(
    run: RunArg,
    runs_dir: RunsDir = DEFAULT_DIR,
    now: Annotated[bool, typer.Option(help="Kill without a checkpoint.")] = False,
    wait_s: Annotated[float, typer.Option(help="How long to wait for the end, in seconds.")] = 120.0,
) -> None:
    """Stop a run after its current step, with a checkpoint."""
    from .follow import stop
    from .status import find_run

    found = find_run(run, runs_dir)
    if found.submission.is_file():
        from . import submitted_runs

        submitted_runs.stop(found, now, wait_s)
        return
    stop(found, now, wait_s)


@app.command("fetch")
def fetch_command(
    url: Annotated[str, typer.Argument(help="The run's folder there: what storage.url names, and the run id.")],
    runs_dir: RunsDir = DEFAULT_DIR,
) -> None:
    """Bring a run back from the bucket that its checkpoints were copied to (storage.url)."""
    from .fetch import fetch

    typer.echo(f"go on with it: launch runs resume {fetch(url, runs_dir).root}")


@app.command("resume")
def resume_command(
    run: RunArg,
    runs_dir: RunsDir = DEFAULT_DIR,
    gpus: Annotated[str | None, typer.Option(help="Other devices than before.")] = None,
    cpu: Annotated[int | None, typer.Option(help="CPU processes.", min=1)] = None,
    hosts: Annotated[list[str] | None, typer.Option(help="Other hosts.", metavar="HOST[:DEVICES]")] = None,
    sets: Sets = None,
    force_key: ForceKey = None,
    detach: Annotated[bool, typer.Option(help="Go on in the background.")] = False,
) -> None:
    """Continue from the newest verified checkpoint, or with the stage that failed."""
    from . import start
    from .fetch import fetch, is_url
    from .status import find_run

    found = fetch(run, runs_dir) if is_url(run) else find_run(run, runs_dir)
    forced = tuple(force_key or ())
    named = tuple(hosts or ())
    request = start.Request(str(found.recipe), gpus, cpu, None, 1, None, tuple(sets or ()), False, (), forced, named)
    raise typer.Exit(start.resume(str(found.root), request, detached=detach))
