"""Loaded by every Python process that has this folder on PYTHONPATH: records what a Hugging Face Trainer is fed.

With $BENCH_TRACE set, one JSON line is appended to that file when training begins, after every optimizer step (with
tokens, supervised tokens and slots of each micro batch) and for every logged loss. Nothing of the program is changed.
It runs in other programs' environments, so it is of the standard library alone.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

PATCHED_MODULE = "transformers.trainer"
IGNORED = -100
"""Label of a token that is not learnt."""


def count_tokens(
    input_ids: list[list[int]], masks: list[list[int]] | None, labels: list[list[int]], pad_id: int | None
) -> tuple[int, int, int]:
    """(tokens, supervised tokens, slots) of one micro batch.

    `masks` is the two-dimensional attention mask, or None where there is none of that shape. Padding is what the mask
    leaves out, and the run of unlearnt pad tokens at the end of a row: programs that pack fill rows up with either.
    The first label of a row has no token before it to be predicted from.
    """
    tokens = supervised = slots = 0
    for i, ids in enumerate(input_ids):
        used = [at for at in range(len(ids)) if masks is None or masks[i][at]]
        while used and ids[used[-1]] == pad_id and labels[i][used[-1]] == IGNORED:
            used.pop()
        tokens += len(used)
        supervised += sum(label != IGNORED for label in labels[i][1:])
        slots += len(ids)
    return tokens, supervised, slots


class Recorder:
    """Collects the micro batches of a step and writes the trace."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.micro: list[tuple[int, int, int]] = []

    def write(self, event: str, **fields: Any) -> None:
        """Append one line."""
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")

    def feed(self, trainer: Any, inputs: dict[str, Any]) -> None:
        """Count the micro batch that is about to be trained on."""
        mask = inputs.get("attention_mask")
        tokenizer = getattr(trainer, "processing_class", None)
        counts = count_tokens(
            inputs["input_ids"].tolist(),
            mask.tolist() if mask is not None and mask.dim() == 2 else None,
            inputs["labels"].tolist(),
            getattr(tokenizer, "pad_token_id", None),
        )
        self.micro.append(counts)

    def step(self, number: int) -> None:
        """An optimizer step has been taken."""
        tokens, supervised, slots = (sum(column) for column in zip(*self.micro, strict=True))
        self.write("step", step=number, tokens=tokens, supervised=supervised, slots=slots)
        self.micro = []


def patch(trainer_module: ModuleType, recorder: Recorder) -> None:
    """Wrap the methods that every program on transformers' Trainer goes through, its subclasses included."""
    trainer = trainer_module.Trainer
    handler = sys.modules["transformers.trainer_callback"].CallbackHandler

    def before_micro_batch(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        recorder.feed(self, inputs)

    def on_train_begin(self: Any, args: Any, state: Any, control: Any) -> None:
        recorder.write("train_begin")

    def on_step_end(self: Any, args: Any, state: Any, control: Any) -> None:
        recorder.step(state.global_step)

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            recorder.write("loss", step=state.global_step, loss=float(logs["loss"]))

    _before(trainer, "training_step", before_micro_batch)
    _before(handler, "on_train_begin", on_train_begin)
    _before(handler, "on_step_end", on_step_end)
    _before(handler, "on_log", on_log)


def _before(owner: type, name: str, act: Callable[..., None]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)  # programs look at signatures
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds PATCHED_MODULE as Python would, and patches it once it has been executed."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """None for every other module."""
        if fullname != PATCHED_MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        loader = spec.loader if spec else None
        if loader is None:
            return None
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(module, self.recorder)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("BENCH_TRACE"):
    sys.meta_path.insert(0, PatchingFinder(Recorder(os.environ["BENCH_TRACE"])))
