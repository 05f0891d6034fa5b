"""Errors that a user can act on: what is wrong, where, what is allowed, what to do. Shown without a traceback."""

from __future__ import annotations

import re
from dataclasses import dataclass


class LaunchError(Exception):
    """Base of every user-facing error of the launcher. `exit_code` is 2 unless retrying may help (75)."""

    def __init__(self, message: str, hint: str = "", exit_code: int = 2) -> None:
        super().__init__(message, hint, exit_code)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe or plan, ready to be printed on two or three lines."""

    where: str
    """"recipes/q.yaml:14:3", "--set train.epochs=x" or "--gpus 0,0"."""
    message: str
    hint: str = ""
    change: str = ""
    """YAML lines of a recipe with which it works, the nearest ones."""
    source: str = ""
    """Where the reason can be checked."""

    def explained(self) -> list[str]:
        """The lines below the message: what to do, the YAML lines, the source."""
        lines = self.hint.splitlines()
        if self.change:
            lines += ["Nearest that works:", *(f"    {line}" for line in self.change.splitlines())]
        return [*lines, f"Source: {self.source}"] if self.source else lines


def _position(problem: Problem) -> list[tuple[int, str]]:
    """Sort key under which line 2 comes before line 12."""
    parts = re.split(r"(\d+)", problem.where)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts] + [(-1, problem.message)]


class RecipeError(LaunchError):
    """All mistakes of a recipe at once."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(set(problems), key=_position)
        lines = []
        for p in self.problems:
            lines.append(f"{p.where}: {p.message}")
            lines.extend(f"    {line}" for line in p.explained())
        super().__init__("\n".join(lines))


class PlanError(LaunchError):
    """The recipe is well-formed but cannot run on these devices; lists every conflict."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        lines = []
        for p in problems:
            lines.append(f"{p.where}: {p.message}")
            lines.extend(f"    {line}" for line in p.explained())
        super().__init__("\n".join(lines))
