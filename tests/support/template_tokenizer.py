"""A tokenizer that knows the marks of every family of models, and conversations to lay out with its templates."""

from __future__ import annotations

import re
from typing import Any

from support.commands import ROOT
from trainer.turn_templates import Turn, turn_templates

CONVERSATIONS = (
    (Turn("", "Hello  there", "Hi."),),
    (
        Turn("Answer\nbriefly.", "你好，你是谁？", "我是小薇。"),
        Turn("", "1 + 1 =", " 2\n"),
        Turn("", "Why?", "Because."),
    ),
    (Turn("", " Leading space\n", "<think>\nLet me see\n</think>\n\nYes"), Turn("", "And {input} {{content}}?", "No")),
    (Turn("Sys", "First", "not learnt", False), Turn("", "Second", "learnt")),
)
"""With answers that begin with a space, reasoning, places of templates inside text, and one answer that is not learnt."""
_MARK = re.compile(r"<[|｜_]?[\w▁ ]+[|｜]?>|<\|im_[a-z]+\|>|\[/?[A-Za-z_]+\]|\[\|[a-z]+\|\]")


def template_tokenizer() -> Any:
    """That of recipes/tiny with `<s>` and `</s>` and each mark of a template (<|im_start|>, [gMASK], ...) as one special token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "tiny")
    texts = [text for template in turn_templates().values() for text in _texts(template.strings)]
    marks = sorted({mark for text in texts for mark in _MARK.findall(text)})
    tokens = sorted({slot["token"] for t in turn_templates().values() for slot in _tokens(t.strings)})
    stops = [word for t in turn_templates().values() for word in t.stop_words]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer.add_special_tokens({**special, "additional_special_tokens": [*dict.fromkeys([*marks, *tokens, *stops])]})
    return tokenizer


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _tokens(strings: dict[str, Any]) -> list[dict[str, str]]:
    slots = [s for value in strings.values() if isinstance(value, list) for s in value]
    return [s for s in slots if isinstance(s, dict) and "token" in s]
