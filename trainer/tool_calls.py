"""Tools of a row, in whatever form it brings them, as chat templates take them. Standard library only.

OpenAI writes calls as `tool_calls` of a message, ShareGPT (and LLaMA-Factory) as the JSON text of a turn; arguments are
JSON text with some, an object with others. Chat templates are given objects, as transformers documents it:
https://huggingface.co/docs/transformers/chat_extras
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .row_values import RowError, json_object, kind_of, text_of

TOOLS_HINT = (
    'Write tools as [{"name": "...", "description": "...", "parameters": {...}}], or as that list\'s JSON text.'
)
CALL_HINT = 'A call is {"name": "...", "arguments": {...}}.'


def tools_of(value: Any, what: str) -> tuple[dict[str, Any], ...]:
    """Definitions of tools: a list of objects, or its JSON text; each with or without the {"type": "function"} around it.

    null, "" and [] are none. Raises RowError.
    """
    if value is None:
        return ()
    if isinstance(value, str) and value.strip():
        value = _from_json(value, what, TOOLS_HINT)
    if value in (None, "", []) or (isinstance(value, str) and not value.strip()):
        return ()
    if not isinstance(value, list):
        raise RowError(f"{what} is {kind_of(value)}, not a list of tools", TOOLS_HINT)
    return tuple(_tool(item, f"item {i} of {what}") for i, item in enumerate(value, start=1))


def _tool(item: Any, what: str) -> dict[str, Any]:
    tool = json_object(item, what)
    function = json_object(tool["function"], f"`function` of {what}") if "function" in tool else tool
    if not isinstance(function.get("name"), str):
        raise RowError(f"{what} has no `name`", TOOLS_HINT)
    return {"type": "function", "function": function}


def tool_calls_of(turn: Mapping[str, Any], what: str) -> tuple[dict[str, Any], ...]:
    """Calls of a turn: OpenAI's `tool_calls`, or `function_call` (an object, a list, or the JSON text of either). Raises RowError."""
    calls = turn.get("tool_calls")
    if not calls:
        calls = turn.get("function_call")
        if isinstance(calls, str):
            calls = _from_json(calls, f"the call of {what}", CALL_HINT)
    if not calls:
        return ()
    return tuple(_call(item, what) for item in (calls if isinstance(calls, list) else [calls]))


def _call(item: Any, what: str) -> dict[str, Any]:
    call = json_object(item, f"a tool call of {what}")
    function = json_object(call["function"], f"a tool call of {what}") if "function" in call else call
    name = text_of(function.get("name"), f"the name of a tool call of {what}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments or "{}", f"`arguments` of a tool call of {what}", CALL_HINT)
    if arguments is None:
        arguments = {}
    return {
        "type": "function",
        "function": {"name": name, "arguments": json_object(arguments, f"`arguments` of {name}")},
    }


def as_turns(messages: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Messages, or (role, content) pairs, as chat templates take them."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        calls = {"tool_calls": list(message[3])} if len(message) > 3 and message[3] else {}
        turns.append({"role": message[0], "content": message[1], **calls})
    return turns


def _from_json(text: str, what: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise RowError(f"{what} is not valid JSON: {e.msg} at character {e.pos + 1}", hint) from None
