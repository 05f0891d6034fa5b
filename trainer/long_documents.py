"""What is learnt of a row, and what becomes of one that is longer than a packed row.

`split-turns`: a conversation becomes several, each with its system prompt, cut between an answer and the next question;
a text is cut anywhere. So every token of every answer is learnt once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .rows import Row
from .template import LEARNT, NOT_LEARNT, Document

Encode = Callable[[Row], Document]


def with_last_answer_alone(row: Row) -> Row:
    """Of its answers only the last is learnt (`learn: last`)."""
    answers = [k for k, message in enumerate(row.messages) if message.role == "assistant"]
    if len(answers) < 2:
        return row
    earlier = set(answers[:-1])
    messages = (m._replace(supervised=False) if k in earlier else m for k, m in enumerate(row.messages))
    return row._replace(messages=tuple(messages))


def with_all_tokens(document: Document) -> Document:
    """All of it is learnt (`learn: all`), but for the first token, which nothing comes before."""
    kinds = [kind or LEARNT for kind in document.supervised]
    return document._replace(supervised=[NOT_LEARNT, *kinds[1:]])


def split_turns(row: Row, document: Document, max_length: int, encode: Encode) -> Iterator[Document]:
    """Documents of at most `max_length` tokens, in order, but for single exchanges that are longer by themselves.

    `document` is the whole row; `encode` makes one of a part of it. Documents of rows of tokens or text are cut anywhere.
    """
    if not row.messages:
        for start in range(0, len(document.input_ids), max_length):
            part = slice(start, start + max_length)
            yield document._replace(input_ids=document.input_ids[part], supervised=document.supervised[part])
        return
    head = row.messages[:1] if row.messages[0].role == "system" else ()
    exchanges = list(_exchanges(row, len(head)))
    first = 0
    while first < len(exchanges):
        taken, best = 1, _encoded(row, head, exchanges, first, 1, encode)
        low, high = 1, len(exchanges) - first
        # The most exchanges that fit: a longer conversation has more tokens.
        while low < high:
            middle = (low + high + 1) // 2
            longer = _encoded(row, head, exchanges, first, middle, encode)
            if len(longer.input_ids) <= max_length:
                low, taken, best = middle, middle, longer
            else:
                high = middle - 1
        yield best
        first += taken


def _exchanges(row: Row, start: int) -> Iterator[slice]:
    """Questions with what follows up to the last answer before the next question."""
    begins = [
        k
        for k in range(start, len(row.messages))
        if k == start or (row.messages[k].role != "assistant" and row.messages[k - 1].role == "assistant")
    ]
    for begin, end in zip(begins, [*begins[1:], len(row.messages)], strict=True):
        yield slice(begin, end)


def _encoded(row: Row, head: tuple, exchanges: list[slice], first: int, count: int, encode: Encode) -> Document:
    part = row.messages[exchanges[first].start : exchanges[first + count - 1].stop]
    return encode(row._replace(messages=(*head, *part)))
