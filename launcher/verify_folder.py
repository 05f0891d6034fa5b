"""What the checks of `launch verify` share: their folder, their runs, and their exit code."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from .run_dir import RunDir

EXIT_DIFFERS = 1
"""Two ways of computing gave different things. Neither a mistake in the recipe (2) nor a crash (70)."""


@dataclass(frozen=True)
class VerifyDir:
    """The folder of one comparison: a run folder for each layout, and the result."""

    root: Path

    @property
    def result(self) -> Path:
        return self.root / "verify.json"

    def layout(self, number: int) -> RunDir:
        """Run folder of a layout; number 0 is the plan's own."""
        return RunDir(self.root / ("plan" if number == 0 else f"reference_{number}"))

    def probe(self, number: int) -> Path:
        return self.layout(number).root / "probe"


def run_quietly(run: RunDir, as_json: bool) -> int:
    """Run the stages of a written run folder; with `as_json` the progress goes to stderr. Returns the exit code."""
    from .progress import Progress
    from .supervise import supervise

    return supervise(run, 1, frozenset(), Progress(run, sys.stderr if as_json else sys.stdout))
