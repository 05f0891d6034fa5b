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

    @property
    def ends_with_separator(self) -> bool:
        """Whether the last of `pieces` stands between two turns, also where no turn follows."""
        return "between" in self.strings

    @property
    def needed_tokens(self) -> tuple[str, ...]:
        """What must be a token of the vocabulary, whatever the text."""
        slots = [slot for value in self.strings.values() if isinstance(value, list) for slot in value]
        tokens = [slot["token"] for slot in slots if isinstance(slot, dict) and "token" in slot]
        return tuple(dict.fromkeys([*tokens, *(self.stop_words[:1] if self.strings.get("replace_eos") else ())]))

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """The conversation. Without an answer in the last turn: what the model reads before it answers."""
        layout = _xtuner_pieces if self.tool == "xtuner" else _llamafactory_pieces
        end = self.stop_words[0] if self.strings.get("replace_eos") else ""
        pieces = (
            p._replace(kind="token", text=end) if end and p.kind == "eos" else p for p in layout(self.strings, turns)
        )
        return [p for p in pieces if p.text or p.kind != "text"]

    def jinja(self) -> str:
        """The same text as a chat template for other programs: these tokenise it as one."""
        return _xtuner_jinja(self.strings) if self.tool == "xtuner" else _llamafactory_jinja(self.strings)


@functools.cache
def turn_templates() -> dict[str, TurnTemplate]:
    """All of them, by tool/name."""
    found = json.loads(_FILE.read_text(encoding="utf-8"))
    names = {key: key.split("/", 1) for key in found}
    return {key: TurnTemplate(tool, name, found[key]) for key, (tool, name) in names.items()}


def candidates(name: str) -> list[str]:
    """The tool/name that `name`, with or without its tool, may mean: none, one, or one of each tool."""
    return [key for key in turn_templates() if name in (key, key.split("/", 1)[1])]


def is_template_file(template: str) -> bool:
    """Whether this value of `data.template` is the path of a Jinja file, and not `model` or a template's tool/name."""
    return template != "model" and template not in turn_templates()


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


def _xtuner_jinja(strings: dict[str, Any]) -> str:
    user = _literals(strings["user"], {"{input}": "message['content']", "{round}": "ns.turn"})
    system = _literals(strings.get("system", ""), {"{system}": "ns.system"})
    again = "true" if strings["eos"] else "ns.turn == 1"
    eos = "{{ eos_token }}" if strings["eos"] else ""
    return (
        "{% set ns = namespace(system='', turn=0) %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set ns.system = message['content'] %}"
        "{% elif message['role'] == 'user' %}{% set ns.turn = ns.turn + 1 %}"
        f"{{% if {again} %}}{{{{ bos_token }}}}{{% endif %}}"
        f"{{% if ns.system %}}{system}{{% set ns.system = '' %}}{{% endif %}}{user}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] }}"
        f"{_literal(strings.get('end', ''))}{eos}{_literal(strings.get('between', ''))}"
        "{% endif %}{% endfor %}"
    )


def _llamafactory_jinja(strings: dict[str, Any]) -> str:
    end = _literal(strings["stop_words"][0]) if strings.get("replace_eos") else "{{ eos_token }}"

    def slots(name: str, content: str) -> str:
        return "".join(
            _literals(slot, {"{{content}}": content, "{{idx}}": "ns.turn"})
            if isinstance(slot, str)
            else _literal(slot["token"])
            if "token" in slot
            else {"bos": "{{ bos_token }}", "eos": end}[slot["special"]]
            for slot in strings.get(name, ())
        )

    thought = strings.get("empty_thought", "".join(strings.get("thought", ())))
    words = [json.dumps(w.strip(), ensure_ascii=False) for w in strings.get("thought", ()) if w.strip()]
    absent = " and ".join(f"{word} not in message['content']" for word in words)
    add_thought = f"{{% if {absent} %}}{_literal(thought)}{{% endif %}}" if words else ""
    system = f"{{% if ns.system %}}{slots('system', 'ns.system')}{{% endif %}}"
    inside = system if strings.get("system_in_user") else ""
    user, answer = slots("user", "ns.question"), slots("answer", "message['content']")
    finish = (
        "{% if messages[-1]['role'] == 'assistant' %}" + end + "{% endif %}" if strings.get("efficient_eos") else ""
    )
    default = json.dumps(strings.get("default_system", ""), ensure_ascii=False)
    return (
        f"{{% set ns = namespace(system={default}, turn=0, question='') %}}{{% for message in messages %}}"
        "{% if message['role'] == 'system' %}{% if message['content'] %}{% set ns.system = message['content'] %}{% endif %}"
        "{% elif message['role'] == 'user' %}{% set ns.question = message['content'] %}"
        f"{{% if ns.turn == 0 %}}{slots('prefix', '')}{'' if inside else system}"
        + (f"{{% set ns.question %}}{inside}{{{{ ns.question }}}}{{% endset %}}" if inside else "")
        + f"{{% endif %}}{user}{{% set ns.turn = ns.turn + 1 %}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{add_thought}{answer}"
        "{% endif %}{% endfor %}" + finish
    )


def _literal(text: str) -> str:
    """The text as an expression: what stands outside of one is trimmed by transformers."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _literals(text: str, places: dict[str, str]) -> str:
    """The text with the first of each place replaced by an expression."""
    for place, expression in places.items():
        before, found, after = text.partition(place)
        if found:
            return _literals(before, places) + f"{{{{ {expression} }}}}" + _literals(after, places)
    return _literal(text)
