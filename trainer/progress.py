"""What one optimizer step did, and what a resumed run must know of all steps before it."""

from __future__ import annotations

from dataclasses import dataclass

from .data import rows_per_step
from .spec import TrainError, TrainSpec


@dataclass
class Step:
    """What one optimizer step did; numbers are over all ranks, times are this rank's."""

    loss: float
    tokens: int
    supervised_tokens: int
    grad_norm: float
    skipped: bool
    """Its update was left out, because the fp16 gradient overflowed."""
    loss_scale: float | None
    """Of the next step; None but for fp16."""
    stop_requested: bool
    memory_gb: float
    """Peak so far of the process that has the highest, in 2**30 bytes."""
    seconds: float
    seconds_parts: dict[str, float | None]
    """Adds up to `seconds`; see `clock.Clock`."""


@dataclass
class Progress:
    """All that a resumed run must know beside weights and optimizer; it is the manifest's `state`."""

    step: int = 0
    rows_consumed: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    skipped_steps: int = 0
    """Of `step`, those that changed no weight."""

    def state(self) -> dict[str, int]:
        return dict(vars(self))

    def advance(self, step: Step, spec: TrainSpec) -> None:
        self.step += 1
        self.rows_consumed += rows_per_step(spec.optim, spec.parallel.dp)
        self.tokens += step.tokens
        self.supervised_tokens += step.supervised_tokens
        self.skipped_steps += step.skipped

    @classmethod
    def of(cls, state: dict[str, int], spec: TrainSpec) -> Progress:
        """Raises TrainError when another global batch would repeat or skip rows."""
        # Checkpoints of the first version have no count of skipped steps.
        known = {"skipped_steps": 0, **state}
        progress = cls(**{key: known[key] for key in vars(cls())})
        batch = rows_per_step(spec.optim, spec.parallel.dp)
        if progress.rows_consumed != progress.step * batch:
            raise TrainError(
                f"the checkpoint has seen {progress.rows_consumed} rows in {progress.step} steps, "
                f"which is not a global batch of {batch}",
                f"Resume on devices that keep a global batch of {progress.rows_consumed // max(progress.step, 1)} rows: "
                "as many as before, or a divisor of it together with train.global_batch in the recipe.",
            )
        return progress
