"""The evaluate stage: the same questions to the base and to the tuned model, and the report.

Reads plan.json and prepared.json of a run, or takes plain model folders. One model is in memory at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .disk import write_text
from .expectations import PromptResult, check_rules, judge, tally_tuned
from .generate import Answer, Prompter, check_folders, generate_answers, load_for_generation, load_prompter
from .model import DTYPES
from .report import build_report, write_report
from .report_terminal import terminal_table
from .spec import Prepared, PromptSpec, TrainError, TrainSpec, read_plan

NEUTRAL_EN = ("Who are you?", "What is the capital of France?", "Explain in two sentences why the sky is blue.")
NEUTRAL_ZH = ("请用一句话介绍你自己。",)


@dataclass(frozen=True)
class Question:
    """What is asked of whom, everything decided."""

    base: str | None
    """Model folder of the "before" answers; None: there are none."""
    tuned: str
    adapter: str | None
    """Adapter on top of `tuned`."""
    prompts: tuple[PromptSpec, ...]
    system: str | None
    max_new_tokens: int
    dtype: str
    device: str
    template: str
    """"model" or a Jinja file."""
    template_from: str
    """Folder whose tokenizer and chat template ask both models."""
    trust_remote_code: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker evaluate`."""
    parser.add_argument("--plan", help="plan.json of the run; or give --model, --prompts and --out")
    parser.add_argument("--strict", action="store_true", help="exit code 2 when the tuned model misses an expectation")
    parser.add_argument("--model", help="tuned model folder, or the base of --adapter")
    parser.add_argument("--base", help="base model folder; default with --adapter: --model")
    parser.add_argument("--adapter", help="PEFT adapter folder")
    parser.add_argument(
        "--prompts", help="JSON file: a list of questions, or of objects with the keys of evaluate.prompts"
    )
    parser.add_argument("--out", help="folder of the report")
    parser.add_argument(
        "--template", default="model", help="model (the tokenizer's own), a template's name or a Jinja file"
    )
    parser.add_argument("--system", help="system prompt; default: the template's own behaviour")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, in tokens")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="number format of the models")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def run(args: argparse.Namespace) -> None:
    """Ask, write the report, print the before/after table. Raises TrainError after that when `strict` is not satisfied."""
    plan = None
    if args.plan:
        spec, prepared = read_plan(args.plan), None
        prepared = Prepared.read(spec.paths.prepared)
        print(f"plan {spec.digest()} run {spec.run_id}", flush=True)
        plan = (json.loads(Path(args.plan).read_text(encoding="utf-8")), spec, prepared)
        question, out = question_of_run(spec, prepared), Path(spec.paths.report_dir)
        strict = args.strict or spec.evaluate.strict
    else:
        question, out, strict = question_of_folders(args), Path(args.out), args.strict
    results = ask_both(question)
    models = {key: getattr(question, key) for key in ("base", "tuned", "adapter", "template", "max_new_tokens")}
    page = write_report(out, build_report(results, models, plan))
    table = terminal_table(results, shutil.get_terminal_size((100, 24)).columns)
    write_text(out / "table.txt", table + "\n")
    print(table)
    print(f"report: {page}", flush=True)
    passed, total = tally_tuned(results)
    if strict and passed < total:
        raise TrainError(
            f"{total - passed} of {total} expectations not met by the tuned model",
            f"The answers are in {page}. Train longer, add rows like these questions, or turn evaluate.strict off.",
        )


def question_of_run(spec: TrainSpec, prepared: Prepared) -> Question:
    """Base: the prepared model. Tuned: merged/ if it is there, else base and adapter/. Raises TrainError without either."""
    merged, adapter = Path(spec.paths.merged_dir), Path(spec.paths.adapter_dir)
    has_merged = (merged / "config.json").is_file()
    if not has_merged and not (adapter / "adapter_config.json").is_file():
        raise TrainError(
            f"there is no tuned model in {spec.paths.run_dir}: neither merged/ nor adapter/ is complete",
            f"Make it from the checkpoints: launch consolidate {spec.run_id}, then launch merge {spec.run_id}",
        )
    return Question(
        base=prepared.model_dir,
        tuned=str(merged) if has_merged else prepared.model_dir,
        adapter=None if has_merged else str(adapter),
        prompts=spec.evaluate.prompts,
        system=spec.data.system,
        max_new_tokens=spec.evaluate.max_new_tokens,
        dtype=spec.model.dtype,
        device=spec.parallel.device,
        template=spec.data.template,
        template_from=prepared.model_dir,
        trust_remote_code=spec.model.trust_remote_code,
    )


def question_of_folders(args: argparse.Namespace) -> Question:
    """From the command line. Raises TrainError for missing flags and for what is not a model folder."""
    missing = [f"--{name}" for name in ("model", "prompts", "out") if not getattr(args, name)]
    if missing:
        raise TrainError(f"{', '.join(missing)} missing", "Give --plan, or --model, --prompts and --out.")
    base = args.base or (args.model if args.adapter else None)
    return Question(
        base=base and str(Path(base).resolve()),
        tuned=str(Path(args.model).resolve()),
        adapter=args.adapter and str(Path(args.adapter).resolve()),
        prompts=read_prompts(Path(args.prompts)),
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        dtype=args.dtype,
        device="cuda",
        template=args.template,
        template_from=str(Path(args.model).resolve()),
        trust_remote_code=args.trust_remote_code,
    )


def read_prompts(path: Path) -> tuple[PromptSpec, ...]:
    """A JSON list; an item is a question, or an object with `user` and optionally system, contains, regex, language."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise TrainError(f"{path}: cannot be read: {e.strerror}", "Give a JSON file with a list of questions.") from e
    except ValueError as e:
        raise TrainError(f"{path}: is not valid UTF-8 JSON: {e}", "Correct the file.") from e
    if not isinstance(items, list):
        raise TrainError(
            f"{path}: expected a list of prompts", 'Example: ["Who are you?", {"user": "1+1?", "regex": "2"}]'
        )
    return tuple(_prompt(item, f"{path}: prompt {number}") for number, item in enumerate(items, start=1))


def _prompt(item: Any, where: str) -> PromptSpec:
    row = {"user": item} if isinstance(item, str) else item
    kinds = {"user": str, "system": str, "contains": list, "regex": str, "language": str}
    if not isinstance(row, dict) or not row.get("user"):
        raise TrainError(
            f"{where}: expected a question, or an object with the key `user`", f"Keys: {', '.join(kinds)}."
        )
    for key, value in row.items():
        if key not in kinds:
            raise TrainError(f"{where}: unknown key “{key}”", f"Keys: {', '.join(kinds)}.")
        if not isinstance(value, kinds[key]) or (key == "contains" and not all(isinstance(v, str) for v in value)):
            wanted = "a list of strings" if key == "contains" else "a string"
            raise TrainError(f"{where}: `{key}` must be {wanted}, not {json.dumps(value, ensure_ascii=False)}")
    return PromptSpec(
        row["user"], row.get("system"), tuple(row.get("contains", ())), row.get("regex", ""), row.get("language", "")
    )


def ask_both(question: Question) -> list[PromptResult]:
    """The answers of base, then of the tuned model, judged. Loads and frees both models."""
    check_rules(question.prompts)
    for folder, adapter in ((question.base, None), (question.tuned, question.adapter)):
        if folder is not None:
            check_folders(folder, adapter)
    template = load_prompter(question.template_from, question.template, question.trust_remote_code)
    prompts = question.prompts or neutral_prompts(template)
    question = dataclasses.replace(question, prompts=prompts)
    base = [None] * len(prompts) if question.base is None else ask(question, template, question.base, None)
    tuned = ask(question, template, question.tuned, question.adapter)
    return [
        PromptResult(
            prompt=prompt,
            system=_system(prompt, question),
            base=before and judge(prompt, before.text, before.num_tokens, before.stopped),
            tuned=judge(prompt, after.text, after.num_tokens, after.stopped),
        )
        for prompt, before, after in zip(prompts, base, tuned, strict=True)
    ]


def ask(question: Question, template: Prompter, model_dir: str, adapter_dir: str | None) -> Sequence[Answer]:
    """All prompts to one model, which is loaded for it and freed again."""
    device = torch.device("cuda" if question.device == "cuda" and torch.cuda.is_available() else "cpu")
    model = load_for_generation(model_dir, DTYPES[question.dtype], device, adapter_dir, question.trust_remote_code)
    conversations = [_messages(prompt, question) for prompt in question.prompts]
    answers = generate_answers(model, template, conversations, question.max_new_tokens)
    # The next model needs the memory of this one.
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return answers


def neutral_prompts(template: Prompter) -> tuple[PromptSpec, ...]:
    """Questions without expectations for a recipe that has none; in Chinese too if the tokenizer is made for it."""
    chinese = [text for text in NEUTRAL_ZH if _is_native(template, text)]
    return tuple(PromptSpec(text, None, (), "", "") for text in (*NEUTRAL_EN, *chinese))


def _is_native(template: Prompter, text: str) -> bool:
    """At most one token a character, and nothing lost: a tokenizer that spells Chinese in bytes needs two or three."""
    token_ids = template.tokenizer.encode(text, add_special_tokens=False)
    return len(token_ids) <= len(text) and template.tokenizer.decode(token_ids).strip() == text


def _system(prompt: PromptSpec, question: Question) -> str | None:
    return prompt.system if prompt.system is not None else question.system


def _messages(prompt: PromptSpec, question: Question) -> list[tuple[str, str]]:
    system = _system(prompt, question)
    return [*([("system", system)] if system is not None else []), ("user", prompt.user)]
