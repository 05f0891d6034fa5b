"""`--hosts`: which hosts carry a run, which of their devices, and whether they fit together."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.inventory import Selection, cpu_selection, select
from cluster.job import ClusterError, Meeting
from cluster.nodes import Node
from cluster.preflight import SHARED_HINT, HostReport, Questions, compare, survey

from .errors import LaunchError, PlanError, Problem, RecipeError
from .recipe_yaml import Node as YamlNode
from .recipe_yaml import parse_file

_KEYS = {"host": str, "gpus": str, "cpu": int, "python": str}
_FORM = "Write NAME, NAME:0,1, NAME:all, NAME:free:2, NAME:GPU-..., NAME:cpu:2, or give a file: --hosts hosts.yaml"
_NAME = re.compile(r"(?:[^@\s:\[\]-][^@\s:\[\]]*@)?(?:[^@\s:\[\]-][^@\s:\[\]]*|\[[0-9A-Fa-f:]+\])")


@dataclass(frozen=True)
class HostChoice:
    """One host as a person named it."""

    host: str
    """An ssh destination: a name of ~/.ssh/config, or [user@]address."""
    gpus: str | None
    """A selector as of --gpus; None: every free one."""
    cpu: int | None
    """This many processes on its CPU."""
    python: str = ""
    """Its Python; "": the same path as here."""


def parse_hosts(values: tuple[str, ...], gpus: str | None, cpu: int | None) -> tuple[HostChoice, ...]:
    """`--hosts a:0,1 --hosts b` or `--hosts hosts.yaml`. `gpus` and `cpu` are for hosts that name no device of their own.

    Raises LaunchError for what is no host, and for one that is named twice.
    """
    choices: list[HostChoice] = []
    for value in values:
        found = _of_file(Path(value)) if value.endswith((".yaml", ".yml")) else [_of_flag(value)]
        choices += found
    names = [choice.host for choice in choices]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LaunchError(
            f"--hosts: {', '.join(twice)} is named more than once", "Name its devices together: a:0,1 is two processes."
        )
    return tuple(
        dataclasses.replace(choice, gpus=gpus, cpu=cpu) if choice.gpus is None and choice.cpu is None else choice
        for choice in choices
    )


def _of_flag(text: str) -> HostChoice:
    match = _NAME.match(text)
    rest = text[match.end() :] if match else ""
    if match is None or (rest and not rest.startswith(":")) or rest == ":":
        raise LaunchError(f"--hosts {text!r} is no host", _FORM)
    devices = rest[1:]
    if devices == "cpu" or devices.startswith("cpu:"):
        number = devices[4:] or "1"
        if devices == "cpu:" or not number.isdecimal() or int(number) < 1:
            raise LaunchError(f"--hosts {text!r}: {devices[4:]!r} is no number of processes", _FORM)
        return HostChoice(match[0], None, int(number))
    return HostChoice(match[0], devices or None, None)


def _of_file(path: Path) -> list[HostChoice]:
    """hosts.yaml: `hosts:` with a list of names or of {host, gpus | cpu, python}. Raises RecipeError with every mistake."""
    node, problems = parse_file(path)
    if node is None:
        raise RecipeError(problems)
    for key, value in node.value.items():
        if key != "hosts":
            problems.append(Problem(str(value.key_at), f"unknown key {key!r}", "The only key here is `hosts`."))
    listed = node.value.get("hosts")
    if listed is None or not isinstance(listed.value, list) or not listed.value:
        at = listed.at if listed is not None else node.at
        problems.append(Problem(str(at), "`hosts` must be a list of hosts", 'hosts:\n  - {host: a, gpus: "0,1"}'))
        raise RecipeError(problems)
    choices = [_of_item(item, problems) for item in listed.value]
    if problems:
        raise RecipeError(problems)
    return choices


def _of_item(item: YamlNode, problems: list[Problem]) -> HostChoice:
    if isinstance(item.value, str):
        try:
            return _of_flag(item.value)
        except LaunchError as e:
            problems.append(Problem(str(item.at), e.message.removeprefix("--hosts "), e.hint))
            return HostChoice("", None, None)
    values: dict[str, Any] = {}
    if not isinstance(item.value, dict):
        problems.append(Problem(str(item.at), f"{item.text!r} is no host", _FORM))
        return HostChoice("", None, None)
    for key, value in item.value.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            problems.append(Problem(str(value.key_at), f"unknown key {key!r}", f"{meant}Allowed: {', '.join(_KEYS)}"))
            continue
        # `gpus: 0` is a number in YAML, and a list of one device here.
        given = value.text if key == "gpus" and isinstance(value.value, int) else value.value
        if not isinstance(given, _KEYS[key]) or isinstance(given, bool) or given in ("", 0):
            problems.append(Problem(str(value.at), f"{key} cannot be {value.text or value.plain()!r}", _FORM))
            continue
        values[key] = given
    if "host" not in values:
        problems.append(Problem(str(item.at), "`host` is missing", _FORM))
    elif not _NAME.fullmatch(values["host"]):
        problems.append(Problem(str(item.value["host"].at), f"{values['host']!r} is no host", _FORM))
    if "gpus" in values and "cpu" in values:
        problems.append(Problem(str(item.at), "gpus and cpu contradict each other", "Give one of them."))
    return HostChoice(values.get("host", ""), values.get("gpus"), values.get("cpu"), values.get("python", ""))


def questions_for(shared: dict[str, str], files: tuple[str, ...], packages: tuple[str, ...]) -> Questions:
    """What all hosts must agree on. `shared`: folder -> what to do when the hosts do not share it."""
    hints = {folder: f"{hint}\n{SHARED_HINT}." for folder, hint in shared.items()}
    return Questions(packages, hints, files)


def shared_folders(run_root: Path, cache: Path, kind: str) -> dict[str, str]:
    """Folders that every host of a run reads what another one wrote, each with the way to choose another one."""
    folders = {
        str(run_root.parent): "The run folder must be shared: --run-dir, or run.dir in the recipe.",
        str(cache): "The cache of tokens and converted models must be shared: set TUNELAUNCH_CACHE.",
    }
    if kind == "hub":
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").absolute()
        folders[str(hub)] = "The cache of downloaded models must be shared: set HF_HOME."
    return folders


def gather(
    choices: tuple[HostChoice, ...], questions: Questions, meeting: Meeting
) -> tuple[tuple[Node, ...], tuple[HostReport, ...]]:
    """Ask all hosts at once, and choose their devices. Raises PlanError with everything that does not fit, host by host."""
    hosts = [(choice.host, choice.python or sys.executable) for choice in choices]
    reports = survey(hosts, questions, meeting.silence_s, meeting.wait_s)
    problems = [Problem(f"--hosts {f.host}", f.message, f.hint) for f in compare(reports, questions)]
    nodes = []
    for choice, report in zip(choices, reports, strict=True):
        try:
            nodes.append(Node(choice.host, _select(choice, report), choice.python))
        except ClusterError as e:
            problems.append(Problem(f"--hosts {choice.host}", e.message, e.hint))
    if problems:
        raise PlanError(problems)
    return tuple(nodes), reports


def _select(choice: HostChoice, report: HostReport) -> Selection:
    if choice.cpu is not None:
        return cpu_selection(choice.cpu, report.inventory)
    return select(report.inventory, choice.gpus, {})
