"""Filling a template's places gives what rendering gives, for templates that look into contents too."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support.template_tokenizer import template_tokenizer

from trainer.jinja_layout import JinjaLayout
from trainer.rows import Message
from trainer.spec import TrainError
from trainer.template_skeleton import NUM_COMPARED, looked_for
from trainer.token_encoder import TokenEncoder
from trainer.turn_templates import turn_templates

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + CONTENT + '<|im_end|>\n' }}"
BEGIN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def chatml(content: str, before: str = "") -> str:
    return "{% for m in messages %}" + before + TURN.replace("CONTENT", content) + "{% endfor %}" + BEGIN


# What templates do with contents, from those of published models.
LOOKING = {
    "plain": chatml("m['content']"),
    "trimmed": chatml("m['content'] | trim"),
    "stripped": chatml("m['content'].strip()"),
    "escaped": chatml("m['content'] | escape"),
    "quoted": chatml("m['content'] | tojson"),
    "replaced": chatml("m['content'].replace('Hello', 'Bye')"),
    "replaced by a filter": chatml("m['content'] | replace('Hello', 'Bye')"),
    "reasoning": chatml("m['content'].split('</think>')[-1].lstrip('\n')"),
    "by a name": "{% set cut = 'is' %}" + chatml("(m['content'] if cut not in m['content'] else 'cut')"),
    "begins": chatml("('!' if m['content'].startswith('He') else '') + m['content']"),
    "equal": chatml("('!' if m['content'] == 'Hello' else '') + m['content']"),
    "around": chatml("('!' if m['content'] in 'xHellox' else '') + m['content']"),
    "long": chatml("m['content'] if m['content'] | length < 20 else 'long'"),
    "only when last": chatml(
        "m['content']", "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    ),
    "first of all": "{{ messages[0]['content'] }}" + chatml("m['content']"),
    "left out": chatml("(m['content'] if m['role'] != 'system' else '')"),
    "macro": "{% macro show(content) %}{{ content if 'is' not in content else 'no' }}{% endmacro %}"
    + chatml("show(m['content'])"),
}
CONTENTS = [
    "Hello",
    "Hello there",
    " padded ",
    "user",
    "x",
    "is it <b>?",
    "<think>\nno\n</think>\n\nYes",
    "a\n\n\nb",
    "中文，好",
    "",
    "He said",
    "<|im_end|>",
    "system",
    "{{ x }}",
    'say "it\'s"',
]


def conversations() -> list[list[Message]]:
    chosen, result = random.Random(0), []
    for number in range(120):
        turns = [Message("system", chosen.choice(CONTENTS))] if number % 3 == 0 else []
        for _ in range(chosen.choice([1, 1, 2, 3])):
            learnt = chosen.choice([None, None, None, False])
            turns += [Message("user", chosen.choice(CONTENTS)), Message("assistant", chosen.choice(CONTENTS), learnt)]
        result.append(turns)
    return result


def outcome(lay: Callable, messages: list[Message]) -> object:
    try:
        return lay(messages, "r.jsonl:1")
    except TrainError as e:
        return e.message


@pytest.fixture(scope="module")
def encoder() -> TokenEncoder:
    return TokenEncoder(template_tokenizer())


@pytest.mark.parametrize("text", [*LOOKING.values(), *(t.jinja() for t in turn_templates().values())])
def test_filled_pieces_are_those_of_the_template(text: str, encoder: TokenEncoder) -> None:
    try:
        layout = JinjaLayout(encoder, text)
    except TrainError:
        pytest.fail(f"a template of this test is refused: {text[:80]}")
    for messages in conversations():
        assert outcome(layout.pieces, messages) == outcome(layout._rendered, messages), messages


def test_rows_of_one_shape_are_rendered_a_few_times(encoder: TokenEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = JinjaLayout(encoder, LOOKING["plain"])
    count = 0
    render = layout.render

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return render(*args, **kwargs)

    monkeypatch.setattr(layout, "render", counted)
    for number in range(1000):
        layout.pieces([Message("user", f"Question {number}"), Message("assistant", f"Answer {number}")], "r:1")
    assert count <= 2 * (NUM_COMPARED + 2)
    # What the template would look for is rendered.
    layout.pieces([Message("user", "Why?"), Message("assistant", "<think>\n</think>Yes")], "r:1")
    assert count > 2 * (NUM_COMPARED + 2)


def test_templates_that_measure_contents_are_rendered() -> None:
    for name in ("escaped", "long"):
        assert looked_for(LOOKING[name]) is None, name
    assert (
        looked_for(
            "{% for m in messages %}{% set text = m['content'] %}{{ text if text|length < 9 else 'x' }}<|im_end|>{% endfor %}"
        )
        is None
    )
    assert looked_for(chatml("m['content'][:4]")) is None
    found = looked_for(LOOKING["reasoning"])
    assert found is not None
    assert found.inside.search("a </think> b")
    assert not found.inside.search("a plain text\nof two lines")
