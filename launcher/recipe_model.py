"""What can be said of a recipe's model before a download: whether it trains, and whether the recipe fits it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from .combinations import model_refusals
from .errors import LaunchError, Problem
from .known_models import nearest_models
from .model_facts import read_facts
from .model_layers import ModelFacts, lora_parameters
from .model_source import resolve_source
from .recipe import LoadedRecipe

_NEARLY = 0.8


@dataclass(frozen=True)
class ModelCheck:
    """Findings of `check_model`; without problems the recipe may be planned with this model."""

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def check_model(loaded: LoadedRecipe) -> ModelCheck:
    """Look at headers and tables only, as a plan does. Every problem has the place of the key that it is about."""
    recipe = loaded.recipe
    try:
        source = resolve_source(recipe.model.source, loaded.files[0].parent)
        facts = read_facts(source, recipe.model.revision)
    except LaunchError as e:
        return ModelCheck((_placed(loaded, Problem("model.source", e.message, e.hint)),), ())
    if facts is None:
        near = nearest_models(source.location, cutoff=_NEARLY) if source.kind in ("hub", "modelscope") else []
        meant = f"; known models of nearly this name: {', '.join(near)}" if near else ""
        return ModelCheck(
            (), (f"{source.display}: not known here, so nothing of it is checked before the download{meant}",)
        )
    problems = [*model_refusals(recipe, facts), *_targets(loaded, facts)]
    return ModelCheck(tuple(_placed(loaded, problem) for problem in problems), ())


def _targets(loaded: LoadedRecipe, facts: ModelFacts) -> list[Problem]:
    method = loaded.recipe.method
    if method.name == "full" or isinstance(method.targets, str):
        return []
    try:
        lora_parameters(facts, method.rank, tuple(method.targets))
    except LaunchError as e:
        return [Problem("method.targets", e.message.removeprefix("method.targets: "), e.hint)]
    return []


def _placed(loaded: LoadedRecipe, problem: Problem) -> Problem:
    origin = loaded.origins.get(problem.where)
    where = f"{origin}: {problem.where}" if origin else problem.where
    return Problem(where, problem.message.removeprefix(f"{problem.where} "), problem.hint)
