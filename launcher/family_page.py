"""The known families and models for people: docs/families.md, and the lines of `launch recipes list PATTERN`."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator

from .attention_kinds import FULL, SLIDING
from .known_models import KnownModel, known_models
from .model_facts import facts_of_known
from .model_families import FAMILIES, Family, Refusal, refusals_of
from .model_layers import ModelFacts
from .sequence_parallel import sizes_of_heads

_MAX_LISTED = 12
_MAX_SP = 16

_HEAD = """# Models

What is known here before anything is downloaded, so that `launch recipes new`, `launch recipes check` and `launch plan` work
offline: the sizes of {count} published models. A model that is not listed works too, if its family does: its config.json is read
once it is on this disk. This page is generated from `launcher/model_families.py` and `launcher/known_models.csv` by
`python -m launcher.recipe_docs`; tests compare the layers with transformers' own code, and the parameter counts with the published
ones.

`launch recipes new --model MODEL --method qlora --data my.jsonl` writes a recipe for any of them that trains.

## Families

*chat format*: a model's own chat template is always used first; the name is that of the same format among other tools' templates.
*LoRA targets*: what carries an adapter in a new recipe: all linear layers of a decoder layer; where there are experts, those of the
attention and, if they can be named, of the shared expert. *attention*: full unless said otherwise.

"""
_REFUSED_HEAD = """## Families that are not trained

`launch recipes check` and `launch plan` say the same, with exit code 2, before anything is downloaded.

"""
_SIZES_HEAD = """## Sizes

Parameters as published; heads as query heads / key and value heads; *sp* are the numbers of devices that can share a row (up to {max_sp});
*source*: where the sizes and the count were read, see the head of `launcher/known_models.csv`.

"""


def family_page() -> str:
    """docs/families.md."""
    rows, refused = [], []
    for family in FAMILIES.values():
        facts = facts_of_known(_models_of(family)[0])
        refusals = refusals_of(facts)
        if refusals:
            instead = " ".join(dict.fromkeys(r.instead.replace("\n", " ") for r in refusals))
            refused.append([family.title, f"`{family.model_type}`", "; ".join(r.reason for r in refusals), instead])
        rows.append(_family_row(family, facts, bool(refusals)))
    head = ["family", "model_type", "trains", "example", "chat format", "LoRA targets", "attention", "to know"]
    parts = [_HEAD.format(count=len(known_models())), _table(head, rows)]
    parts += [_REFUSED_HEAD, _table(["family", "model_type", "why", "instead"], refused)]
    head = [
        "models",
        "parameters",
        "layers",
        "heads",
        "head size",
        "hidden",
        "MLP",
        "vocabulary",
        "positions",
        "sp",
        "source",
    ]
    parts += [_SIZES_HEAD.format(max_sp=_MAX_SP), _table(head, [_size_row(model) for model in _sizes()])]
    return "".join(parts)


def listed_models(pattern: str) -> list[str]:
    """Lines on the known models whose name or family holds `pattern`; one line on all of them without one."""
    if not pattern:
        return [f"and {len(known_models())} known models of {len(FAMILIES)} families: launch recipes list PATTERN"]
    wanted = pattern.lower() if re.search(r"[*?\[]", pattern) else f"*{pattern.lower()}*"
    found = [
        model
        for model in known_models()
        if any(
            fnmatch.fnmatchcase(text.lower(), wanted)
            for text in (model.model_id, model.family.title, model.family.name)
        )
    ]
    sizes = list({model.names: model for model in found}.values())
    lines = [_listed(model) for model in sizes[:_MAX_LISTED]]
    if len(sizes) > _MAX_LISTED:
        lines.append(f"and {len(sizes) - _MAX_LISTED} more sizes: launch recipes list with more of the name")
    trained = [model for model in found if not _refusals(model)]
    if trained:
        start = next((model for model in trained if model.is_chat), trained[0])
        lines.append(f"start with one: launch recipes new --model {start.model_id} --method qlora --data my.jsonl")
    reasons = {r.reason: r.instead for model in found for r in _refusals(model)}
    for reason, instead in reasons.items():
        lines += [f"not trained: {reason}", *(f"    {line}" for line in instead.splitlines())]
    return lines


def _listed(model: KnownModel) -> str:
    trained = "" if not _refusals(model) else "; not trained, see below"
    names = ", ".join(model.names.split())
    return f"model {names}: {model.num_parameters / 1e9:.3g} B parameters, {model.family.title}{trained}"


def _refusals(model: KnownModel) -> list[Refusal]:
    return refusals_of(facts_of_known(model))


def _models_of(family: Family) -> list[KnownModel]:
    return [model for model in known_models() if model.family is family]


def _sizes() -> Iterator[KnownModel]:
    """The first model of each line of the table."""
    seen = set()
    for model in known_models():
        if model.names not in seen:
            seen.add(model.names)
            yield model


def _family_row(family: Family, facts: ModelFacts, refused: bool) -> list[str]:
    targets = ", ".join(f"`{name}`" for name in family.targets)
    template = f"`{family.template}`" if family.template else "its own"
    trains, example = "no" if refused else "yes", f"`{family.example}`"
    return [
        family.title,
        f"`{family.model_type}`",
        trains,
        example,
        template,
        targets,
        _attention(family, facts),
        family.note,
    ]


def _attention(family: Family, facts: ModelFacts) -> str:
    """Kinds other than a window, then the windows that are shorter than the model's positions."""
    every = [facts_of_known(model) for model in _models_of(family)]
    windows = {f.sliding_window for f in every if f.sliding_window and f.sliding_window < f.max_positions}
    kinds = [kind for kind in facts.attention if kind != SLIDING] or ([] if windows else [FULL])
    some = "in some sizes " if any(not f.sliding_window for f in every) and windows else ""
    text = f"{some}a window of {' or '.join(str(w) for w in sorted(windows))} tokens"
    return ", ".join([*kinds, *([text] if windows else [])])


def _size_row(model: KnownModel) -> list[str]:
    facts = facts_of_known(model)
    sizes = ", ".join(str(n) for n in sizes_of_heads(facts, _MAX_SP)[1:]) or "1 only"
    width = f"{facts.num_experts} x {facts.intermediate_size}" if facts.num_experts else str(facts.intermediate_size)
    names = ", ".join(f"`{name}`" for name in model.names.split())
    heads = f"{facts.num_heads} / {facts.num_kv_heads}"
    numbers = [facts.num_layers, heads, facts.head_dim, facts.hidden_size, width, facts.vocab_size, facts.max_positions]
    return [names, f"{model.num_parameters / 1e9:.3g} B", *(str(n) for n in numbers), sizes, model.source]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
