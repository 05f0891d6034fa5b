"""Where the time of an optimizer step goes: laps between named points, and apart from them the waits for other ranks."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist


class Clock:
    """Splits the time inside a `with` block into parts that add up to `seconds`; both are there once the block ends.

    On CPU a collective is done when `Work.wait` returns, and torch calls that for synchronous ones too: the seconds
    inside it are the part "communication", taken out of the lap they fell into. They hold the transfer and the wait for
    the slowest rank. On CUDA laps are events on the compute stream, read after the block, so they cost no
    synchronisation; there collectives overlap with computing, and "communication" is None: what of it the computing had
    to wait for is in its lap, and a profile shows the rest. At most one clock runs at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.parts: dict[str, float | None] = {}
        self._laps: list[tuple[str, float]] = []
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._waits = self._waited = 0.0
        """Seconds inside collectives: up to the last lap, and since."""
        self._wait: Any = None

    def __enter__(self) -> Clock:
        self._began = self._last = time.perf_counter()
        if self.device.type == "cuda":
            self._record("")
        else:
            self._wait = dist.Work.wait
            setattr(dist.Work, "wait", self._timed(self._wait))  # noqa: B010  # the class is compiled
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wait is not None:
            setattr(dist.Work, "wait", self._wait)  # noqa: B010
            self.seconds = self._last - self._began
            self.parts = {**_sums(self._laps), "communication": self._waits}
        elif kind is None:
            self._events[-1][1].synchronize()
            self.seconds = time.perf_counter() - self._began
            marks = zip(self._events, self._events[1:], strict=False)
            self.parts = {
                **_sums([(name, before.elapsed_time(mark) / 1000) for (_, before), (name, mark) in marks]),
                "communication": None,
            }

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`. A block ends with one: what comes after it is not counted."""
        if self.device.type == "cuda":
            self._record(name)
            return
        now = time.perf_counter()
        waited, self._waited = self._waited, 0.0
        self._laps.append((name, now - self._last - waited))
        self._waits += waited
        self._last = now

    def _record(self, name: str) -> None:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        self._events.append((name, mark))

    def _timed(self, wait: Any) -> Any:
        def timed(work: dist.Work, *limit: Any) -> bool:
            began = time.perf_counter()
            try:
                return wait(work, *limit)
            finally:
                self._waited += time.perf_counter() - began

        return timed


def _sums(laps: list[tuple[str, float]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for name, seconds in laps:
        totals[name] = totals.get(name, 0.0) + seconds
    return totals
