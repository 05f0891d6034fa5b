"""Chat template: messages -> token ids, the same for training, samples, chat and evaluation.

A conversation is cut where the model takes over from the prompt. The pieces are tokenised one by one, so the prompt
of a training document consists of exactly the tokens that chat will send, and the answer of those that it can reply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from .rows import Message, Row
from .spec import TrainError

SENTINEL = "Qz7sentinelQz7"
"""An answer that no template changes and that no prompt contains."""
NO_TEMPLATE_HINT = (
    "Set data.template to a Jinja file that fits the model, or take the model's instruct (chat) variant; "
    "plain `text` rows need no template."
)


class Document(NamedTuple):
    """One row as tokens. `input_ids` and `supervised` are parallel; a supervised token is one that must be predicted."""

    input_ids: list[int]
    supervised: list[bool]
    rewritten: bool = False
    """The template shows an earlier answer otherwise once more turns follow: that answer is not supervised."""


class _Piece(NamedTuple):
    text: str
    supervised: bool


@dataclass(frozen=True)
class IdentityReport:
    """How training tokens compare with `apply_chat_template(tokenize=True)` of the same messages."""

    num_checked: int
    num_whole_equal: int
    """Rows whose whole conversation is equal, too; an answer at a token boundary of its own may differ."""


class ChatTemplate:
    """One tokenizer and one template. `template_text` None means the tokenizer's own template.

    Without any template an object can still encode plain text; everything else raises TrainError.
    """

    def __init__(self, tokenizer: Any, template_text: str | None = None, eos_token_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            # tokenizer.json may bring either; documents are cut, and rows filled, by us.
            self._backend.no_truncation()
            self._backend.no_padding()
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(t) for t in added if t.special} | set(tokenizer.all_special_tokens)
        self._special = _any_of(special)
        self._text: str | None = template_text or _own_template(tokenizer)
        self._head: tuple[str, list[int]] | None = None
        self._tail, self._end_token, self._anchored = "", "", False
        if self._text is not None:
            self._study(_any_of(special | {str(t) for t in added}))
        first = tokenizer("a")["input_ids"][:1]
        self._bos_ids: list[int] = first if first == [tokenizer.bos_token_id] else []
        stops = {*eos_token_ids, tokenizer.eos_token_id}
        if self._end_token:
            stops.add(tokenizer.convert_tokens_to_ids(self._end_token))
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(i for i in stops if i is not None))
        """Any of these ends an answer: end of text, end of turn, and what the model's generation config says."""

    def _study(self, added: re.Pattern[str]) -> None:
        """Find what follows an answer, and whether a piece may be tokenised on its own."""
        question, answer = Message("user", "Hello"), Message("assistant", SENTINEL)
        rendered = self.render([question, answer], source="the chat template")
        if SENTINEL not in rendered:
            raise TrainError("the chat template leaves out assistant turns", NO_TEMPLATE_HINT)
        self._tail = rendered.partition(SENTINEL)[2]
        end = added.search(self._tail)
        self._end_token = end.group() if end else ""
        prompt = self.prompt_text([question])
        both, alone, reply = self._encode([prompt + "Hello", prompt, "Hello"])
        self._anchored = both != alone + reply

    def render(self, messages: Sequence[Sequence[Any]], generate: bool = False, source: str = "") -> str:
        """Text of the messages; with `generate`, up to where the next answer begins. Raises TrainError naming `source`."""
        if self._text is None:
            name = getattr(self.tokenizer, "name_or_path", "")
            raise TrainError(
                f"the tokenizer {name} has no chat template, and {source or 'a prompt'} needs one", NO_TEMPLATE_HINT
            )
        turns = [{"role": m[0], "content": m[1]} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generate, chat_template=self._text
            )
        except jinja2.TemplateError as e:
            raise TrainError(
                f"{source or 'prompt'}: the chat template does not accept these messages: {e}",
                "Change the row (or data.system) to what the model's template allows, or set data.template.",
            ) from None

    def prompt_text(self, messages: Sequence[Sequence[Any]]) -> str:
        """What the model reads before it answers. `messages`: (role, content) pairs that end with a user turn."""
        return self.render(messages, generate=True)

    def prompt_ids(self, messages: Sequence[Sequence[Any]]) -> list[int]:
        """Token ids of `prompt_text`: the very ones that training documents begin with."""
        return self._encode([self.prompt_text(messages)])[0]

    def encode_rows(self, rows: Sequence[Row], system: str | None) -> list[Document]:
        """One document per row, in order and uncut. All pieces of all rows are tokenised by one (parallel) call.

        A document whose answers are all empty or switched off has no supervised token. Raises TrainError.
        """
        pieces_of_rows = [self._pieces(row, system) for row in rows]
        if self._head is None and not self._anchored:
            self._learn_head([p[0].text for row, (p, _) in zip(rows, pieces_of_rows, strict=True) if row.text is None])
        ids = iter(self._encode_pieces([pieces for pieces, _ in pieces_of_rows]))
        documents = []
        for row, (pieces, rewritten) in zip(rows, pieces_of_rows, strict=True):
            tokens, supervised = [], []
            for piece in pieces:
                piece_ids = next(ids)
                tokens += piece_ids
                supervised += [piece.supervised] * len(piece_ids)
            if row.text is not None:
                tokens, supervised = self._bos_ids + tokens, [False] * len(self._bos_ids) + supervised
            if (row.text is not None or not self._end_token) and supervised and supervised[-1]:
                tokens.append(self.tokenizer.eos_token_id)
                supervised.append(True)
            documents.append(Document(tokens, supervised, rewritten))
        return documents

    def check_identity(self, rows: Sequence[Row], documents: Sequence[Document], system: str | None) -> IdentityReport:
        """Compare documents with the library's own tokens. Raises TrainError when a prompt differs from chat's."""
        checked = equal = 0
        for row, document in zip(rows, documents, strict=True):
            if row.text is not None or not any(document.supervised):
                continue
            messages = with_system(row.messages, system)
            prompt = document.input_ids[: document.supervised.index(True)]
            asked = [messages[:k] for k, m in enumerate(messages) if m.role == "assistant"]
            if not any(self._library_ids(m, generate=True) == prompt for m in asked):
                raise TrainError(
                    f"{row.source}: the training prompt differs from the prompt that chat would send",
                    "Set data.template to a template whose generation prompt is how it begins an answer.",
                )
            checked += 1
            equal += self._library_ids(messages, generate=False)[: len(document.input_ids)] == document.input_ids
        return IdentityReport(checked, equal)

    def _library_ids(self, messages: Sequence[Message], generate: bool) -> list[int]:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return self.tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=False, add_generation_prompt=generate, chat_template=self._text
        )

    def _pieces(self, row: Row, system: str | None) -> tuple[list[_Piece], bool]:
        """The row's text cut at the borders of its answers, and whether an earlier answer is shown rewritten.

        What follows the last answer's end is left out: nothing is learnt from it, and nothing comes after it.
        """
        if row.text is not None:
            return [_Piece(row.text, bool(row.text.strip()))], False
        messages = with_system(row.messages, system)
        whole = self.render(messages, source=row.source)
        pieces: list[_Piece] = []
        position, rewritten, last = 0, False, len(messages) - 1
        for k, message in enumerate(messages):
            if message.role != "assistant":
                continue
            learnt = message.supervised is not False and message.content.strip() != ""
            prompt = self.render(messages[:k], generate=True, source=row.source)
            shown = whole if k == last else self.render(messages[: k + 1], source=row.source)
            if shown.startswith(prompt):
                end = self._answer_end(shown, len(prompt))
                answer = shown[len(prompt) : end]
            elif k == last:
                answer, end = self._opened_answer(messages, prompt, row.source), 0
            if k != last and not (shown.startswith(prompt) and whole.startswith(shown[:end])):
                rewritten = True
                continue
            pieces += [_Piece(prompt[position:], False), _Piece(answer, learnt)]
            position = end
        return [p for p in pieces if p.text], rewritten

    def _answer_end(self, shown: str, start: int) -> int:
        """Where the answer that begins at `start` and ends `shown` is over: after its end-of-turn token."""
        if self._tail and shown.endswith(self._tail):
            end = len(shown) - len(self._tail)
            return end + self._tail.index(self._end_token) + len(self._end_token) if self._end_token else end
        ends = [m.end() for m in self._special.finditer(shown, start)]
        return ends[-1] if ends else len(shown)

    def _opened_answer(self, messages: Sequence[Message], prompt: str, source: str) -> str:
        """The last answer, for a template whose prompt already opens it (DeepSeek-R1 ends the prompt with <think>)."""
        shown = self.render([*messages[:-1], Message("assistant", SENTINEL)], source=source)
        before, _, after = shown.partition(SENTINEL)
        if not prompt.startswith(before):
            raise TrainError(
                f"{source}: the chat template asks for an answer with {prompt[-40:]!r} but shows it after {before[-40:]!r}",
                "Set data.template to a template whose generation prompt is how it begins an answer.",
            )
        opening, body = prompt[len(before) :].strip(), messages[-1].content
        if opening and body.lstrip().startswith(opening):
            body = body.lstrip()[len(opening) :].lstrip("\n")
        answer = body + after
        return answer[: self._answer_end(answer, 0)]

    def _learn_head(self, prompts: list[str]) -> None:
        """Remember the tokens of the constant beginning (system prompt), cut before a special token, where cuts are exact."""
        if not prompts:
            return
        first = prompts[0]
        other = next((p for p in prompts if p != first), first)
        common = next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), 0)
        starts = [m.start() for m in self._special.finditer(first, 0, common)]
        head = first[: starts[-1]] if starts else ""
        head_ids, rest, whole = self._encode([head, first[len(head) :], first])
        self._head = (head, head_ids) if head_ids + rest == whole else ("", [])

    def _encode_pieces(self, pieces_of_rows: list[list[_Piece]]) -> list[list[int]]:
        """Token ids of every piece, flat."""
        texts, starts, anchors = [], [], []
        head, head_ids = self._head or ("", [])
        for pieces in pieces_of_rows:
            before = ""
            for piece in pieces:
                cut = bool(head) and not before and piece.text.startswith(head)
                anchor = self._anchor(before) if self._anchored and before else ""
                texts.append(piece.text[len(head) :] if cut else anchor + piece.text)
                starts.append(head_ids if cut else [])
                anchors.append(anchor)
                before = piece.text
        encoded = self._encode(texts)
        if not self._anchored:
            return [start + ids if start else ids for start, ids in zip(starts, encoded, strict=True)]
        unique = list(dict.fromkeys(anchors))
        known = dict(zip(unique, self._encode(unique), strict=True))
        result = []
        for text, anchor, ids in zip(texts, anchors, encoded, strict=True):
            skip = known[anchor]
            exact = ids[: len(skip)] == skip
            result.append(ids[len(skip) :] if exact else self._encode([text[len(anchor) :]])[0])
        return result

    def _anchor(self, before: str) -> str:
        """End of the preceding piece, from its last special token on.

        Sentencepiece tokenizers put a space before a text's first word; behind the anchor a piece is not the first.
        """
        starts = [m.start() for m in self._special.finditer(before)]
        return before[starts[-1] :] if starts else before[-16:]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages, begun by `system` where they bring no system prompt of their own. None adds nothing."""
    if system is None or messages[0].role == "system":
        return list(messages)
    return [Message("system", system), *messages]


def load_template(model_dir: str, template: str, trust_remote_code: bool = False) -> ChatTemplate:
    """Template of a model folder. `template` is "model" or the path of a Jinja file. Raises TrainError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as e:
        raise TrainError(
            f"the tokenizer of {model_dir} cannot be loaded: {e}",
            "Check the folder's tokenizer files; a tokenizer with code of its own needs model.trust_remote_code: true.",
        ) from e
    return ChatTemplate(tokenizer, read_template(template), _eos_token_ids(Path(model_dir)))


def read_template(template: str) -> str | None:
    """Text of a Jinja file; None for "model". Raises TrainError."""
    if template == "model":
        return None
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


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Pattern of any of these texts, the longest first; of nothing, when there are none."""
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or r"(?!)")
