"""Row formats: what one JSON value of a data file says, as messages or as text. Standard library only.

conversation  XTuner: {"conversation": [{"system"?, "input", "output"}, ...]}
              https://xtuner.readthedocs.io/en/latest/training/multi_turn_conversation_dataset.html
alpaca        {"instruction", "output", "input"?, "system"?, "history"?: [[question, answer], ...]}
messages      OpenAI: {"messages": [{"role", "content"}, ...]}, or that list itself
sharegpt      {"conversations": [{"from", "value"}, ...], "system"?}
text          {"text"}: continued pre-training, every token is learnt
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
TOOL_ROLES = frozenset({"tool", "function", "function_call", "observation", "ipython"})
SHAPES = """Formats and their keys:
    conversation  {"conversation": [{"input": "...", "output": "..."}]}
    alpaca        {"instruction": "...", "input": "...", "output": "..."}
    messages      {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt      {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    text          {"text": "..."}"""


class Message(NamedTuple):
    """One turn. Wherever messages are taken, a plain (role, content) pair will do too."""

    role: str
    content: str
    supervised: bool | None = None
    """False: this assistant turn is read but not learnt. None: the rule for its role."""


class RowError(Exception):
    """One row cannot be used: message, hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what} is {_kind(value)}, not a string", "Write every text as a JSON string.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(
            f"{what} holds half of a surrogate pair, which is not a character",
            "Write emoji as UTF-8, or as both halves: \\ud83d\\ude00.",
        ) from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", type(None): "null", str: "a string"}
    return names.get(type(value), "a number")


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{what} is {'an empty list' if value == [] else _kind(value) + ', not a list'}", SHAPES)
    return value


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"{what} is {_kind(value)}, not an object", SHAPES)
    return value


def _refuse_tools(keys: dict[str, Any], what: str) -> None:
    for name in ("tools", "tool_calls", "function_call", "functions"):
        if keys.get(name):
            raise _tool_error(f"{what} has `{name}`")


def _tool_error(found: str) -> RowError:
    return RowError(
        f"{found}: tool use comes with a `tool` role that this format does not support",
        f"Remove rows with tool calls; roles may be {', '.join(ROLES)}.",
    )


def _role(name: Any, known: dict[str, str], what: str) -> str:
    name = _string(name, f"the role of {what}")
    if name in TOOL_ROLES:
        raise _tool_error(f"{what} has the role `{name}`")
    if name not in known:
        raise RowError(f"{what} has the unknown role `{name}`", f"Roles may be {', '.join(known)}.")
    return known[name]


def _checked(messages: list[Message]) -> tuple[Message, ...]:
    """Raises RowError unless: system only first, every answer follows a user turn, the last turn is an answer."""
    previous = ""
    for i, message in enumerate(messages, start=1):
        if message.role == "system" and i > 1:
            raise RowError(f"turn {i} is a system prompt", "A system prompt may only be the first turn.")
        if message.role == "assistant" and previous != "user":
            before = f"follows a turn of `{previous}`" if previous else "is the first turn"
            raise RowError(f"turn {i} is an assistant turn that {before}", "An assistant turn must follow a user turn.")
        previous = message.role
    if previous != "assistant":
        raise RowError(
            f"the last turn is a `{previous}` turn: there is no answer to learn",
            "End every conversation with an assistant turn, or remove its last turn.",
        )
    return tuple(messages)


def _system(value: Any) -> list[Message]:
    """The system message of a row, if it has one; null and "" mean none."""
    return [Message("system", _string(value, "`system`"))] if value not in (None, "") else []


def _parse_conversation(row: Any) -> tuple[tuple[Message, ...], str | None]:
    turns = [_object(t, f"turn {i}") for i, t in enumerate(_list(row["conversation"], "`conversation`"), start=1)]
    messages = _system(turns[0].get("system"))
    for i, turn in enumerate(turns, start=1):
        missing = [k for k in ("input", "output") if k not in turn]
        if missing:
            raise RowError(f"turn {i} has no `{missing[0]}`, but {describe(turn)}", SHAPES)
        if i > 1 and turn.get("system") not in (None, "", turns[0].get("system")):
            raise RowError(f"turn {i} has a system prompt of its own", "Only the first turn may bring a system prompt.")
        question, answer = (
            _string(turn["input"], f"`input` of turn {i}"),
            _string(turn["output"], f"`output` of turn {i}"),
        )
        if question == "":
            if len(turns) == 1 and not messages:
                return (), answer  # XTuner's form of pre-training text
            raise RowError(
                f"`input` of turn {i} is empty",
                'Only a row of one turn without system may have "input": "" (plain text).',
            )
        learnt = turn.get("output_with_loss")
        messages += [Message("user", question), Message("assistant", answer, None if learnt is None else bool(learnt))]
    return _checked(messages), None


def _parse_alpaca(row: Any) -> tuple[tuple[Message, ...], str | None]:
    messages = _system(row.get("system"))
    for i, pair in enumerate(row.get("history") or [], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(
                f"item {i} of `history` is not a pair", 'Write it as "history": [["question", "answer"], ...].'
            )
        messages.append(Message("user", _string(pair[0], f"the question in item {i} of `history`")))
        messages.append(Message("assistant", _string(pair[1], f"the answer in item {i} of `history`")))
    extra = row.get("input")
    parts = [_string(row["instruction"], "`instruction`"), "" if extra is None else _string(extra, "`input`")]
    question = "\n".join(p for p in parts if p)
    if not question:
        raise RowError(
            "`instruction` and `input` are both empty", 'Ask something, or use {"text": "..."} for plain text.'
        )
    messages += [Message("user", question), Message("assistant", _string(row["output"], "`output`"))]
    return _checked(messages), None


def _parse_messages(row: Any) -> tuple[tuple[Message, ...], str | None]:
    if isinstance(row, dict):
        _refuse_tools(row, "the row")
    messages = []
    for i, item in enumerate(_list(row if isinstance(row, list) else row["messages"], "`messages`"), start=1):
        turn = _object(item, f"turn {i}")
        missing = [k for k in ("role", "content") if k not in turn]
        if missing:
            raise RowError(f"turn {i} has no `{missing[0]}`, but {describe(turn)}", SHAPES)
        _refuse_tools(turn, f"turn {i}")
        role = _role(turn["role"], dict(zip(ROLES, ROLES, strict=True)), f"turn {i}")
        weight = turn.get("weight")
        messages.append(Message(role, _content(turn["content"], i), None if weight is None else bool(weight)))
    return _checked(messages), None


def _content(content: Any, turn: int) -> str:
    """A string, or OpenAI's list of parts: their texts joined."""
    if not isinstance(content, list):
        return _string(content, f"`content` of turn {turn}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if kind != "text":
            raise RowError(
                f"turn {turn} has a content part of type `{kind}`", "Only text can be learnt; remove other parts."
            )
        texts.append(_string(part.get("text"), f"`text` of a content part of turn {turn}"))
    return "".join(texts)


def _parse_sharegpt(row: Any) -> tuple[tuple[Message, ...], str | None]:
    _refuse_tools(row, "the row")
    messages = _system(row.get("system"))
    for i, item in enumerate(_list(row["conversations"], "`conversations`"), start=1):
        turn = _object(item, f"turn {i}")
        speaker, text = ("role", "content") if "role" in turn else ("from", "value")
        missing = [k for k in (speaker, text) if k not in turn]
        if missing:
            raise RowError(f"turn {i} has no `{missing[0]}`, but {describe(turn)}", SHAPES)
        role = _role(turn[speaker], SHAREGPT_ROLES, f"turn {i}")
        messages.append(Message(role, _string(turn[text], f"`{text}` of turn {i}")))
    return _checked(messages), None


def _parse_text(row: Any) -> tuple[tuple[Message, ...], str | None]:
    return (), _string(row["text"], "`text`")


@dataclass(frozen=True)
class Format:
    """How to know a format, and how to read it."""

    keys: frozenset[str]
    """A row of this format has all of them."""
    parse: Callable[[Any], tuple[tuple[Message, ...], str | None]]


# In the order in which a row is tried.
FORMATS = {
    "messages": Format(frozenset({"messages"}), _parse_messages),
    "conversation": Format(frozenset({"conversation"}), _parse_conversation),
    "sharegpt": Format(frozenset({"conversations"}), _parse_sharegpt),
    "alpaca": Format(frozenset({"instruction", "output"}), _parse_alpaca),
    "text": Format(frozenset({"text"}), _parse_text),
}


def matching(value: Any) -> list[str]:
    """Names of the formats whose keys a row has."""
    if isinstance(value, list):
        return ["messages"]
    return [name for name, f in FORMATS.items() if isinstance(value, dict) and f.keys <= value.keys()]


def detect(value: Any) -> str:
    """Name of the format of a row. Raises RowError when it is none of ours."""
    found = matching(value)
    if not found:
        raise RowError(f"the row has {describe(value)}, which is none of the known formats", SHAPES)
    return found[0]


def describe(value: Any) -> str:
    """What a row has, for messages: "the keys a, b"."""
    if not isinstance(value, dict):
        return f"no keys (it is {_kind(value)})"
    return f"the keys {', '.join(map(str, value)) or '(none)'}"
