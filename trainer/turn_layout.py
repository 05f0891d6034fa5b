"""A template of XTuner or LLaMA-Factory as a layout: pieces are tokenised one by one, exactly as those programs do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .rows import Message
from .spec import TrainError
from .token_encoder import TokenEncoder
from .turn_templates import Piece, Turn, TurnTemplate


class TurnLayout:
    """Raises TrainError for a token that the template needs and the tokenizer lacks."""

    lacks_end = False
    """The template says itself where a text ends."""

    def __init__(self, encoder: TokenEncoder, template: TurnTemplate) -> None:
        self.encoder, self.template = encoder, template
        self.jinja = template.jinja()
        unknown = [word for word in template.needed_tokens if self._id_of(word) is None]
        if unknown:
            name = getattr(encoder.tokenizer, "name_or_path", "")
            raise TrainError(
                f"data.template {template.tool}/{template.name} needs the tokens {' '.join(unknown)}, "
                f"which the tokenizer {name} does not have",
                "Take the template of the model's own family, or leave data.template out: the model's own is used.",
            )
        self.end_tokens = tuple(word for word in template.stop_words if self._id_of(word) is not None)
        """The template's stop words that are tokens of this tokenizer."""

    def prompt_ids(self, messages: Sequence[Sequence[Any]]) -> list[int]:
        """What the model reads before it answers: the very ids that training documents begin with."""
        pieces = self.template.pieces(_turns([Message(*m) for m in messages], "a prompt"))
        return [i for ids in self.encode([pieces]) for i in ids]

    def prompt_text(self, messages: Sequence[Sequence[Any]]) -> str:
        """`prompt_ids` as text."""
        return self.encoder.tokenizer.decode(self.prompt_ids(messages))

    def pieces(self, messages: Sequence[Message], source: str, tools: Sequence[Any] = ()) -> tuple[list[Piece], bool]:
        """The conversation, and False: no earlier answer is shown rewritten. Raises TrainError naming `source`."""
        if tools or any(message.role == "tool" or message.tool_calls for message in messages):
            raise TrainError(
                f"{source}: the row brings tools, and data.template {self.template.tool}/{self.template.name} has no place for them",
                "Leave such rows out, or leave data.template out where the model's own template shows tools.",
            )
        pieces = self.template.pieces(_turns(messages, source))
        if self.template.ends_with_separator:
            pieces.pop()  # nothing is learnt from it, and nothing comes after it
        return pieces, False

    def encode(self, pieces_of_rows: Sequence[Sequence[Piece]]) -> list[list[int]]:
        """Token ids of every piece, flat. Equal pieces (what stands around questions and answers) are tokenised once."""
        flat = [piece for pieces in pieces_of_rows for piece in pieces]
        texts = list(dict.fromkeys(piece.text for piece in flat if piece.kind == "text"))
        ids = dict(zip(texts, self.encoder.encode(texts), strict=True))
        return [self._ids_of(piece, ids) for piece in flat]

    def _ids_of(self, piece: Piece, texts: dict[str, list[int]]) -> list[int]:
        if piece.kind == "text":
            return texts[piece.text]
        tokenizer = self.encoder.tokenizer
        found = {
            "token": lambda: self._id_of(piece.text),
            "bos": lambda: tokenizer.bos_token_id,
            "eos": lambda: tokenizer.eos_token_id,
        }[piece.kind]()
        return [] if found is None else [found]

    def _id_of(self, token: str) -> int | None:
        return self.encoder.tokenizer.get_vocab().get(token)


def _turns(messages: Sequence[Message], source: str) -> list[Turn]:
    """Question and answer pairs. A conversation that ends with a question gets a turn without an answer."""
    turns: list[Turn] = []
    system = ""
    for message in messages:
        open_turn = bool(turns) and turns[-1].answer is None
        if message.role == "system":
            system = message.content
        elif message.role == "user" and not open_turn:
            turns.append(Turn(system, message.content, None))
            system = ""
        elif message.role == "assistant" and open_turn:
            turns[-1] = turns[-1]._replace(answer=message.content, supervised=message.supervised is not False)
        else:
            raise TrainError(
                f"{source}: two turns of `{message.role}` in a row, and data.template lays out questions with their answers",
                "Join the two, or leave data.template out: the model's own template is used.",
            )
    return turns
