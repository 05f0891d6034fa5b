"""Rows in other formats: what each can hold of a row, and how it is written. trainer/row_formats.py reads them back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from trainer.rows import Message, Row

TOOL_TURNS = "calls of tools and their results"
TOOLS = "the definitions of tools"
SWITCHES = "which of its answers are learnt"
EMPTY_SYSTEM = "an empty system prompt"
LATER_SYSTEM = "a system prompt within the conversation"
SAME_SYSTEM = "the same system prompt a second time"
TWO_QUESTIONS = "two questions in a row"
EMPTY_QUESTION = "an empty question"
TEXT_BESIDE_CALL = "text beside a call of a tool"
IS_TEXT = "plain text, which is no conversation"
IS_TOKENS = "tokens, which are neither text nor conversation"
IS_CONVERSATION = "a conversation: which text it is depends on a chat template"


class Loss(NamedTuple):
    """Something that a format cannot hold."""

    what: str
    whole_row: bool
    """Nothing of the row can be written without it."""


class _Exchange(NamedTuple):
    system: str | None
    question: str
    answer: str
    supervised: bool | None


Written = tuple[dict[str, Any] | None, list[Loss]]
"""The row, None where it cannot be written, and what of it is lost."""


def write_messages(row: Row) -> Written:
    """OpenAI: holds every conversation."""
    if not row.messages:
        return None, [_no_conversation(row)]
    value: dict[str, Any] = {"messages": [_message(m) for m in row.messages]}
    if row.tools:
        value["tools"] = list(row.tools)
    return value, []


def _message(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        calls = (call["function"] for call in message.tool_calls)
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": c["name"], "arguments": _json(c["arguments"])}} for c in calls
        ]
    if message.supervised is not None:
        turn["loss"] = message.supervised
    return turn


def write_sharegpt(row: Row) -> Written:
    """ShareGPT: a turn is either text or calls of tools."""
    if not row.messages:
        return None, [_no_conversation(row)]
    speakers = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    turns, losses = [], []
    for message in row.messages:
        turn: dict[str, Any] = {"from": speakers[message.role], "value": message.content}
        if message.tool_calls:
            calls = [call["function"] for call in message.tool_calls]
            turn = {"from": "function_call", "value": _json(calls[0] if len(calls) == 1 else calls)}
            losses += [Loss(TEXT_BESIDE_CALL, False)] if message.content else []
        if message.supervised is not None:
            turn["loss"] = message.supervised
        turns.append(turn)
    value: dict[str, Any] = {"conversations": turns}
    if row.tools:
        value["tools"] = _json([tool["function"] for tool in row.tools])
    return value, losses


def write_conversation(row: Row) -> Written:
    """XTuner: questions with their answers, each with a system prompt of its own if need be; or plain text."""
    if row.text is not None:
        return {"conversation": [{"input": "", "output": row.text}]}, []
    exchanges, losses = _exchanges(row)
    turns, said = [], ""
    for exchange in exchanges:
        turn: dict[str, Any] = {"input": exchange.question, "output": exchange.answer}
        if exchange.system is not None:
            if exchange.system and exchange.system != said:
                turn = {"system": exchange.system, **turn}
            else:
                losses.append(Loss(SAME_SYSTEM if exchange.system else EMPTY_SYSTEM, False))
            said = exchange.system or said
        if exchange.supervised is not None:
            turn["output_with_loss"] = exchange.supervised
        if not exchange.question:
            losses.append(Loss(EMPTY_QUESTION, True))
        turns.append(turn)
    return _unless_lost({"conversation": turns}, losses)


def write_alpaca(row: Row) -> Written:
    """Alpaca: earlier exchanges are its history."""
    value, losses = _last_and_history(row)
    if value is None:
        return None, losses
    return {"instruction": value.pop("question"), "input": "", "output": value.pop("answer"), **value}, losses


def write_pair(row: Row) -> Written:
    """prompt and response; earlier exchanges are its history."""
    value, losses = _last_and_history(row)
    if value is None:
        return None, losses
    return {"prompt": value.pop("question"), "response": value.pop("answer"), **value}, losses


def write_text(row: Row) -> Written:
    """Plain text alone."""
    if row.text is None:
        return None, [Loss(IS_CONVERSATION if row.messages else IS_TOKENS, True)]
    return {"text": row.text}, []


FORMS: dict[str, Callable[[Row], Written]] = {
    "messages": write_messages,
    "alpaca": write_alpaca,
    "sharegpt": write_sharegpt,
    "conversation": write_conversation,
    "pair": write_pair,
    "text": write_text,
}


def _last_and_history(row: Row) -> tuple[dict[str, Any] | None, list[Loss]]:
    """{"question", "answer", "system"?, "history"?}."""
    if row.text is not None:
        return None, [_no_conversation(row)]
    exchanges, losses = _exchanges(row)
    if any(exchange.supervised is not None for exchange in exchanges):
        losses.append(Loss(SWITCHES, False))
    if any(exchange.system is not None for exchange in exchanges[1:]):
        losses.append(Loss(LATER_SYSTEM, False))
    if exchanges and not exchanges[-1].question:
        losses.append(Loss(EMPTY_QUESTION, True))
    if exchanges and exchanges[0].system == "":
        losses.append(Loss(EMPTY_SYSTEM, False))
    if any(loss.whole_row for loss in losses):
        return None, losses
    *earlier, last = exchanges
    value: dict[str, Any] = {"question": last.question, "answer": last.answer}
    if exchanges[0].system:
        value["system"] = exchanges[0].system
    if earlier:
        value["history"] = [[exchange.question, exchange.answer] for exchange in earlier]
    return value, losses


def _exchanges(row: Row) -> tuple[list[_Exchange], list[Loss]]:
    """A conversation as questions with their answers; what is none of these is lost."""
    if not row.messages:
        return [], [_no_conversation(row)]
    if any(m.role == "tool" or m.tool_calls for m in row.messages):
        return [], [Loss(TOOL_TURNS, True)]
    losses = [Loss(TOOLS, False)] if row.tools else []
    exchanges: list[_Exchange] = []
    system: str | None = None
    question: str | None = None
    for message in row.messages:
        if message.role == "system":
            system = message.content
        elif message.role == "user":
            if question is not None:
                return [], [*losses, Loss(TWO_QUESTIONS, True)]
            question = message.content
        else:
            assert question is not None, "the reader lets no answer follow anything else"
            exchanges.append(_Exchange(system, question, message.content, message.supervised))
            system = question = None
    return exchanges, losses


def _unless_lost(value: dict[str, Any], losses: list[Loss]) -> Written:
    return (None if any(loss.whole_row for loss in losses) else value), losses


def _no_conversation(row: Row) -> Loss:
    return Loss(IS_TOKENS if row.input_ids is not None else IS_TEXT, True)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
