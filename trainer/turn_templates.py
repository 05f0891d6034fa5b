"""Chat templates of XTuner 0.1 and LLaMA-Factory, as the pieces that those programs tokenise one by one. Standard library only.

A conversation is laid out turn by turn from the strings of turn_templates.json. Where a piece ends is part of the
template: the same text, tokenised as one, may give other tokens. Sources:
  XTuner 0.2.0rc0       utils/templates.py, dataset/map_fns/template_map_fn.py, dataset/utils.py (encode_fn)
  LlamaFactory 0.9.5    data/template.py, data/formatter.py, data/processor/supervised.py
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

TOOLS = ("xtuner", "llamafactory")
_FILE = Path(__file__).with_name("turn_templates.json")


class Piece(NamedTuple):
    """What is tokenised on its own, without special tokens of the tokenizer's own."""

    text: str
    supervised: bool = False
    kind: str = "text"
    """text | token (`text` is one token of the vocabulary) | bos | eos (of the tokenizer; nothing where it has none)."""
    ends_turn: bool = False
    """The model has to produce the end-of-text token where this piece's first token stands."""


class Turn(NamedTuple):
    """A question with its answer. `answer` None: it is to be generated."""

    system: str
    question: str
    answer: str | None
    supervised: bool = True


@dataclass(frozen=True)
class TurnTemplate:
    """One entry of turn_templates.json."""

    tool: str
    name: str
    strings: dict[str, Any]

    @property
    def stop_words(self) -> tuple[str, ...]:
        """Tokens that end an answer, beside the tokenizer's end of text."""
        return tuple(self.strings.get("stop_words", ()))

    @property
    def default_system(self) -> str:
        """For conversations that bring none; "" for nothing."""
        return self.strings.get("default_system", "")

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """The conversation. Without an answer in the last turn: what the model reads before it answers."""
        layout = _xtuner_pieces if self.tool == "xtuner" else _llamafactory_pieces
        end = self.stop_words[0] if self.strings.get("replace_eos") else ""
        pieces = (
            p._replace(kind="token", text=end) if end and p.kind == "eos" else p for p in layout(self.strings, turns)
        )
        return [p for p in pieces if p.text or p.kind != "text"]


@functools.cache
def turn_templates() -> dict[str, TurnTemplate]:
    """All of them, by tool/name."""
    found = json.loads(_FILE.read_text(encoding="utf-8"))
    return {key: TurnTemplate(*key.split("/", 1), strings) for key, strings in found.items()}


def candidates(name: str) -> list[str]:
    """The tool/name that `name`, with or without its tool, may mean: none, one, or one of each tool."""
    return [key for key in turn_templates() if name in (key, key.split("/", 1)[1])]


def _xtuner_pieces(strings: dict[str, Any], turns: Sequence[Turn]) -> Iterator[Piece]:
    """System prompt and question are one piece. What stands between turns is not learnt, and follows the last one too."""
    begins = True
    for number, turn in enumerate(turns, start=1):
        if begins:
            yield Piece("", kind="bos")
        # A template without a place for a system prompt leaves it out: XTuner itself fails there (AttributeError).
        system = strings["system"].replace("{system}", turn.system) if turn.system and "system" in strings else ""
        question = strings["user"].replace("{round}", str(number)).replace("{input}", turn.question)
        yield Piece(system + question)
        if turn.answer is None:
            return
        yield Piece(turn.answer + strings.get("end", ""), turn.supervised)
        begins = strings["eos"]
        if begins:
            yield Piece("", turn.supervised, "eos")
        yield Piece(strings.get("between", ""))


def _llamafactory_pieces(strings: dict[str, Any], turns: Sequence[Turn]) -> Iterator[Piece]:
    """Each slot is a piece. Where answers end with the next turn's first token (`efficient_eos`), that is learnt as end of text."""
    thought = strings.get("empty_thought", "".join(strings.get("thought", ())))
    words = [w.strip() for w in strings.get("thought", ()) if w.strip()]
    efficient = strings.get("efficient_eos", False)
    for number, turn in enumerate(turns):
        question, prompt = turn.question, []
        if number == 0:
            system = turn.system or strings.get("default_system", "")
            prompt += _filled(strings.get("prefix", ()), "")
            if system and strings.get("system_in_user"):
                question = _filled(strings["system"], system)[0].text + question
            elif system:
                prompt += _filled(strings["system"], system)
        prompt += _filled(strings["user"], question, str(number))
        if efficient and number:
            prompt[0] = prompt[0]._replace(ends_turn=True)
        yield from prompt
        if turn.answer is None:
            return
        if thought and not any(word in turn.answer for word in words):
            yield Piece(thought, turn.supervised)
        yield from (p._replace(supervised=turn.supervised) for p in _filled(strings["answer"], turn.answer))
    if efficient:
        yield Piece("", turns[-1].supervised, "eos")


def _filled(slots: Sequence[Any], content: str, index: str = "") -> list[Piece]:
    pieces = []
    for slot in slots:
        if isinstance(slot, str):
            pieces.append(Piece(slot.replace("{{content}}", content, 1).replace("{{idx}}", index, 1)))
        elif "token" in slot:
            pieces.append(Piece(slot["token"], kind="token"))
        else:
            pieces.append(Piece("", kind=slot["special"]))
    return pieces
