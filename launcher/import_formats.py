"""Which program wrote a settings file, and its settings as a flat list of keys that know their line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import LaunchError, Problem, RecipeError
from .import_python import PythonConfig, read_python
from .import_read import Command, read_commands, read_json, read_text, read_yaml, scalar, start_of
from .import_table import PROGRAMS, load_table
from .import_xtuner import settings_of
from .recipe_yaml import Node, Place

_NAMES = {"ms-swift": "swift", "ms_swift": "swift", "llama-factory": "llamafactory", "llama_factory": "llamafactory"}
_TYPICAL = {
    "llamafactory": "finetuning_type cutoff_len stage dataset_dir lora_target quantization_bit template val_size",
    "axolotl": "base_model sequence_len sample_packing micro_batch_size adapter val_set_size lora_target_linear datasets dataset_prepared_path",
    "swift": "tuner_type train_type split_dataset_ratio torch_dtype swift_version model loss_scale quant_bits target_modules",
    "trl": "dataset_name use_peft lora_r model_name_or_path dtype max_length assistant_only_loss",
}
"""Keys by which a file is told apart; the program with most of them it is."""
_NAMED = {"llamafactory": "LLaMA-Factory", "axolotl": "Axolotl", "swift": "ms-swift", "trl": "TRL"}
_FLAG_PROGRAMS = {
    "swift": "swift",
    "llamafactory-cli": "llamafactory",
    "lmf": "llamafactory",
    "trl": "trl",
    "axolotl": "axolotl",
    "xtuner": "xtuner",
}


@dataclass(frozen=True)
class Foreign:
    """A settings file of another program."""

    program: str
    """One of PROGRAMS."""
    how: str
    """By what it was told, for people."""
    settings: list[tuple[str, Node]]
    start: Place
    config: PythonConfig | None = None
    command: str = ""
    """The program's own command, such as `sft` or `pt`; "" where none is written."""
    started: list[tuple[str, Node]] = field(default_factory=list)
    """How it was started, apart from its own settings: variables, and what stands before the program's name."""


def read_foreign(path: Path, program: str = "") -> Foreign:
    """Reads a file, and tells whose it is by its content. `program` forces.

    Raises LaunchError when it cannot be told, RecipeError with the line of a syntax error.
    """
    forced = _NAMES.get(program.lower(), program.lower())
    if forced and forced not in PROGRAMS:
        raise LaunchError(f"--format {program}: there is no such format", f"One of: {', '.join(PROGRAMS)}.")
    text, start = read_text(path), start_of(path)
    if path.suffix == ".py":
        return _python(text, start, forced)
    if path.suffix in (".sh", ".bash", ".txt") or re.match(r"#!.*sh\b", text):
        return _script(text, start, forced)
    if path.suffix in (".yaml", ".yml", ".json"):
        root = read_json(text, start) if path.suffix == ".json" else read_yaml(text, start)
        return _mapping(root, start, forced)
    raise LaunchError(f"{path}: a config ends in .py, .yaml, .json or .sh", "Rename it after what it holds.")


def _python(text: str, start: Place, forced: str) -> Foreign:
    config = read_python(text, start)
    if forced not in ("", "xtuner"):
        raise LaunchError(f"{start.source} is Python; {forced} reads none", "Only XTuner's configs are Python.")
    if not forced and not {"model", "train_dataloader", "optim_wrapper"} & config.variables.keys():
        hint = "XTuner 0.1 configs assign model, train_dataloader and optim_wrapper. For XTuner V1, write a recipe: launch recipes list"
        raise LaunchError(f"{start.source} is no XTuner 0.1 config", hint)
    if config.inherits:
        names = ", ".join(dict.fromkeys(str(node.plain()) for node in config.inherits))
        hint = "Write the whole config into one file first: python -c \"from mmengine import Config; Config.fromfile('a.py').dump('b.py')\""
        raise RecipeError(
            [Problem(str(config.inherits[0].at), f"the config builds on others, which are not read: {names}", hint)]
        )
    return Foreign(
        "xtuner", "Python with model, train_dataloader and optim_wrapper", settings_of(config), start, config
    )


def _mapping(root: Node, start: Place, forced: str, command: str = "") -> Foreign:
    if not isinstance(root.value, dict):
        raise RecipeError(
            [Problem(str(root.at), "settings are made of `key: value` lines; here is a list or a text", "")]
        )
    program, how = (forced, "--format") if forced else _told_by(root.value, start)
    settings = flatten(root.value, program)
    started = [pair for key, node in settings if key in ("ENV", "env") for pair in _variables(node)]
    kept = [(key, node) for key, node in settings if key not in ("ENV", "env") or not isinstance(node.value, dict)]
    return Foreign(program, how, kept, start, None, command, started)


def _variables(node: Node) -> list[tuple[str, Node]]:
    return list(node.value.items()) if isinstance(node.value, dict) else []


def _told_by(keys: dict[str, Node], start: Place) -> tuple[str, str]:
    scores: list[tuple[float, str, list[str]]] = []
    for name, words in _TYPICAL.items():
        table = load_table(name)
        typical = [key for key in words.split() if key in keys]
        known = sum(table.knows(key) for key in keys)
        scores.append((len(typical) + 2 * known / max(len(keys), 1), name, typical))
    scores.sort(reverse=True)
    best = scores[0]
    if not best[2] or best[0] - scores[1][0] < 0.01:
        hint = "Name the program: --format " + "|".join(PROGRAMS)
        raise LaunchError(f"{start.source}: whose settings these are cannot be told from its keys", hint)
    return best[1], f"the keys {', '.join(best[2][:4])}"


def written_for(keys: Collection[str]) -> tuple[str, list[str]] | None:
    """(program, the keys that say so) of YAML that cannot be a recipe; None where fewer than two keys do. Pure."""
    if not {"method", "data"}.isdisjoint(keys):
        return None
    told = {program: [key for key in words.split() if key in keys] for program, words in _TYPICAL.items()}
    program = max(told, key=lambda name: len(told[name]))
    return (_NAMED[program], told[program]) if len(told[program]) > 1 else None


def flatten(root: dict[str, Node], program: str) -> list[tuple[str, Node]]:
    """Top-level keys, and those of every data set as `datasets[].key` (Axolotl, TRL)."""
    result = []
    for key, node in root.items():
        result.append((key, node))
        lists = ("datasets", "test_datasets", "pretraining_dataset") if program == "axolotl" else ("datasets",)
        if key not in lists or program not in ("axolotl", "trl"):
            continue
        for item in node.value if isinstance(node.value, list) else [node]:
            for inner, value in item.value.items() if isinstance(item.value, dict) else ():
                result.append((f"datasets[].{inner}", value))
                if inner == "type" and isinstance(value.value, dict):
                    result += [(f"datasets[].{name}", below) for name, below in value.value.items()]
    return result


def _script(text: str, start: Place, forced: str) -> Foreign:
    commands = read_commands(text, start)
    found = [(c, *told) for c in commands if (told := _program_of(c))]
    if not found:
        hint = "It needs a line such as `swift sft --model ...`, `llamafactory-cli train x.yaml`, `trl sft ...` or `xtuner train x.py`."
        raise LaunchError(f"{start.source}: no training command of a known program stands in it", hint)
    if len(found) > 1:
        lines = ", ".join(str(c.words[0].at.line) for c, _, _ in found)
        raise LaunchError(f"{start.source}: several training commands (lines {lines})", "Keep one of them in the file.")
    command, program, position = found[0]
    if forced and forced != program:
        raise LaunchError(f"{start.source} runs {load_table(program).program}, not {forced}", "Leave --format out.")
    words = command.words[position:]
    verb = str(words[0].value) if words and not str(words[0].value).startswith("-") else ""
    before = [w for w in command.words[: max(0, position - 1)] if str(w.value) not in ("python", "python3", "-m")]
    starter, _ = _flags(before)
    own = [(k, n) for k, n in starter if program == "trl" and load_table("trl").knows(k)]
    started = list(command.environment.items()) + [(f"--{k}", n) for k, n in starter if (k, n) not in own]
    flags, files = _flags(list(words[1:] if verb else words))
    named = [f for f in files if str(f.value).endswith((".yaml", ".yml", ".json", ".py"))]
    named += [node for key, node in flags if key == "config"]
    how = f"the command `{' '.join([str(command.words[position - 1].value), verb]).strip()}`"
    if program in ("xtuner", "axolotl") and not named:
        raise LaunchError(f"{start.source}: the command names no config file", "Import the config itself.")
    base = _named_file(named[0], program) if named else None
    own += [(k, n) for k, n in flags if k != "config"]
    if base is None:
        return Foreign(program, how, own, start, None, verb, started)
    if program == "xtuner":
        own = [(key, node) for key, node in own if key in ("deepspeed", "work_dir", "seed")]
    overridden = {key for key, _ in own}
    settings = [(k, n) for k, n in base.settings if k not in overridden] + own
    return dataclasses.replace(base, how=how, settings=settings, command=verb, started=base.started + started)


def _named_file(node: Node, program: str) -> Foreign:
    for path in (node.at.folder / str(node.value), Path.cwd() / str(node.value)):
        if path.is_file():
            return read_foreign(path, program)
    raise RecipeError(
        [Problem(str(node.at), f"the command reads {node.value}, which is not there", "Import that file itself.")]
    )


def _program_of(command: Command) -> tuple[str, int] | None:
    """(program, index of the first word after its name) of a training command."""
    for i, node in enumerate(command.words):
        name = Path(str(node.value)).name
        if name in _FLAG_PROGRAMS:
            verb = str(command.words[i + 1].value) if i + 1 < len(command.words) else ""
            return (
                (_FLAG_PROGRAMS[name], i + 1)
                if verb in ("sft", "pt", "train", "rlhf", "dpo", "grpo", "kto", "reward")
                else None
            )
        text = str(node.value)
        if re.search(r"swift/cli/(sft|pt)\.py$", text):
            return "swift", i + 1
        if re.search(r"trl/scripts/sft\.py$|(^|/)sft\.py$", text):
            return "trl", i + 1
        if text.endswith("src/train.py") or text.endswith("src/train_bash.py"):
            return "llamafactory", i + 1
        if name == "axolotl.cli.train":
            return "axolotl", i + 1
    return None


def _flags(words: Sequence[Node]) -> tuple[list[tuple[str, Node]], list[Node]]:
    """(--key value..., plain words). A flag without a value is on; several values are a list; key=value counts too."""
    flags: list[tuple[str, Node]] = []
    plain: list[Node] = []
    i = 0
    while i < len(words):
        text, at = str(words[i].value), words[i].at
        i += 1
        if not text.startswith("--"):
            key, equals, value = text.partition("=")
            if equals and re.fullmatch(r"\w+", key):
                flags.append((key, Node(scalar(value), at, at, value)))
            else:
                plain.append(words[i - 1])
            continue
        key, equals, value = text[2:].partition("=")
        values = [Node(scalar(value), at, at, value)] if equals else []
        while not equals and i < len(words) and not re.match(r"--?[A-Za-z]", str(words[i].value)):
            given = str(words[i].value)
            values.append(Node(scalar(given), words[i].at, words[i].at, given))
            i += 1
        one = values[0].value if len(values) == 1 else values if values else True
        flags.append((key.replace("-", "_"), Node(one, at, at, values[0].text if len(values) == 1 else "true")))
    return flags, plain
