"""The values of a row, taken one by one: what each must be, and the error that says where it is not. Standard library only."""

from __future__ import annotations

from typing import Any, NamedTuple

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""OpenAI's roles, and what each is here."""
SHAPES = """Formats and their keys:
    conversation  {"conversation": [{"input": "...", "output": "..."}]}
    alpaca        {"instruction": "...", "input": "...", "output": "..."}
    messages      {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt      {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    pair          {"prompt": "...", "response": "..."}   (or query, question; completion, answer ...)
    text          {"text": "..."}
    ids           {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
Other names: columns: {prompt: THEIR_NAME, response: THEIR_NAME}; anything else: map: ./my_rows.py:function"""


class Message(NamedTuple):
    """One turn. Wherever messages are taken, a plain (role, content) pair will do too."""

    role: str
    """system | user | assistant | tool."""
    content: str
    supervised: bool | None = None
    """False: this assistant turn is read but not learnt. None: the rule for its role."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """Of an assistant turn: {"type": "function", "function": {"name": str, "arguments": dict}}, as chat templates take it."""


class RowError(Exception):
    """One row cannot be used: message, hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint


class OrderError(RowError):
    """The turns of a conversation do not follow each other as they must."""


def text_of(value: Any, what: str) -> str:
    """The value, a string that is valid Unicode. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(f"{what} is {kind_of(value)}, not a string", "Write every text as a JSON string.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(
            f"{what} holds half of a surrogate pair, which is not a character",
            "Write emoji as UTF-8, or as both halves: \\ud83d\\ude00.",
        ) from None
    return value


def content_text(content: Any, turn: int) -> str:
    """A string, or OpenAI's list of parts: their texts joined. Raises RowError."""
    if not isinstance(content, list):
        return text_of(content, f"`content` of turn {turn}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        if kind != "text":
            raise RowError(
                f"turn {turn} has a content part of type `{kind}`", "Only text can be learnt; remove other parts."
            )
        texts.append(text_of(part.get("text"), f"`text` of a content part of turn {turn}"))
    return "".join(texts)


def kind_of(value: Any) -> str:
    """A JSON value in words: "a list"."""
    names = {dict: "an object", list: "a list", bool: "a boolean", type(None): "null", str: "a string"}
    return names.get(type(value), "a number")


def json_list(value: Any, what: str) -> list[Any]:
    """The value, a list that is not empty. Raises RowError."""
    if not isinstance(value, list) or not value:
        raise RowError(f"{what} is {'an empty list' if value == [] else kind_of(value) + ', not a list'}", SHAPES)
    return value


def json_object(value: Any, what: str) -> dict[str, Any]:
    """The value, an object. Raises RowError."""
    if not isinstance(value, dict):
        raise RowError(f"{what} is {kind_of(value)}, not an object", SHAPES)
    return value


def field(value: dict[str, Any], key: str, what: str) -> Any:
    """`value[key]`. Raises RowError that says what there is instead."""
    if key not in value:
        raise RowError(f"{what} has no `{key}`, but {describe(value)}", SHAPES)
    return value[key]


def describe(value: Any) -> str:
    """What a row has, for messages: "the keys a, b"."""
    if not isinstance(value, dict):
        return f"no keys (it is {kind_of(value)})"
    return f"the keys {', '.join(map(str, value)) or '(none)'}"
