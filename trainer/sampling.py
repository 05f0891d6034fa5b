"""Answers to the first prompts while training goes on, with the run's own template and system prompt."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .engine import Ranks
from .generate import Prompter, generate_answers, load_prompter
from .heartbeat import HEARTBEAT
from .metrics import append_line
from .model import PackedLanguageModel
from .sequence_parallel import whole_rows
from .spec import Prepared, TrainSpec


class Sampler:
    """Writes samples.jsonl. Does nothing, and loads nothing, when `evaluate.samples_every_steps` is 0."""

    def __init__(self, spec: TrainSpec, prepared: Prepared, ranks: Ranks) -> None:
        self.spec, self.model_dir, self.ranks = spec, prepared.model_dir, ranks
        self.prompts = spec.evaluate.prompts[: spec.evaluate.num_samples]
        self.enabled = spec.evaluate.samples_every_steps > 0 and bool(self.prompts)
        self.prompter: Prompter | None = None

    def answer(self, model: PackedLanguageModel, step: int) -> None:
        """Rank 0 answers one prompt at a time; the others wait. Collective: every rank must call."""
        if not self.enabled:
            return
        HEARTBEAT.beat("sample answers", step, may_last=True)
        if self.ranks.rank == 0:
            self._answer(model, step)
        dist.barrier()

    def _answer(self, model: PackedLanguageModel, step: int) -> None:
        if self.prompter is None:
            data, model_spec = self.spec.data, self.spec.model
            self.prompter = load_prompter(self.model_dir, data.template, model_spec.trust_remote_code)
        random_state = torch.get_rng_state()
        model.eval()
        with whole_rows(model.base):
            self._answer_all(model, self.prompter, step)
        model.train()
        torch.set_rng_state(random_state)

    def _answer_all(self, model: PackedLanguageModel, prompter: Prompter, step: int) -> None:
        for prompt in self.prompts:
            HEARTBEAT.sign()
            system = prompt.system if prompt.system is not None else self.spec.data.system
            messages = [("system", system)] if system is not None else []
            messages.append(("user", prompt.user))
            # One conversation at a time: packed attention knows no padding.
            (answer,) = generate_answers(model.base, prompter, [messages], self.spec.evaluate.max_new_tokens)
            append_line(self.spec.paths.samples, {"step": step, "user": prompt.user, "answer": answer.text})
            print(f"sample at step {step}: {prompt.user} -> {answer.text}", flush=True)
