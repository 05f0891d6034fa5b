"""Settings that are fine one by one and contradict each other. Each message names the places of both."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from .combinations import on_or_off, one_or_many, quantisation_of, refusal
from .compatibility import broken
from .compatibility_table import AXES, Axis
from .recipe_fields import fields, readable
from .recipe_layers import METHOD_KEYS_WITHOUT_USE, Findings, get
from .recipe_yaml import Node


def check_contradictions(tree: Node, found: Findings) -> None:
    """Adds a problem for each contradiction among values that are valid by themselves."""
    for check in (_check_length, _check_batch, _check_method, _check_combinations, _check_revision, _check_betas):
        check(tree, found)
    _check_prompts(tree, found)
    _check_samples(tree, found)
    _check_held_out(tree, found)
    _check_sources(tree, found)


def _given(tree: Node, path: str, found: Findings) -> Node | None:
    """The node, when it was written and is valid by itself."""
    return None if found.is_bad(path) else get(tree, path)


def _value(tree: Node, path: str, found: Findings) -> Any:
    """The value as written, else its default; None when it is invalid."""
    if found.is_bad(path):
        return None
    node = get(tree, path)
    return fields()[path].default if node is None else node.value


def _check_length(tree: Node, found: Findings) -> None:
    epochs, steps = _given(tree, "train.epochs", found), _given(tree, "train.max_steps", found)
    if epochs and steps:
        message = f"train.max_steps contradicts train.epochs ({epochs.key_at}): only one can end the training"
        found.add(steps.key_at, message, "Remove one of the two.")


def _check_batch(tree: Node, found: Findings) -> None:
    total = _given(tree, "train.global_batch", found)
    micro, accumulate = (_value(tree, f"train.{k}", found) for k in ("micro_batch", "accumulate"))
    if not total or micro is None:
        return
    step = micro * (accumulate or 1)
    if total.value % step == 0:
        return
    parts, places = f"micro_batch {micro}", []
    if accumulate:
        parts += f" x accumulate {accumulate}"
    for key in ("micro_batch", "accumulate"):
        node = get(tree, f"train.{key}")
        if node:
            places.append(str(node.key_at))
    where = f" ({', '.join(places)})" if places else ""
    message = f"train.global_batch {total.value} cannot be made of {parts}{where}: {total.value} / {step} is not whole"
    lower = total.value // step * step
    near = f"{lower} or {lower + step}" if lower else str(step)
    hint = f"Write global_batch: {near}" + (", or leave accumulate out: it is derived." if accumulate else "")
    found.add(total.at, message, hint)


def _check_method(tree: Node, found: Findings) -> None:
    name = _given(tree, "method.name", found)
    for key in METHOD_KEYS_WITHOUT_USE.get(str(name.value), ()) if name else ():
        node = get(tree, f"method.{key}")
        if name and node:
            use = "qlora" if key == "double_quant" else "lora and qlora"
            message = f"method.{key} has no meaning for {name.value} ({name.at}); it belongs to {use}"
            found.add(node.key_at, message, "Remove the line, or change the method.")


def _check_combinations(tree: Node, found: Findings) -> None:
    """Keys that the table of combinations does not allow together, whatever the devices are."""
    nodes, choice = written_choice(tree, found)
    for rule in broken(choice):
        if not rule.contradiction:
            continue
        axis = next(axis for axis in rule.when if AXES[axis].key == rule.key)
        others = [
            f"{AXES[a].key} is {choice[a]} ({nodes[a].at if a in nodes else 'the default'})"
            for a in rule.when
            if a != axis
        ]
        problem = refusal(rule, choice)
        message = f"{rule.key} {problem.message.partition(':')[0]}; {', '.join(others)}"
        found.problems.append(replace(problem, where=str(nodes[axis].at), message=message))


def written_choice(tree: Node, found: Findings) -> tuple[dict[str, Node], dict[str, str]]:
    """(node of each axis of the table that the recipe writes, value of each that it decides, defaults included)."""
    nodes: dict[str, Node] = {}
    choice: dict[str, str] = {}
    for axis in AXES.values():
        value = _value(tree, axis.key, found) if axis.key else None
        if value in (None, "auto"):
            continue
        if node := get(tree, axis.key):
            nodes[axis.name] = node
        choice[axis.name] = _word(axis, value)
    if choice.get("method") not in (None, "qlora"):
        choice["quantisation"] = "none"
    return nodes, {axis: word for axis, word in choice.items() if word in AXES[axis].values}


def _word(axis: Axis, value: Any) -> str:
    """A value of a recipe as the table says it."""
    if axis.name == "quantisation":
        return quantisation_of("qlora", bool(value))
    if axis.name == "sp":
        return one_or_many(value)
    return on_or_off(value) if axis.values == ("off", "on") else str(value)


def _check_revision(tree: Node, found: Findings) -> None:
    revision, source = _given(tree, "model.revision", found), _given(tree, "model.source", found)
    if not (revision and source):
        return
    text = str(source.value)
    if text.startswith("/") or ":" in text:
        message = f"model.revision is for models of the Hub; {source.text} ({source.at}) is none"
        found.add(revision.key_at, message, "Remove the line.")


def _check_betas(tree: Node, found: Findings) -> None:
    betas = _given(tree, "train.betas", found)
    for i, beta in enumerate(betas.value if betas else ()):
        if not 0 <= beta.value < 1:
            message = f"{readable(f'train.betas.{i}')}: {beta.text}; expected a number, 0 or more and less than 1"
            found.add(beta.at, message, "Usual values: [0.9, 0.999]")


def _check_prompts(tree: Node, found: Findings) -> None:
    strict, prompts = _given(tree, "evaluate.strict", found), get(tree, "evaluate.prompts")
    expects = found.is_bad("evaluate.prompts")  # a prompt with a mistake may have meant to expect something
    for i, prompt in enumerate(prompts.value if prompts else ()):
        path = f"evaluate.prompts.{i}"
        if not isinstance(prompt.value, dict):
            continue
        expects = expects or any(prompt.value[k].value for k in ("contains", "regex", "language") if k in prompt.value)
        regex = _given(tree, f"{path}.regex", found)
        if regex:
            try:
                re.compile(regex.value)
            except re.error as e:
                message = f"{readable(f'{path}.regex')}: not a regular expression: {e}"
                found.add(regex.at, message, "Put it in 'single quotes', and a backslash before a literal ( [ + * ? .")
    if strict and strict.value and not expects:
        where = f" ({prompts.key_at})" if prompts else ""
        message = f"evaluate.strict has nothing to check: no prompt{where} says what its answer must be"
        found.add(strict.key_at, message, "Give a prompt `contains: [...]`, `regex:` or `language:`; or remove strict.")


def _check_samples(tree: Node, found: Findings) -> None:
    every, count = (_given(tree, f"evaluate.{k}", found) for k in ("samples_every_steps", "num_samples"))
    prompts = get(tree, "evaluate.prompts")
    if every and every.value and not (prompts and prompts.value):
        hint = 'Add questions: prompts: ["Who are you?"]'
        found.add(every.key_at, "evaluate.samples_every_steps has no evaluate.prompts to ask", hint)
    if count and not (every and every.value) and not found.is_bad("evaluate.samples_every_steps"):
        message = "evaluate.num_samples has no effect: evaluate.samples_every_steps is 0"
        found.add(count.key_at, message, "Add samples_every_steps: 50, or remove the line.")


def _check_held_out(tree: Node, found: Findings) -> None:
    share, files = (_given(tree, f"data.{k}", found) for k in ("held_out", "held_out_files"))
    every = _given(tree, "evaluate.loss_every_steps", found)
    if share and share.value and files and files.value:
        message = f"data.held_out_files contradicts data.held_out ({share.key_at}): rows are held out in one way"
        found.add(files.key_at, message, "Remove one of the two.")
    holds_out = any(found.is_bad(f"data.{k}") for k in ("held_out", "held_out_files"))
    if every and not (holds_out or (share and share.value) or (files and files.value)):
        message = "evaluate.loss_every_steps has no effect: no rows are held out"
        found.add(every.key_at, message, "Add under data: held_out: 0.05 (a share of the rows); or remove the line.")
    trained = _given(tree, "data.files", found)
    own = {item.value["path"].value: item for item in (trained.value if trained else ()) if "path" in item.value}
    for item in files.value if files else ():
        path = item.value.get("path")
        if path and path.value in own:
            message = f"{path.text} is trained on too ({own[path.value].at}): its loss would say nothing about new rows"
            found.add(path.at, message, "Hold out another file, or a share: held_out: 0.05")


def _check_sources(tree: Node, found: Findings) -> None:
    for key in ("files", "held_out_files"):
        files = get(tree, f"data.{key}")
        for i, item in enumerate(files.value if files and isinstance(files.value, list) else ()):
            if isinstance(item.value, dict) and not found.is_bad(f"data.{key}.{i}"):
                _check_source(key, item.value, found)


def _check_source(key: str, source: dict[str, Node], found: Findings) -> None:
    weight, columns, tags, format = (source.get(name) for name in ("weight", "columns", "tags", "format"))
    if weight and key == "held_out_files":
        message = "a weight has no meaning for held-out rows: each counts once"
        found.add(weight.key_at, message, "Remove the line.")
    named = [name for name, node in (("columns", columns), ("tags", tags)) if node]
    if format and format.value in ("conversation", "ids", "text") and named:
        message = f"{named[0]} has no meaning for format {format.value} ({format.at})"
        found.add((columns or tags or format).key_at, message, f"Remove {named[0]}, or the format: rows then say it.")
    if columns and isinstance(columns.value, dict):
        asks = [name for name in ("prompt", "query", "messages") if name in columns.value]
        if not asks:
            message = "columns names neither prompt, query nor messages: rows would have nothing to say"
            found.add(columns.key_at, message, "Write columns: {prompt: NAME, response: NAME}, or {messages: NAME}")
        elif "messages" in asks and len(asks) > 1:
            message = f"columns names both messages and {asks[0]}: a row is one or the other"
            found.add(columns.value[asks[0]].key_at, message, "Remove one of the two.")
