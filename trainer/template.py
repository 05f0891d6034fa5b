"""Chat template: messages -> token ids, the same for training, samples, chat and evaluation.

A conversation is cut where the model takes over from the prompt. The pieces are tokenised one by one, so the prompt
of a training document consists of exactly the tokens that chat will send, and the answer of those that it can reply.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .jinja_layout import JinjaLayout
from .lean_imports import without_torch
from .rows import Message, Row
from .spec import TrainError
from .template_skeleton import Laid
from .token_encoder import TokenEncoder
from .tool_calls import as_turns
from .turn_layout import TurnLayout
from .turn_templates import Piece, TurnTemplate, turn_templates

NOT_LEARNT, LEARNT, LEARNT_AS_END = 0, 1, 2
"""What a token's label is: none, the token itself, or the end of the text (LLaMA-Factory's efficient_eos)."""


class Document(NamedTuple):
    """One row as tokens. `input_ids` and `supervised` are parallel; a supervised token is one that must be predicted."""

    input_ids: list[int]
    supervised: list[int]
    """NOT_LEARNT, LEARNT or LEARNT_AS_END."""
    rewritten: bool = False
    """The template shows an earlier answer otherwise once more turns follow: that answer is not supervised."""


@dataclass(frozen=True)
class IdentityReport:
    """How training tokens compare with `apply_chat_template(tokenize=True)` of the same messages."""

    num_checked: int
    num_whole_equal: int
    """Rows whose whole conversation is equal, too; an answer at a token boundary of its own may differ."""


class ChatTemplate:
    """One tokenizer and one template. `template`: Jinja text, or a `TurnTemplate`; None is the tokenizer's own.

    Without any template an object can still encode plain text; everything else raises TrainError.
    """

    def __init__(
        self, tokenizer: Any, template: str | TurnTemplate | None = None, eos_token_ids: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self._eos_token_ids = tokenizer, tuple(eos_token_ids)
        encoder = TokenEncoder(tokenizer)
        self._layout: JinjaLayout | TurnLayout
        if isinstance(template, TurnTemplate):
            self._layout = TurnLayout(encoder, template)
        else:
            self._layout = JinjaLayout(encoder, template or _own_template(tokenizer))
        first = tokenizer("a")["input_ids"][:1]
        self._bos_ids: list[int] = first if first == [tokenizer.bos_token_id] else []
        stops = {*eos_token_ids, tokenizer.eos_token_id}
        stops.update(tokenizer.convert_tokens_to_ids(token) for token in self._layout.end_tokens)
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(i for i in stops if i is not None))
        """Any of these ends an answer: end of text, end of turn, and what the model's generation config says."""

    def of_the_model(self) -> ChatTemplate | None:
        """The tokenizer's own template; None where it has none."""
        if _own_template(self.tokenizer) is None:
            return None
        return ChatTemplate(self.tokenizer, None, self._eos_token_ids)

    def prompt_text(self, messages: Sequence[Sequence[Any]]) -> str:
        """What the model reads before it answers. `messages`: (role, content) pairs that end with a user turn."""
        return self._layout.prompt_text(messages)

    def prompt_ids(self, messages: Sequence[Sequence[Any]]) -> list[int]:
        """Token ids of `prompt_text`: the very ones that training documents begin with."""
        return self._layout.prompt_ids(messages)

    def encode_rows(self, rows: Sequence[Row], system: str | None) -> list[Document]:
        """One document per row, in order and uncut. All pieces of all rows are tokenised by one (parallel) call.

        A document whose answers are all empty or switched off has no supervised token. Raises TrainError.
        """
        pieces_of_rows = [self._pieces(row, system) for row in rows]
        return self._documents(rows, pieces_of_rows, self._layout.encode([pieces for pieces, _ in pieces_of_rows]))

    def encode_rows_beside(
        self, rows: Sequence[Row], system: str | None, pool: Executor
    ) -> Callable[[], list[Document]]:
        """`encode_rows` with the tokens made in `pool`: what it returns waits for them, and is called by this thread."""
        pieces_of_rows = [self._pieces(row, system) for row in rows]
        ids = pool.submit(self._layout.encode, [pieces for pieces, _ in pieces_of_rows])
        return lambda: self._documents(rows, pieces_of_rows, ids.result())

    def _documents(
        self, rows: Sequence[Row], laid: Sequence[Laid], ids_of_pieces: Sequence[list[int]]
    ) -> list[Document]:
        ids = iter(ids_of_pieces)
        documents = []
        for row, (pieces, rewritten) in zip(rows, laid, strict=True):
            tokens, supervised = [], []
            for piece in pieces:
                piece_ids = next(ids)
                tokens += piece_ids
                supervised += [int(piece.supervised)] * len(piece_ids)
                if piece.ends_turn:
                    supervised[-len(piece_ids)] = LEARNT_AS_END
            if row.text is not None:
                tokens, supervised = self._bos_ids + tokens, [NOT_LEARNT] * len(self._bos_ids) + supervised
            if (row.text is not None or self._layout.lacks_end) and supervised and supervised[-1]:
                tokens.append(self.tokenizer.eos_token_id)
                supervised.append(LEARNT)
            documents.append(Document(tokens, supervised, rewritten))
        return documents

    def _pieces(self, row: Row, system: str | None) -> Laid:
        if row.text is not None:
            return [Piece(row.text, bool(row.text.strip()))], False
        return self._layout.pieces(with_system(row.messages, system), row.source, row.tools)

    def check_identity(self, rows: Sequence[Row], documents: Sequence[Document], system: str | None) -> IdentityReport:
        """Compare documents with the library's own tokens. Raises TrainError when a prompt differs from chat's."""
        checked = equal = 0
        for row, document in zip(rows, documents, strict=True):
            if row.text is not None or not any(document.supervised):
                continue
            messages = with_system(row.messages, system)
            prompt = document.input_ids[: document.supervised.index(LEARNT)]
            asked = [messages[:k] for k, m in enumerate(messages) if m.role == "assistant"]
            if not any(self._asked_ids(m, row.tools) == prompt for m in asked):
                raise TrainError(
                    f"{row.source}: the training prompt differs from the prompt that chat would send",
                    "Set data.template to a template whose generation prompt is how it begins an answer.",
                )
            checked += 1
            equal += self._library_ids(messages, False, row.tools)[: len(document.input_ids)] == document.input_ids
        return IdentityReport(checked, equal)

    def _asked_ids(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        """A prompt as chat sends it, made without what training made."""
        if isinstance(self._layout, TurnLayout):
            return self.prompt_ids(messages)
        return self._library_ids(messages, True, tools)

    def _library_ids(self, messages: Sequence[Message], generate: bool, tools: Sequence[Any]) -> list[int]:
        return self.tokenizer.apply_chat_template(
            as_turns(messages),
            tools=list(tools) or None,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=generate,
            chat_template=self._layout.jinja,
        )


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages, begun by `system` where they bring no system prompt of their own. None adds nothing."""
    if system is None or messages[0].role == "system":
        return list(messages)
    return [Message("system", system), *messages]


def load_template(model_dir: str, template: str, trust_remote_code: bool = False) -> ChatTemplate:
    """Template of a model folder. `template`: "model", tool/name of a `TurnTemplate`, or a Jinja file. Raises TrainError."""
    try:
        with without_torch(has_own_code=trust_remote_code):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as e:
        raise TrainError(
            f"the tokenizer of {model_dir} cannot be loaded: {e}",
            "Check the folder's tokenizer files; a tokenizer with code of its own needs model.trust_remote_code: true.",
        ) from e
    return ChatTemplate(tokenizer, read_template(template), _eos_token_ids(Path(model_dir)))


def read_template(template: str) -> str | TurnTemplate | None:
    """Text of a Jinja file, or a `TurnTemplate` by its tool/name; None for "model". Raises TrainError."""
    if template == "model":
        return None
    if template in turn_templates():
        return turn_templates()[template]
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as e:
        raise TrainError(f"chat template {template} cannot be read: {e.strerror}", "Check data.template.") from None
    except UnicodeDecodeError:
        raise TrainError(f"chat template {template} is not UTF-8", "Save it as UTF-8.") from None


def _eos_token_ids(model_dir: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def _own_template(tokenizer: Any) -> str | None:
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        return None  # the documented answer of a tokenizer without one
