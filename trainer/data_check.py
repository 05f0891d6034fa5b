"""What is wrong with a recipe's rows: `launch data check`. Writes JSON; the launcher weighs and shows it.

Rows are read and encoded as prepare does it, but none stops the others. Of each document 20 bytes are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .disk import write_json
from .model_source import materialise
from .row_documents import Counts, chunks, documents_of, fit, parts_of, require_known_tokens, vocabulary_size
from .row_values import Message, OrderError, RowError
from .rows import Row, read_rows, source_files
from .spec import DataFile, DataSpec, PromptSpec, TrainError, read_plan
from .template import LEARNT_AS_END, NOT_LEARNT, ChatTemplate, Document, load_template, with_system
from .token_encoder import TokenEncoder

FINDINGS = (
    "unreadable-files", "malformed", "order", "refused", "empty-answers", "nothing-to-learn", "special-tokens",
    "placeholders", "damaged-text", "duplicates", "over-length", "truncated", "dropped", "endless-answers", "unseen-system",
)  # fmt: skip
"""All that is looked for, in the order in which it is shown; what each means stands in launcher/data_check.py."""
MAX_PLACES = 5
END_WITHIN = 8
"""An answer ends if one of its last tokens is an end: some templates have it learn a line end behind."""
_DAMAGED = re.compile("\ufffd|锟斤拷|ï»¿|Ã[\u0080-\u00bf]|â€[\u0080-\u00bf™œ˜“”\u2019\u2018¦]")
"""What texts hold that were decoded wrongly once: the replacement character, it as GBK, UTF-8 read as Latin-1 or cp1252."""
_PLACEHOLDER = re.compile(r"\{\{ ?[A-Za-z_]\w* ?\}\}")
"""What LLaMA-Factory's identity.json has for names, to be filled in before training."""
NUM_SYSTEMS = 8
"""System prompts of training that are remembered, to be compared as the template shows them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker check`."""
    parser.add_argument("--plan", required=True, help="plan.json; nothing of it needs to have run")
    parser.add_argument("--out", required=True, help="JSON file to write")


def run(args: argparse.Namespace) -> None:
    """Write `--out`. Raises TrainError for a model or a source that is not there; never for what a row says."""
    spec = read_plan(args.plan)
    model_dir = materialise(spec.model)
    template = load_template(str(model_dir), spec.data.template, spec.model.trust_remote_code)
    checker = Checker(spec.data, spec.evaluate.prompts, template, vocabulary_size(model_dir))
    checker.read(spec.data.files, spec.data.max_rows, trained=True)
    checker.read(spec.data.held_out_files, 0, trained=False)
    write_json(Path(args.out), checker.result())


class _Finding:
    def __init__(self) -> None:
        self.count = 0
        self.places: list[dict[str, str]] = []

    def note(self, where: str, what: str, hint: str = "") -> None:
        self.count += 1
        if len(self.places) < MAX_PLACES:
            self.places.append({"where": where, "what": what, "hint": hint})


class Checker:
    """All sources of a recipe, read once."""

    def __init__(self, data: DataSpec, prompts: Sequence[PromptSpec], template: ChatTemplate, vocabulary: int) -> None:
        self.data, self.template, self.vocabulary = data, template, vocabulary
        self.findings = {name: _Finding() for name in FINDINGS}
        self.counts = Counts()
        self._special = TokenEncoder(template.tokenizer).special
        self._duplicates = _Duplicates()
        self._systems = _Systems(prompts, data.system, template)
        self._num_files = 0

    def read(self, sources: tuple[DataFile, ...], max_rows: int, trained: bool) -> None:
        """Check rows, those that are trained on or those that are held out. Raises TrainError where there is no such file."""
        self._num_files += sum(len(source_files(source)) for source in sources)
        for rows in chunks(read_rows(sources, max_rows, self._on_problem)):
            self.counts.rows += len(rows)
            for row in rows:
                self._check_texts(row)
                if trained:
                    self._systems.add(row)
            for row, document in self._encoded(rows):
                self._check_document(row, document)

    def result(self) -> dict[str, Any]:
        """What was found: counts, and for each finding {"count", "of", "places": [{"where", "what", "hint"}]}."""
        self._duplicates.tell(self.findings["duplicates"])
        self._systems.tell(self.findings["unseen-system"])
        of = {"unreadable-files": self._num_files, "unseen-system": len(self._systems.wanted)}
        return {
            "files": self._num_files,
            "rows": self.counts.rows,
            "documents": self.counts.documents,
            "tokens": self.counts.tokens,
            "supervised_tokens": self.counts.supervised_tokens,
            "max_length": self.data.max_length,
            "too_long": self.data.too_long,
            "findings": {
                name: {"count": f.count, "of": of.get(name, self.counts.rows), "places": f.places}
                for name, f in self.findings.items()
            },
        }

    def _on_problem(self, where: str, e: RowError | TrainError) -> None:
        if isinstance(e, RowError):
            self.counts.rows += 1
            self.findings["order" if isinstance(e, OrderError) else "malformed"].note(where, e.message, e.hint)
            return
        place, colon, what = e.message.partition(": ")
        inside = bool(colon) and place.startswith(f"{where}:")  # path:line: what
        self.findings["unreadable-files"].note(*((place, what) if inside else (where, e.message)), e.hint)

    def _check_texts(self, row: Row) -> None:
        texts = [(f"turn {k}", m.content) for k, m in enumerate(row.messages, start=1)]
        if row.text is not None:
            texts = [("text", row.text)]
        looked_for = {"special-tokens": self._special, "placeholders": _PLACEHOLDER, "damaged-text": _DAMAGED}
        for name, pattern in looked_for.items():
            hit = next(((where, m) for where, text in texts if (m := pattern.search(text))), None)
            if hit:
                where, match = hit
                near = match.string[max(0, match.start() - 15) : match.end() + 15]
                self.findings[name].note(row.source, f"{where} holds {match[0]!r}, in {near!r}")
        empty = [k for k, m in enumerate(row.messages, start=1) if _is_empty_answer(m)]
        if empty or (row.text is not None and not row.text.strip()):
            self.findings["empty-answers"].note(row.source, f"turn {empty[0]} is empty" if empty else "text is empty")

    def _encoded(self, rows: Sequence[Row]) -> list[tuple[Row, Document]]:
        """Rows with their documents, without those that are refused: found by halves, since one refuses all of its call."""
        try:
            documents = documents_of(rows, self.template, self.data)
        except TrainError as e:
            if len(rows) == 1:
                self._refuse(rows[0], e)
                return []
            half = len(rows) // 2
            return self._encoded(rows[:half]) + self._encoded(rows[half:])
        return list(zip(rows, documents, strict=True))

    def _refuse(self, row: Row, e: TrainError) -> None:
        self.findings["refused"].note(row.source, e.message.removeprefix(f"{row.source}: "), e.hint)

    def _check_document(self, row: Row, document: Document) -> None:
        length = len(document.input_ids)
        try:
            if length:
                require_known_tokens(row, document, self.vocabulary)
            own = Counts()
            kept = [fit(part, self.data, own) for part in parts_of(row, document, self.template, self.data, own)]
        except TrainError as e:
            self._refuse(row, e)
            return
        self._duplicates.add(row, document)
        if length > self.data.max_length:
            self.findings["over-length"].note(row.source, f"{length:,} tokens")
        if own.truncated:
            self.findings["truncated"].note(row.source, f"{own.tokens_cut:,} of {length:,} tokens are cut off")
        if own.dropped:
            self.findings["dropped"].note(row.source, f"{length:,} tokens")
        if own.unsupervised:
            reason = "what is to be learnt is cut off" if own.cut_off else "no token is to be learnt"
            self.findings["nothing-to-learn"].note(row.source, reason)
        if endless := self._endless(document):
            self.findings["endless-answers"].note(row.source, endless)
        for part in kept:
            if part is not None:
                self.counts.documents += 1
                self.counts.tokens += len(part.input_ids)
                labels = part.supervised[1:]  # nothing comes before the first
                self.counts.supervised_tokens += len(labels) - labels.count(NOT_LEARNT)

    def _endless(self, document: Document) -> str:
        """Which answer lacks an end, "" if none. A document that is learnt from its first token on is no answer."""
        kinds = np.asarray(document.supervised, np.int8) > 0
        if not kinds.any() or kinds[:2].any():
            return ""
        ends = np.flatnonzero(kinds & ~np.append(kinds[1:], False)) + 1
        stops = set(self.template.stop_token_ids)
        for number, end in enumerate(ends, start=1):
            last = slice(max(0, int(end) - END_WITHIN), int(end))
            if stops.isdisjoint(document.input_ids[last]) and LEARNT_AS_END not in document.supervised[last]:
                return (
                    f"answer {number} of {len(ends)} ends with token {document.input_ids[end - 1]}, which ends nothing"
                )
        return ""


def _is_empty_answer(message: Any) -> bool:
    is_answer = message.role == "assistant" and not message.tool_calls and message.supervised is not False
    return is_answer and not message.content.strip()


class _Duplicates:
    """Which documents are equal, token for token. Of each: a digest of 8 bytes, its file's number, its line."""

    def __init__(self) -> None:
        self._digests, self._files, self._lines = array("Q"), array("I"), array("Q")
        self._paths: dict[str, int] = {}

    def add(self, row: Row, document: Document) -> None:
        named = np.asarray((document.input_ids, document.supervised), np.int32).tobytes()
        self._digests.append(int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little"))
        self._files.append(self._paths.setdefault(row.path, len(self._paths)))
        self._lines.append(row.line)

    def tell(self, finding: _Finding) -> None:
        """Each document that an earlier one equals."""
        digests = np.frombuffer(self._digests, np.uint64)
        order = np.argsort(digests, kind="stable")  # equal ones in the order of reading
        in_order = digests[order]
        again = np.sort(order[1:][in_order[1:] == in_order[:-1]])
        for number in again[:MAX_PLACES].tolist():
            first = int(order[np.searchsorted(in_order, digests[number])])
            finding.note(self._place(number), f"the same as {self._place(first)}")
        finding.count = len(again)

    def _place(self, number: int) -> str:
        return f"{list(self._paths)[self._files[number]]}:{self._lines[number]}"


class _Systems:
    """System prompts of `evaluate.prompts`, and whether a row of training has them. None: the question has none."""

    def __init__(self, prompts: Sequence[PromptSpec], default: str | None, template: ChatTemplate) -> None:
        self._default, self._template = default, template
        own = [prompt.system if prompt.system is not None else default for prompt in prompts]
        self.wanted: list[str | None] = own
        self._unseen = set(own)
        self._seen: dict[str | None, None] = {}
        self._num_rows = 0

    def add(self, row: Row) -> None:
        """A row that is trained on. Tokens made elsewhere do not say what they begin with."""
        if row.messages:
            self._num_rows += 1
            head, *later = with_system(row.messages, self._default)
            first = head.content if head.role == "system" else None
            for system in (first, *(m.content for m in later if m.role == "system")):
                self._unseen.discard(system)
                if len(self._seen) < NUM_SYSTEMS:
                    self._seen.setdefault(system)

    def tell(self, finding: _Finding) -> None:
        """Each prompt whose system prompt no row has, nor one that the template shows as the same text."""
        if not self._num_rows:
            return
        shown = {self._shown(system) for system in self._seen} if self._unseen else set()
        for number, system in enumerate(self.wanted):
            if system in self._unseen and self._shown(system) not in shown:
                said = "no system prompt" if system is None else f"system {system[:60]!r}"
                trained = ", ".join("none" if s is None else repr(s[:40]) for s in list(self._seen)[:2])
                more = ", ..." if len(self._seen) > 2 else ""
                finding.note(
                    f"evaluate.prompts.{number}",
                    f"{said}, which no row that is trained on has (they have: {trained}{more})",
                )

    def _shown(self, system: str | None) -> str:
        """Beginning of a conversation, as text; the system prompt itself where the template refuses it."""
        try:
            return self._template.prompt_text(with_system([Message("user", "?")], system))
        except TrainError:
            return f"refused: {system}"
