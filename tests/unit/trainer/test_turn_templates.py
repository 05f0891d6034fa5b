"""The templates of XTuner and LLaMA-Factory give the tokens and labels that those programs' own code gives.

tokens.jsonl was written by that code: tests/golden/templates/make.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from support.commands import ROOT
from support.template_tokenizer import CONVERSATIONS, template_tokenizer

from trainer.rows import Message, Row
from trainer.template import ChatTemplate
from trainer.turn_templates import Piece, Turn, candidates, turn_templates

GOLDEN = ROOT / "tests" / "golden" / "templates" / "tokens.jsonl"
ROWS = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return template_tokenizer()


def encoded(tokenizer: Any, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        if piece.kind == "text":
            own = tokenizer.encode(piece.text, add_special_tokens=False)
        else:
            own = [tokenizer.convert_tokens_to_ids(piece.text or getattr(tokenizer, f"{piece.kind}_token"))]
        learnt = list(own) if piece.supervised else [-100] * len(own)
        if piece.ends_turn:
            learnt[0] = tokenizer.eos_token_id
        ids += own
        labels += learnt
    return ids, labels


@pytest.mark.parametrize("name", dict.fromkeys(row[0] for row in ROWS))
def test_tokens_and_labels_are_those_of_the_program_itself(name: str, tokenizer: Any) -> None:
    rows = [row for row in ROWS if row[0] == name]
    assert rows
    for _, number, ids, labels in rows:
        assert encoded(tokenizer, turn_templates()[name].pieces(CONVERSATIONS[number])) == (ids, labels), number


@pytest.mark.parametrize("name", dict.fromkeys(row[0] for row in ROWS))
def test_training_rows_are_that_too_but_for_what_follows_the_last_answer(name: str, tokenizer: Any) -> None:
    template = ChatTemplate(tokenizer, turn_templates()[name])
    for _, number, ids, labels in (row for row in ROWS if row[0] == name):
        rows = [Row(messages_of(CONVERSATIONS[number]), None, "d.jsonl", 1)]
        (document,) = documents = template.encode_rows(rows, None)
        assert template.check_identity(rows, documents, None).num_checked == 1
        length = len(document.input_ids)
        made = [
            (-100, token, tokenizer.eos_token_id)[kind]
            for token, kind in zip(document.input_ids, document.supervised, strict=True)
        ]
        assert (document.input_ids, made) == (ids[:length], labels[:length])
        assert set(labels[length:]) <= {-100}


def messages_of(turns: Sequence[Turn]) -> tuple[Message, ...]:
    first = (Message("system", turns[0].system),) if turns[0].system else ()
    pairs = (
        (Message("user", t.question), Message("assistant", t.answer or "", None if t.supervised else False))
        for t in turns
    )
    return (*first, *(m for pair in pairs for m in pair))


def test_every_template_was_compared() -> None:
    assert {row[0] for row in ROWS} == set(turn_templates())


def test_a_prompt_is_how_the_training_of_its_answer_begins() -> None:
    for template in turn_templates().values():
        for turns in CONVERSATIONS:
            asked = [*turns[:-1], turns[-1]._replace(answer=None)]
            prompt, whole = template.pieces(asked), template.pieces(turns)
            assert prompt == whole[: len(prompt)]
            assert any(p.supervised for p in whole[len(prompt) :])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen_chat", ["xtuner/qwen_chat"]),
        ("qwen", ["llamafactory/qwen"]),
        ("vicuna", ["xtuner/vicuna", "llamafactory/vicuna"]),
        ("llamafactory/vicuna", ["llamafactory/vicuna"]),
        ("qwen_chatt", []),
    ],
)
def test_a_name_may_leave_out_its_tool(name: str, expected: list[str]) -> None:
    assert candidates(name) == expected


def test_a_template_without_a_place_for_a_system_prompt_leaves_it_out() -> None:
    minicpm = turn_templates()["xtuner/minicpm"]
    assert minicpm.pieces([Turn("Be kind.", "Hi", None)]) == minicpm.pieces([Turn("", "Hi", None)])


@pytest.mark.parametrize("name", turn_templates())
def test_as_jinja_it_shows_the_same_text(name: str, tokenizer: Any) -> None:
    template = turn_templates()[name]
    for turns in CONVERSATIONS:
        messages = [{"role": "system", "content": turns[0].system}] if turns[0].system else []
        for turn in turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        show = lambda some: tokenizer.apply_chat_template(some, chat_template=template.jinja(), tokenize=False)  # noqa: E731
        assert show(messages) == text_of(tokenizer, template.pieces(turns))
        asked = [*turns[:-1], turns[-1]._replace(answer=None)]
        assert show(messages[:-1]) == text_of(tokenizer, template.pieces(asked))


def text_of(tokenizer: Any, pieces: list[Piece]) -> str:
    return "".join(p.text if p.kind in ("text", "token") else getattr(tokenizer, f"{p.kind}_token") for p in pieces)
