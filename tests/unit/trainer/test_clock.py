"""Laps add up to the whole, and waits in collectives are a part of their own."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from trainer.clock import Clock

CPU = torch.device("cpu")


def test_parts_add_up_to_the_seconds() -> None:
    began = time.perf_counter()
    with Clock(CPU) as clock:
        for _ in range(2):
            time.sleep(0.02)
            clock.lap("forward")
            time.sleep(0.04)
            clock.lap("backward")
    wall = time.perf_counter() - began
    assert set(clock.parts) == {"forward", "backward", "communication"}
    parts = [seconds or 0.0 for seconds in clock.parts.values()]
    assert sum(parts) == pytest.approx(clock.seconds, rel=1e-9)
    assert 0.12 <= clock.seconds <= wall
    assert parts[0] >= 0.04
    assert parts[1] >= 0.08
    assert clock.parts["communication"] == 0.0


def test_a_wait_in_a_collective_is_taken_out_of_its_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    # The boundary: a collective that takes a while, as torch's own `Work.wait` does.
    monkeypatch.setattr(dist.Work, "wait", lambda work, *limit: time.sleep(0.05))
    before = dist.Work.wait
    with Clock(CPU) as clock:
        time.sleep(0.02)
        dist.Work.wait(None)  # type: ignore[arg-type]  # stands for an unfinished collective
        clock.lap("backward")
        dist.Work.wait(None)  # type: ignore[arg-type]
        clock.lap("optimizer")
    assert 0.02 <= (clock.parts["backward"] or 0) < 0.05
    assert (clock.parts["optimizer"] or 0) < 0.02
    assert (clock.parts["communication"] or 0) >= 0.1
    assert dist.Work.wait is before


def test_an_error_inside_the_block_leaves_torch_as_it_was() -> None:
    before = dist.Work.wait
    with pytest.raises(ZeroDivisionError), Clock(CPU):
        raise ZeroDivisionError
    assert dist.Work.wait is before
