"""Rows as documents of tokens: what is learnt of each, which rows are refused, what becomes of one that is too long."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .model_folder import read_config
from .rows import Row
from .spec import DataSpec, TrainError

if TYPE_CHECKING:
    from .template import ChatTemplate, Document

CHUNK_ROWS = 2000
"""Rows tokenised by one call: enough to keep all cores busy, few enough to hold in memory."""


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    """Labels: what the loss is summed over."""
    truncated: int = 0
    tokens_cut: int = 0
    dropped: int = 0
    """Documents longer than max_length, left out (too_long: drop)."""
    unsupervised: int = 0
    """Documents without a token to learn (after truncation), left out."""
    rewritten: int = 0
    """Documents in which the template rewrites earlier answers, so that these are not supervised."""
    held_out: int = 0
    """Documents that are not trained on; `documents`, `tokens` and `supervised_tokens` are without them."""
    held_out_supervised_tokens: int = 0
    cut_off: int = 0
    """Of `unsupervised`, those that had something to learn before they were cut."""
    split: int = 0
    """Rows that became several documents (too_long: split-turns)."""
    held_out_but_seen: int = 0
    """Of `held_out`, those whose very tokens are trained on as well (data.held_out_files)."""


def chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """As many rows at once as are tokenised by one call."""
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk


def documents_of(rows: Sequence[Row], template: ChatTemplate, data: DataSpec) -> list[Document]:
    """One document per row, in order and uncut, with what is to be learnt of each but for `learn: all`. Raises TrainError."""
    rows = _to_encode(rows, template, data)
    return _with_given(rows, template.encode_rows(_without_tokens(rows), data.system))


def encoded(rows: Iterator[Row], template: ChatTemplate, data: DataSpec) -> Iterator[tuple[list[Row], list[Document]]]:
    """Rows and their documents (`documents_of`) in chunks, in order.

    While the tokenizer's threads make the tokens of one chunk, this thread reads the next one and uses the one before.
    """
    with ThreadPoolExecutor(2) as pool:
        begun: deque[tuple[list[Row], Sequence[Row], Callable[[], list[Document]]]] = deque()
        for chunk in chunks(rows):
            to_encode = _to_encode(chunk, template, data)
            made = template.encode_rows_beside(_without_tokens(to_encode), data.system, pool)
            begun.append((chunk, to_encode, made))
            if len(begun) > 2:
                chunk, to_encode, made = begun.popleft()
                yield chunk, _with_given(to_encode, made())
        for chunk, to_encode, made in begun:
            yield chunk, _with_given(to_encode, made())


def _to_encode(rows: Sequence[Row], template: ChatTemplate, data: DataSpec) -> Sequence[Row]:
    if data.learn == "last":
        from .long_documents import with_last_answer_alone

        rows = [with_last_answer_alone(row) for row in rows]
    for row in rows:
        if any(message.role == "system" for message in row.messages[1:]):
            _require_later_systems(template, row)
    return rows


def _without_tokens(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.input_ids is None]


def _with_given(rows: Sequence[Row], made: list[Document]) -> list[Document]:
    """`made`, and between them the documents of rows that bring their own tokens."""
    if len(made) == len(rows):
        return made
    from .template import Document

    rest = iter(made)
    return [next(rest) if r.input_ids is None else Document(list(r.input_ids), list(r.supervised)) for r in rows]


def parts_of(row: Row, document: Document, template: ChatTemplate, data: DataSpec, counts: Counts) -> list[Document]:
    """The document, with what is to be learnt of it; several where it is too long and may be split."""
    from .long_documents import split_turns, with_all_tokens

    parts = [document]
    if data.too_long == "split-turns" and len(document.input_ids) > data.max_length:
        parts = list(split_turns(row, document, data.max_length, lambda part: documents_of([part], template, data)[0]))
        counts.split += len(parts) > 1
    return [with_all_tokens(part) for part in parts] if data.learn == "all" else parts


def fit(document: Document, data: DataSpec, counts: Counts) -> Document | None:
    """The document within max_length, or None when it is left out; `counts` says why."""
    length, learnt_before = len(document.input_ids), any(document.supervised[1:])
    if length > data.max_length:
        if data.too_long == "drop":
            counts.dropped += 1
            return None
        document = document._replace(
            input_ids=document.input_ids[: data.max_length], supervised=document.supervised[: data.max_length]
        )
    if not any(document.supervised[1:]):
        counts.unsupervised += 1
        counts.cut_off += learnt_before
        return None
    if length > data.max_length:
        counts.truncated += 1
        counts.tokens_cut += length - data.max_length
    counts.rewritten += document.rewritten
    return document


def require_known_tokens(row: Row, document: Document, vocabulary: int) -> None:
    """Raises TrainError where a token has no embedding among the model's `vocabulary`."""
    largest = max(document.input_ids)
    if largest >= vocabulary:
        hint = "The tokenizer does not belong to this model: give a model folder with its own tokenizer."
        if row.input_ids is not None:
            hint = "The tokens were made with another model's tokenizer: make them with this one's, or give text."
        raise TrainError(f"{row.source}: token {largest} is beyond the model's {vocabulary} embeddings", hint)


def vocabulary_size(model_dir: Path) -> int:
    """Rows of the embedding, as config.json says (multi-modal models keep it in text_config)."""
    config = read_config(model_dir)
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise TrainError(
            f"{model_dir / 'config.json'} has no vocab_size", "Only causal language models can be trained."
        )
    return size


def _require_later_systems(template: ChatTemplate, row: Row) -> None:
    """Raises TrainError where the template leaves out a system prompt that stands within the conversation."""
    for k, message in enumerate(row.messages):
        if (
            k
            and message.role == "system"
            and message.content.strip() not in template.prompt_text(row.messages[: k + 2])
        ):
            raise TrainError(
                f"{row.source}: turn {k + 1} is a system prompt, and the chat template leaves it out there",
                "Keep one system prompt, at the beginning, or set data.template to a template that shows later ones.",
            )
