"""Copying checkpoints to the storage beside training: one at a time, the newest first, by a thread of rank 0."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from .checkpoint_format import step_of
from .engine import Ranks
from .heartbeat import HEARTBEAT
from .metrics import event
from .saver import Saved, prune
from .spec import EXIT_RETRY, EXIT_USER, TrainError, TrainSpec
from .storage import Storage

RETRY_WAITS_S = (2.0, 10.0, 60.0)
LOOK_S = 0.5


class Copier:
    """On other ranks than 0, and without a storage, every method does nothing."""

    def __init__(self, spec: TrainSpec, ranks: Ranks) -> None:
        """Raises TrainError when the storage cannot be written to: not only `prepare` asks, which may run on another host."""
        self._spec = spec
        self._thread = ThreadPoolExecutor(1, "storage")
        self._work: list[Future[None]] = []
        """One for each offer; a bug of any of them ends the run in `finish`."""
        self._changed = threading.Condition()
        self._offered: Path | None = None
        self._copying: Path | None = None
        self._problem: TrainError | None = None
        """Why the checkpoint that was offered last is not there."""
        self._newest_step = 0
        self._is_awaited = False
        self._moved_s = time.monotonic()
        self._is_on = bool(spec.storage.url) and ranks.rank == 0
        if self._is_on:
            self._storage = Storage(spec.storage.url, self._moved)
            self._storage.probe()

    @property
    def copying(self) -> Path | None:
        """The checkpoint that is being copied: it must stay."""
        return self._copying

    def offer(self, checkpoint: Path | None) -> None:
        """Copy it next; one that was offered before and has not begun yet is left out."""
        if not self._is_on or checkpoint is None:
            return
        with self._changed:
            self._offered = checkpoint
            self._changed.notify_all()
        self._work.append(self._thread.submit(self._copy_offered))

    def saved(self, ended: list[Saved]) -> None:
        """Offer those of these saves that ended well."""
        for save in ended:
            if save.problem is None:
                self._newest_step = step_of(save.name) or 0
                self.offer(Path(self._spec.paths.checkpoints_dir) / save.name)

    def finish(self) -> None:
        """Wait for the newest one. Raises TrainError when it cannot be copied, or nothing has moved for `run.timeout_s`."""
        if not self._work:
            return
        HEARTBEAT.beat("copy to the storage", may_last=True)
        self._is_awaited = True
        self._moved()
        timeout_s = self._spec.parallel.timeout_s
        if waits_for := self._offered or self._copying:
            print(f"waiting until {waits_for.name} is copied to {self._spec.storage.url}", flush=True)
        while wait(self._work, LOOK_S).not_done:
            if time.monotonic() - self._moved_s > timeout_s:
                raise TrainError(
                    f"{self._spec.storage.url}: nothing has moved for {timeout_s} s",
                    "The checkpoints of the run folder are whole. run.timeout_s sets how long it may take.",
                    EXIT_RETRY,
                )
        for work in self._work:
            work.result()
        if self._problem:
            raise self._problem
        self._prune_what_was_spared()

    def _prune_what_was_spared(self) -> None:
        try:
            prune(Path(self._spec.paths.checkpoints_dir), self._newest_step, self._spec.checkpoint.keep)
        except OSError as e:
            print(f"WARNING: an old checkpoint cannot be removed: {e.strerror}", flush=True)

    def _moved(self) -> None:
        self._moved_s = time.monotonic()
        if self._is_awaited:
            # Not beside training: bytes that move there say nothing about a loop that may hang.
            HEARTBEAT.sign()

    def _copy_offered(self) -> None:
        with self._changed:
            if self._offered is None:
                return  # the offer before took this one along
            self._copying, self._offered = self._offered, None
        try:
            self._problem = self._copy(self._copying)
        finally:
            self._copying = None

    def _copy(self, checkpoint: Path) -> TrainError | None:
        """Tries again what may pass, until a newer one is offered."""
        for wait_s in (*RETRY_WAITS_S, None):
            began = time.perf_counter()
            try:
                is_new = self._storage.put_checkpoint(
                    checkpoint, self._spec.checkpoint.keep, map(Path, self._spec.storage.beside)
                )
            except FileNotFoundError:
                return None  # it was pruned between the offer and the beginning: a newer one follows
            except TrainError as e:
                self._say_failed(checkpoint, e)
                if e.exit_code == EXIT_USER or wait_s is None or self._is_superseded(wait_s):
                    return e
            else:
                if is_new:
                    self._say_copied(checkpoint, time.perf_counter() - began)
                return None
        raise AssertionError("the last wait ends the loop")

    def _is_superseded(self, wait_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._offered is not None, wait_s)

    def _say_copied(self, checkpoint: Path, seconds: float) -> None:
        print(f"copied {checkpoint.name} to {self._spec.storage.url} in {seconds:.2f} s", flush=True)
        event(
            self._spec.paths.events,
            "checkpoint_copied",
            checkpoint=checkpoint.name,
            storage=self._spec.storage.url,
            seconds=round(seconds, 3),
        )

    def _say_failed(self, checkpoint: Path, problem: TrainError) -> None:
        print(f"WARNING: {checkpoint.name} is not copied: {problem}", flush=True)
        event(self._spec.paths.events, "checkpoint_not_copied", checkpoint=checkpoint.name, problem=problem.message)
