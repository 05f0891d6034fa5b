"""The command line: parse flags, call one function, print. No logic, and nothing heavy at module level.

`launch X.yaml ...` means `launch run X.yaml ...`; that is decided here, before Typer sees the arguments.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.job import ClusterError
from trainer.spec import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, EXIT_USER, TrainError

from .cli_cluster import app as cluster_app
from .cli_data import app as data_app
from .cli_explain import app as explain_app
from .cli_recipes import app as recipes_app
from .cli_runs import ForceKey, Sets
from .cli_runs import app as runs_app
from .cli_submit import submit_command, submitted_command
from .cli_verify import app as verify_app
from .errors import LaunchError
from .recipe_library import shipped_names

app = typer.Typer(
    help="One readable recipe, one command: from a base model to a fine-tuned, merged, verified chat model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(recipes_app, name="recipes", help="List, show, copy, write and check recipes.")
app.add_typer(data_app, name="data", help="Look at a recipe's data as the model will.")
app.add_typer(runs_app, name="runs", help="List, show, watch, stop and resume runs.")
app.add_typer(cluster_app, name="cluster", help="Check that the hosts of a run fit together.")
app.add_typer(explain_app, name="explain", help="Explain what works together, and why not.")
app.add_typer(verify_app, name="verify", help="Check that a layout computes what a simpler one does.")

RecipeArg = Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.", metavar="RECIPE")]
Gpus = Annotated[
    str | None,
    typer.Option(help="Physical GPUs: 0,2 | 0-3 | GPU-... | MIG-... | all | free:2. Default: every free GPU."),
]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        help="Over ssh, on this host and its devices, such as a:0,1; again for each host. Or a hosts.yaml.",
        metavar="HOST[:DEVICES]",
    ),
]
Cpu = Annotated[int | None, typer.Option(help="Train on the CPU with this many processes.", min=1)]
BackendOption = Annotated[str | None, typer.Option(help="Where processes run: torchrun (default) | ssh | ray | debug.")]
Nodes = Annotated[int, typer.Option(help="Number of hosts; under Ray, --gpus and --cpu count for each.", min=1)]
RunDirOption = Annotated[Path | None, typer.Option(help="Run folder. Default: <run.dir>/<recipe>-<time>-<4 hex>.")]
Debug = Annotated[bool, typer.Option(help="All stages for 10 steps in this process, with the first batch shown.")]
Profile = Annotated[
    str | None, typer.Option(help="Record these steps, such as 3-5: a trace and a page of costs.", metavar="STEPS")
]
Target = Annotated[str, typer.Argument(help="Run id, the start of one, `last`, or a folder.", metavar="RUN_OR_PATH")]
Out = Annotated[Path | None, typer.Option(help="Output folder; it must not exist.")]


@app.command("run")
def run_command(
    recipe: RecipeArg,
    gpus: Gpus = None,
    cpu: Cpu = None,
    backend: BackendOption = None,
    nodes: Nodes = 1,
    hosts: Hosts = None,
    run_dir: RunDirOption = None,
    sets: Sets = None,
    debug: Debug = False,
    profile: Profile = None,
    dry_run: Annotated[bool, typer.Option(help="Show the plan and stop.")] = False,
    resume: Annotated[str | None, typer.Option(help="Continue this run.", metavar="RUN")] = None,
    force_key: ForceKey = None,
    detach: Annotated[bool, typer.Option(help="Go on in the background, also when the terminal closes.")] = False,
) -> None:
    """Train, consolidate, merge and evaluate. `launch RECIPE` is short for this."""
    from . import start

    steps = start.parse_profile(profile) if profile is not None else ()
    forced = tuple(force_key or ())
    if forced and resume is None:
        raise LaunchError("--force-key goes with --resume", "Without it every key of the recipe is new.")
    named = tuple(hosts or ())
    request = start.Request(recipe, gpus, cpu, backend, nodes, run_dir, tuple(sets or ()), debug, steps, forced, named)
    if dry_run:
        raise typer.Exit(start.show_plan(request, as_json=False))
    if resume is not None:
        raise typer.Exit(start.resume(resume, request, detached=detach))
    raise typer.Exit(start.start(request, detached=detach))


@app.command("plan")
def plan_command(
    recipe: RecipeArg,
    gpus: Gpus = None,
    cpu: Cpu = None,
    backend: BackendOption = None,
    nodes: Nodes = 1,
    hosts: Hosts = None,
    run_dir: RunDirOption = None,
    sets: Sets = None,
    debug: Debug = False,
    json: Annotated[bool, typer.Option("--json", help="Print plan.json in place of the page.")] = False,
) -> None:
    """Show everything that a run would do, without starting it."""
    from . import start

    named = tuple(hosts or ())
    request = start.Request(recipe, gpus, cpu, backend, nodes, run_dir, tuple(sets or ()), debug, hosts=named)
    raise typer.Exit(start.show_plan(request, as_json=json))


@app.command("consolidate")
def consolidate_command(
    target: Target,
    out: Out = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 | fp16 | fp32. Default: the trained one.")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint step. Default: the newest verified one.")] = None,
    base: Annotated[Path | None, typer.Option(help="Base model folder, for a full fine-tune given by path.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest file, such as 5GB.")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Of an adapter from another program that has no adapter_config.json.")
    ] = None,
) -> None:
    """Sharded checkpoint -> PEFT adapter, or full HF model."""
    from . import artefacts

    options = {"dtype": dtype, "step": step, "base": base, "max-shard-size": max_shard_size, "lora-alpha": lora_alpha}
    raise typer.Exit(artefacts.consolidate(target, out, options))


@app.command("merge")
def merge_command(
    target: Target,
    out: Out = None,
    base: Annotated[
        str | None, typer.Option(help="Base model: folder, .gguf, package:NAME/FILE or Hub id. Default: the run's own.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 | fp16 | fp32. Default: the base's.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest file, such as 5GB.")] = None,
    add: Annotated[
        list[str] | None, typer.Option(help="One more adapter, with its weight.", metavar="RUN_OR_PATH[=WEIGHT]")
    ] = None,
    weight: Annotated[float, typer.Option(help="Factor of the first adapter's updates.")] = 1.0,
    base_precision: Annotated[
        str | None, typer.Option(help="bf16: the base as it is (default) | nf4: as QLoRA trained on it.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default) | cuda: where the proof runs.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="More prompts (JSON) for the proof.")] = None,
    proof: Annotated[bool, typer.Option(help="Compare the result with base + adapter.")] = True,
) -> None:
    """Base + adapter -> merged HF model, proved by comparing logits."""
    from . import artefacts

    options = {
        "base": base,
        "dtype": dtype,
        "max-shard-size": max_shard_size,
        "base-precision": base_precision,
        "device": device,
        "prompts": prompts,
    }
    raise typer.Exit(artefacts.merge(target, out, add or [], weight, proof, options))


@app.command("evaluate")
def evaluate_command(
    target: Target,
    strict: Annotated[bool, typer.Option(help="Exit with an error when an expectation is not met.")] = False,
    prompts: Annotated[Path | None, typer.Option(help="Prompts (JSON), for a model given by path.")] = None,
    base: Annotated[Path | None, typer.Option(help="Base model folder, for a model given by path.")] = None,
    out: Out = None,
) -> None:
    """Ask base and tuned model the same questions and write the before/after report."""
    from . import artefacts

    raise typer.Exit(artefacts.evaluate(target, strict, prompts, base, out))


@app.command("chat")
def chat_command(
    target: Target,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder on top of a model folder.")] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Chat template: a name (launch recipes templates) or a Jinja file. Default: the run's own."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt. Default: the run's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0)] = 0.0,
) -> None:
    """Talk to the tuned model. Commands inside: /reset /system /save /exit."""
    from . import artefacts

    raise typer.Exit(artefacts.chat(target, adapter, template, system, max_new_tokens, temperature))


@app.command("doctor")
def doctor_command() -> None:
    """Check this machine: versions, GPUs, name clashes, disk, environment variables."""
    from . import doctor

    checks = doctor.run_doctor()
    typer.echo(doctor.render(checks))
    raise typer.Exit(doctor.exit_code(checks))


app.command("submit")(submit_command)
app.command("_submitted", hidden=True)(submitted_command)


@app.command("_supervise", hidden=True)
def supervise_command(run: Path, attempt: int, done: str = "") -> None:
    """Run an attempt whose plan is written; `--detach` starts this in a session of its own."""
    from . import start

    raise typer.Exit(start.supervise_detached(run, attempt, done))


def route(argv: list[str]) -> list[str]:
    """`X.yaml ...`, `--gpus 0 X.yaml ...`, `qwen_qlora ...` -> `run ...`: a recipe in a command's place means `run`."""
    is_recipe = [a.endswith((".yaml", ".yml")) for a in argv]
    if any(is_recipe) and (is_recipe[0] or argv[0].startswith("-")):
        return ["run", *argv]
    if argv and argv[0] in shipped_names():
        return ["run", *argv]
    return argv


def main(argv: list[str] | None = None) -> None:
    """Console script. Exits with 0, 2 (the user can fix it), 70 (our bug), 75 (retry may help) or 130 (interrupted)."""
    arguments = route(list(sys.argv[1:] if argv is None else argv))
    try:
        code: Any = app(args=arguments, prog_name="launch", standalone_mode=False)
    except (LaunchError, ClusterError, TrainError) as e:
        _print_error(str(e))
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except ModuleNotFoundError as e:
        top = (e.name or "").partition(".")[0]
        if top in ("", "launcher", "trainer", "cluster"):
            sys.exit(_unexpected(e))
        _print_error(
            f"the package {top} is not installed in {sys.executable}\nWhat else is missing, and how to install it: launch doctor"
        )
        sys.exit(EXIT_USER)
    except Exception as e:  # a process border: what gets here is our bug, or Click's own usage error
        sys.exit(_unexpected(e))
    sys.exit(code if isinstance(code, int) else EXIT_OK)


def _print_error(text: str) -> None:
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    label = "\033[31merror:\033[0m" if color else "error:"
    print(f"{label} {text}", file=sys.stderr)


def _unexpected(e: Exception) -> int:
    # Typer vendors Click, whose usage errors carry their own text and exit code 2.
    if hasattr(e, "format_message") and hasattr(e, "exit_code"):
        e.show()  # type: ignore[attr-defined]  # a Click exception
        return int(e.exit_code)  # type: ignore[attr-defined]
    import traceback

    traceback.print_exception(e)
    print("This is a bug in tunelaunch; the lines above say where.", file=sys.stderr)
    return EXIT_BUG
