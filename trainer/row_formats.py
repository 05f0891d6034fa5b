"""Row formats: what one JSON value of a data file says, as messages, text or tokens. Standard library only.

conversation  XTuner: {"conversation": [{"system"?, "input", "output", "output_with_loss"?}, ...]}
              https://xtuner.readthedocs.io/en/latest/training/multi_turn_conversation_dataset.html
alpaca        {"instruction", "output", "input"?, "system"?, "history"?: [[question, answer], ...]}
messages      OpenAI: {"messages": [{"role", "content", "tool_calls"?, "loss"?}, ...], "tools"?}, or that list itself
sharegpt      {"conversations": [{"from", "value"}, ...], "system"?, "tools"?}
pair          {"prompt" | "query" | "question" | "problem" | "input": ...,
               "response" | "completion" | "answer" | "output" | "solution" | "target": ..., "system"?, "history"?}
text          {"text"}: continued pre-training, every token is learnt
ids           {"input_ids": [...], "labels"?: [... -100 where nothing is learnt], "attention_mask"?}: tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .row_values import (
    ROLES,
    SHAPES,
    Message,
    OrderError,
    RowError,
    content_text,
    describe,
    field,
    json_list,
    json_object,
    text_of,
)
from .spec import RowNames
from .tool_calls import tool_calls_of, tools_of

SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
CALLING_ROLE = "function_call"
"""ShareGPT's role whose value is a call of a function, as JSON text."""
PROMPT_NAMES = ("prompt", "query", "question", "problem", "input")
RESPONSE_NAMES = ("response", "completion", "answer", "output", "solution", "target")
RANKING_KEYS = ("chosen", "rejected", "kto_tag", "rejected_response", "rejected_messages")
MEDIA_KEYS = ("images", "image", "videos", "audios")
REFUSED_KEYS = frozenset((*RANKING_KEYS, *MEDIA_KEYS))


class Parsed(NamedTuple):
    """What a row says: `messages` (which end with an answer), or `text`, or `input_ids`."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that the answers may call."""
    input_ids: tuple[int, ...] | None = None
    supervised: tuple[int, ...] = ()
    """0 or 1 for each of `input_ids`."""


def _role(name: Any, known: Mapping[str, str], what: str) -> str:
    name = text_of(name, f"the role of {what}")
    if name not in known:
        raise RowError(f"{what} has the unknown role `{name}`", f"Roles may be {', '.join(known)}.")
    return known[name]


def _checked(messages: list[Message]) -> tuple[Message, ...]:
    """Raises OrderError unless every answer follows a user's or tool's turn, system prompts a whole one, and the last is an answer."""
    previous = ""
    for i, message in enumerate(messages, start=1):
        if message.role == "system" and previous not in ("", "assistant"):
            raise OrderError(
                f"turn {i} is a system prompt that follows a turn of `{previous}`",
                "A system prompt may be the first turn, or stand between an answer and the next question.",
            )
        if message.role == "assistant" and previous not in ("user", "tool"):
            before = f"follows a turn of `{previous}`" if previous else "is the first turn"
            raise OrderError(
                f"turn {i} is an assistant turn that {before}", "An assistant turn must follow a user turn."
            )
        if message.role == "tool" and not (
            previous == "tool" or (previous == "assistant" and messages[i - 2].tool_calls)
        ):
            raise OrderError(
                f"turn {i} is the result of a tool, and the turn before it calls none",
                "A `tool` (observation) turn must follow an assistant turn with tool calls.",
            )
        previous = message.role
    if previous != "assistant":
        raise OrderError(
            f"the last turn is a `{previous}` turn: there is no answer to learn",
            "End every conversation with an assistant turn, or remove its last turn.",
        )
    return tuple(messages)


def _system(value: Any) -> list[Message]:
    """The system message of a row, if it has one; null and "" mean none."""
    return [Message("system", text_of(value, "`system`"))] if value not in (None, "") else []


def _parse_conversation(row: Any, _: RowNames) -> Parsed:
    turns = [json_object(t, f"turn {i}") for i, t in enumerate(json_list(row["conversation"], "`conversation`"), 1)]
    messages: list[Message] = []
    said = ""
    for i, turn in enumerate(turns, start=1):
        question = text_of(field(turn, "input", f"turn {i}"), f"`input` of turn {i}")
        answer = text_of(field(turn, "output", f"turn {i}"), f"`output` of turn {i}")
        system = _system(turn.get("system"))
        if system and system[0].content != said:
            messages += system
            said = system[0].content
        if question == "":
            if len(turns) == 1 and not messages:
                return Parsed(text=answer)  # XTuner's form of pre-training text
            raise RowError(
                f"`input` of turn {i} is empty",
                'Only a row of one turn without system may have "input": "" (plain text).',
            )
        learnt = _switch(turn.get("output_with_loss"), f"`output_with_loss` of turn {i}")
        messages += [Message("user", question), Message("assistant", answer, learnt)]
    return Parsed(_checked(messages))


def _switch(value: Any, what: str) -> bool | None:
    """A per-turn switch: a boolean, 0 or 1, or (as XTuner takes it) the text of a boolean; null is not said."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise RowError(f"{what} is {value!r}", "Whether an answer is learnt is written true or false (or 1 or 0).")


def _history(value: Any) -> list[Message]:
    messages = []
    for i, pair in enumerate(value or [], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(
                f"item {i} of `history` is not a pair", 'Write it as "history": [["question", "answer"], ...].'
            )
        messages.append(Message("user", text_of(pair[0], f"the question in item {i} of `history`")))
        messages.append(Message("assistant", text_of(pair[1], f"the answer in item {i} of `history`")))
    return messages


def _parse_alpaca(row: Any, _: RowNames) -> Parsed:
    messages = _system(row.get("system")) + _history(row.get("history"))
    extra = row.get("input")
    question, more = text_of(row["instruction"], "`instruction`"), "" if extra is None else text_of(extra, "`input`")
    question = f"{question}\n{more}" if question and more else question or more
    if not question:
        raise RowError(
            "`instruction` and `input` are both empty", 'Ask something, or use {"text": "..."} for plain text.'
        )
    messages += [Message("user", question), Message("assistant", text_of(row["output"], "`output`"))]
    return Parsed(_checked(messages), tools=tools_of(row.get("tools"), "`tools`"))


def _parse_messages(row: Any, _: RowNames) -> Parsed:
    turns, tools = (row, None) if isinstance(row, list) else (row["messages"], row.get("tools"))
    system = [] if isinstance(row, list) else _system(row.get("system"))
    messages = _turns(turns, "`messages`")
    own = system if system and messages[0].role != "system" else []
    return Parsed(_checked(own + messages), tools=tools_of(tools, "`tools`"))


def _turns(value: Any, what: str) -> list[Message]:
    """OpenAI's messages, unchecked in their order."""
    messages = []
    for i, item in enumerate(json_list(value, what), start=1):
        turn = json_object(item, f"turn {i}")
        role = _role(field(turn, "role", f"turn {i}"), ROLES, f"turn {i}")
        calls = tool_calls_of(turn, f"turn {i}")
        if calls and role != "assistant":
            raise RowError(f"turn {i} of `{role}` has `tool_calls`", "Only assistant turns call tools.")
        if turn.get("reasoning_content") or turn.get("thinking"):
            raise RowError(
                f"turn {i} has its reasoning apart from `content`",
                "Write it into `content`, as the model does: <think>...</think> and then the answer.",
            )
        content = turn.get("content") if calls else field(turn, "content", f"turn {i}")
        text = "" if calls and content is None else content_text(content, i)
        learnt = _switch(_first(turn, ("loss", "weight")), f"`loss` or `weight` of turn {i}")
        if learnt and role != "assistant":
            raise RowError(f"turn {i} of `{role}` is to be learnt", "Only assistant turns can be.")
        messages.append(Message(role, text, learnt if role == "assistant" else None, calls))
    return messages


def _first(keys: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((keys[name] for name in names if keys.get(name) is not None), None)


def _roles_of(names: RowNames) -> dict[str, str]:
    """SHAREGPT_ROLES, and what the source's tags call them."""
    tags = {
        names.user_tag: "user", names.assistant_tag: "assistant", names.observation_tag: "tool",
        names.function_tag: "assistant", names.system_tag: "system",
    }  # fmt: skip
    return {**SHAREGPT_ROLES, **{theirs: ours for theirs, ours in tags.items() if theirs}}


def _parse_sharegpt(row: Any, tags: RowNames) -> Parsed:
    roles = _roles_of(tags)
    messages: list[Message] = []
    for i, item in enumerate(json_list(row["conversations"], "`conversations`"), start=1):
        turn = json_object(item, f"turn {i}")
        plain = "role" in turn and "from" not in turn
        speaker = tags.role_tag or ("role" if plain else "from")
        text = tags.content_tag or ("content" if plain else "value")
        named = text_of(field(turn, speaker, f"turn {i}"), f"the role of turn {i}")
        role = _role(named, roles, f"turn {i}")
        value = text_of(field(turn, text, f"turn {i}"), f"`{text}` of turn {i}")
        learnt = _switch(_first(turn, ("loss", "weight")), f"`loss` or `weight` of turn {i}")
        if named == (tags.function_tag or CALLING_ROLE):
            messages.append(Message(role, "", learnt, tool_calls_of({"function_call": value}, f"turn {i}")))
        else:
            messages.append(Message(role, value, learnt if role == "assistant" else None))
    own = _system(row.get("system")) if messages[0].role != "system" else []
    return Parsed(_checked(own + messages), tools=tools_of(row.get("tools"), "`tools`"))


def _parse_pair(row: Any, _: RowNames) -> Parsed:
    asked, answered = _one_of(row, PROMPT_NAMES), _one_of(row, RESPONSE_NAMES)
    messages = _system(row.get("system")) + _history(row.get("history"))
    if isinstance(row[asked], list):  # TRL's conversational prompt and completion
        answer = row[answered]
        turns = _turns(row[asked], f"`{asked}`")
        turns += (
            _turns(answer, f"`{answered}`")
            if isinstance(answer, list)
            else [Message("assistant", text_of(answer, f"`{answered}`"))]
        )
        return Parsed(_checked(messages + turns), tools=tools_of(row.get("tools"), "`tools`"))
    question = text_of(row[asked], f"`{asked}`")
    if not question:
        raise RowError(f"`{asked}` is empty", 'Ask something, or use {"text": "..."} for plain text.')
    messages += [Message("user", question), Message("assistant", text_of(row[answered], f"`{answered}`"))]
    return Parsed(_checked(messages), tools=tools_of(row.get("tools"), "`tools`"))


def _one_of(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    found = [name for name in names if row.get(name) is not None]
    if len(found) > 1:
        raise RowError(
            f"the row has both `{found[0]}` and `{found[1]}`",
            f"Say which one is meant: columns: {{{'prompt' if names is PROMPT_NAMES else 'response'}: {found[0]}}}",
        )
    return found[0] if found else next(name for name in names if name in row)


def _parse_text(row: Any, _: RowNames) -> Parsed:
    return Parsed(text=text_of(row["text"], "`text`"))


def _parse_ids(row: Any, _: RowNames) -> Parsed:
    ids = _integers(row["input_ids"], "`input_ids`", least=0)
    labels = ids if row.get("labels") is None else _integers(row["labels"], "`labels`", least=-100)
    mask = [1] * len(ids) if row.get("attention_mask") is None else _integers(row["attention_mask"], "`attention_mask`")
    if not len(ids) == len(labels) == len(mask):
        raise RowError(
            f"`input_ids` has {len(ids)} items, `labels` {len(labels)}, `attention_mask` {len(mask)}",
            "All have one item for each token; labels are not shifted.",
        )
    wrong = next(
        (i for i, (token, label) in enumerate(zip(ids, labels, strict=True)) if label not in (token, -100)), None
    )
    if wrong is not None:
        raise RowError(
            f"label {wrong + 1} is {labels[wrong]}, the token there {ids[wrong]}",
            "A label is its own token (labels are not shifted), or -100 where nothing is learnt.",
        )
    kept = [i for i, real in enumerate(mask) if real]  # the rest is padding
    return Parsed(input_ids=tuple(ids[i] for i in kept), supervised=tuple(int(labels[i] != -100) for i in kept))


def _integers(value: Any, what: str, least: int = 0) -> list[int]:
    items = json_list(value, what)
    if not all(type(item) is int and item >= least for item in items):
        raise RowError(f"{what} holds something else than whole numbers from {least} on", SHAPES)
    return items


@dataclass(frozen=True)
class Format:
    """How to know a format, and how to read it."""

    keys: tuple[frozenset[str], ...]
    """A row of this format has at least one key of each set."""
    parse: Callable[[Any, RowNames], Parsed]
    others: frozenset[str] = frozenset()
    """Keys that are read where a row has them."""


_SHARED = frozenset({"system", "tools"})
_ALONE = frozenset({"system", "tools", "history"})


def _all(*names: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset({name}) for name in names)


# In the order in which a row is tried.
FORMATS = {
    "messages": Format(_all("messages"), _parse_messages, _SHARED),
    "conversation": Format(_all("conversation"), _parse_conversation),
    "sharegpt": Format(_all("conversations"), _parse_sharegpt, _SHARED),
    "alpaca": Format(_all("instruction", "output"), _parse_alpaca, _ALONE | {"input"}),
    "pair": Format((frozenset(PROMPT_NAMES), frozenset(RESPONSE_NAMES)), _parse_pair, _ALONE),
    "ids": Format(_all("input_ids"), _parse_ids, frozenset({"labels", "attention_mask"})),
    "text": Format(_all("text"), _parse_text),
}


def fits(name: str, value: Any) -> bool:
    """Whether a row has the keys of a format."""
    if isinstance(value, list):
        return name == "messages"
    if not isinstance(value, dict):
        return False
    for some in FORMATS[name].keys:  # noqa: SIM110  a generator costs each row three times as much
        if some.isdisjoint(value):
            return False
    return True


def unread_keys(name: str, value: Any) -> list[str]:
    """Keys of a row that its format does not read, in their order."""
    if not isinstance(value, dict):
        return []
    read = FORMATS[name].others.union(*FORMATS[name].keys)
    return [key for key in value if key not in read]


def detect(value: Any) -> str:
    """Name of the format of a row. Raises RowError when it is none of ours."""
    refuse_foreign(value)
    found = next((name for name in FORMATS if fits(name, value)), "")
    if not found:
        raise RowError(f"the row has {describe(value)}, which is none of the known formats", SHAPES)
    return found


def refuse_foreign(value: Any) -> None:
    """Raises RowError for rows of another kind of training: preferences, pictures, sound."""
    if not isinstance(value, dict):
        return
    ranking = [key for key in RANKING_KEYS if value.get(key) is not None]
    if ranking:
        raise RowError(
            f"the row has `{'` and `'.join(ranking)}`: ranking rows (DPO, KTO, reward models) are not supported",
            "Train on the good answers alone: keep the chosen one as the answer, and drop the other.",
        )
    media = next((key for key in MEDIA_KEYS if value.get(key)), None)
    if media:
        raise RowError(f"the row has `{media}`", "Only text can be learnt; remove such rows, or the key.")
