"""docs/import.md, made of the tables: what becomes of every key of every program."""

from __future__ import annotations

from .import_table import PROGRAMS, Table, load_table

_HEAD = """# Settings of other programs

`launch recipes import FILE [--out X.yaml] [--format PROGRAM]` makes a recipe of another program's settings, and says of every one of
them what became of it: mapped, or without a counterpart and why. Then it lists what that program did silently and a recipe does
not, and what only a person can decide. It exits with 0 when the recipe passes `launch recipes check`, with 2 when something is to be
decided (the recipe is written all the same) or the file is wrong (nothing is written).

| file | program |
|---|---|
| `.py` with `model`, `train_dataloader` and `optim_wrapper` | XTuner 0.1; read as syntax, never run |
| `.yaml`, `.yml`, `.json` | LLaMA-Factory, Axolotl, ms-swift (`args.json` too) or TRL, told by its keys |
| `.sh` with one training command | `swift sft`, `swift pt`, `llamafactory-cli train`, `trl sft`, `xtuner train`, `axolotl train`; continued lines, variables and the config that the command names are read |

* A key that its program does not have is an error, with its line and the nearest key that it has; all of them at once.
* A default of the program that a recipe does not share is written out.
* Paths are looked for beside the file, in the current folder, and in the four folders above the file.
* `_base_` and `read_base` of an XTuner config are not followed; what only running it would tell is an error where it is needed.
* Values of secrets are not shown and not taken over.

`same`: nothing is lost. `changes`: the recipe trains otherwise unless the value is off, or the one named after `=`; the report says
NOT TAKEN OVER. `stop`: then a person must choose.
"""


def page() -> str:
    """The whole page, Markdown."""
    parts = [_HEAD]
    for name in PROGRAMS:
        parts.append(_section(load_table(name)))
    return "\n".join(parts)


def _section(table: Table) -> str:
    lines = [
        f"## {table.program}",
        "",
        f"Version {table.version}; {table.source}.",
        "",
        "| key | becomes |",
        "|---|---|",
    ]
    lines += [f"| `{key}` | `{ours.partition(':')[0]}` |" for key, ours in sorted(table.becomes.items())]
    lines += ["", "Without a counterpart:", "", "| keys | effect | why |", "|---|---|---|"]
    groups: dict[tuple[str, str], list[str]] = {}
    for key, reason in sorted(table.without.items()):
        shown = f"`{key}={'|'.join(reason.harmless)}`" if reason.harmless else f"`{key}`"
        groups.setdefault((reason.effect, reason.why), []).append(shown.replace("|", "\\|"))
    order = {"stop": 0, "changes": 1, "same": 2}
    for (effect, why), keys in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[1][0])):
        lines.append(f"| {', '.join(keys)} | {effect} | {why} |")
    if table.defaults:
        lines += ["", "Written out where the file is silent:", ""]
        lines += [f"* `{ours}: {_shown(value)}`" for ours, value in table.defaults.items() if value is not None]
    lines += ["", "Done silently there, and otherwise here (each where it applies):", ""]
    lines += [f"* {text}" for _, text in table.differs]
    return "\n".join([*lines, ""])


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value).replace("'", "")
