"""A Jinja chat template as a layout: a conversation is rendered, and cut where the model takes over from the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2

from .rows import Message
from .spec import TrainError
from .template_skeleton import Skeletons
from .token_encoder import TokenEncoder
from .tool_calls import as_turns
from .turn_templates import Piece

SENTINEL = "Qz7sentinelQz7"
"""An answer that no template changes and that no prompt contains."""
LONGEST_END = 64
"""Characters from the end of a turn to the next content; longer texts are tokenised as they are."""
MAX_ENDS = 256
NO_TEMPLATE_HINT = (
    "Set data.template to a Jinja file that fits the model, or take the model's instruct (chat) variant; "
    "plain `text` rows need no template."
)


class JinjaLayout:
    """`text` None: there is no template, and whatever needs one raises TrainError."""

    def __init__(self, encoder: TokenEncoder, text: str | None) -> None:
        self.encoder, self.jinja = encoder, text
        self._head: tuple[str, list[int]] | None = None
        self._ends: dict[str, list[int]] | None = None
        """Tokens of what stands behind contents, from the end of a turn on; None: texts are not cut there."""
        self._tail, self._end_token, self._anchored = "", "", False
        self._skeletons: Skeletons | None = None
        if text is not None:
            self._study(encoder.added)
            self._skeletons = Skeletons(text, encoder.added, self._rendered)

    @property
    def lacks_end(self) -> bool:
        """Whether answers have no end of their own: the tokenizer's end of text has to be put behind the last."""
        return not self._end_token

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """What ends an answer; nothing where the tokenizer's end of text has to."""
        return (self._end_token,) if self._end_token else ()

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
        both, alone, reply = self.encoder.encode([prompt + "Hello", prompt, "Hello"])
        self._anchored = both != alone + reply

    def render(
        self, messages: Sequence[Sequence[Any]], generate: bool = False, source: str = "", tools: Sequence[Any] = ()
    ) -> str:
        """Text of the messages; with `generate`, up to where the next answer begins. Raises TrainError naming `source`."""
        if self.jinja is None:
            name = getattr(self.encoder.tokenizer, "name_or_path", "")
            raise TrainError(
                f"the tokenizer {name} has no chat template, and {source or 'a prompt'} needs one", NO_TEMPLATE_HINT
            )
        try:
            return self.encoder.tokenizer.apply_chat_template(
                as_turns(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=generate,
                chat_template=self.jinja,
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
        """Token ids of `prompt_text`."""
        return self.encoder.encode([self.prompt_text(messages)])[0]

    def pieces(self, messages: Sequence[Message], source: str, tools: Sequence[Any] = ()) -> tuple[list[Piece], bool]:
        """The conversation cut at the borders of its answers, and whether an earlier answer is shown rewritten.

        What follows the last answer's end is left out: nothing is learnt from it, and nothing comes after it.
        """
        if self._skeletons is not None and not tools:
            return self._skeletons.pieces(messages, source)
        return self._rendered(messages, source, tools)

    def _rendered(
        self, messages: Sequence[Message], source: str, tools: Sequence[Any] = ()
    ) -> tuple[list[Piece], bool]:
        whole = self.render(messages, source=source, tools=tools)
        _require_shown(whole, messages, source, tools)
        pieces: list[Piece] = []
        position, rewritten, last = 0, False, len(messages) - 1
        for k, message in enumerate(messages):
            if message.role != "assistant":
                continue
            learnt = message.supervised is not False and (message.content.strip() != "" or bool(message.tool_calls))
            prompt = self.render(messages[:k], generate=True, source=source, tools=tools)
            shown = whole if k == last else self.render(messages[: k + 1], source=source, tools=tools)
            if shown.startswith(prompt):
                end = self._answer_end(shown, len(prompt))
                answer = shown[len(prompt) : end]
            elif k == last:
                answer, end = self._opened_answer(messages, prompt, source, tools), 0
            if k != last and not (shown.startswith(prompt) and whole.startswith(shown[:end])):
                rewritten = True
                continue
            pieces += [Piece(prompt[position:], False), Piece(answer, learnt)]
            position = end
        return [p for p in pieces if p.text], rewritten

    def _answer_end(self, shown: str, start: int) -> int:
        """Where the answer that begins at `start` and ends `shown` is over: after its end-of-turn token."""
        if self._tail and shown.endswith(self._tail):
            end = len(shown) - len(self._tail)
            return end + self._tail.index(self._end_token) + len(self._end_token) if self._end_token else end
        ends = [m.end() for m in self.encoder.special.finditer(shown, start)]
        return ends[-1] if ends else len(shown)

    def _opened_answer(self, messages: Sequence[Message], prompt: str, source: str, tools: Sequence[Any]) -> str:
        """The last answer, for a template whose prompt already opens it (DeepSeek-R1 ends the prompt with <think>)."""
        shown = self.render([*messages[:-1], Message("assistant", SENTINEL)], source=source, tools=tools)
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
        starts = [m.start() for m in self.encoder.special.finditer(first, 0, common)]
        head = first[: starts[-1]] if starts else ""
        head_ids, rest, whole = self.encoder.encode([head, first[len(head) :], first])
        self._head = (head, head_ids) if head_ids + rest == whole else ("", [])
        at = first.rfind(self._end_token) if self._end_token else -1
        if at > 0 and not self.encoder.takes_space_before(self._end_token):
            before, behind = self.encoder.encode([first[:at], first[at:]])
            self._ends = {"": [], first[at:]: behind} if before + behind == whole else None

    def _cut_ends(self, texts: list[str], known: dict[str, list[int]]) -> tuple[list[str], list[str]]:
        """(texts without their ends, the ends): what is the same behind every content is tokenised once, into `known`."""
        fronts, ends = [], []
        for text in texts:
            at = text.rfind(self._end_token)
            end = text[at:] if at >= 0 and len(text) - at <= LONGEST_END else ""
            if end not in known:
                if len(known) < MAX_ENDS:
                    known[end] = self.encoder.encode([end])[0]
                else:
                    end = ""
            fronts.append(text[:at] if end else text)
            ends.append(end)
        return fronts, ends

    def encode(self, pieces_of_rows: Sequence[Sequence[Piece]]) -> list[list[int]]:
        """Token ids of every piece, flat."""
        if self._head is None and not self._anchored:
            self._learn_head([pieces[0].text for pieces in pieces_of_rows if len(pieces) > 1])
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
        if not self._anchored:
            known = self._ends
            if known is None:
                return [s + ids if s else ids for s, ids in zip(starts, self.encoder.encode(texts), strict=True)]
            fronts, ends = self._cut_ends(texts, known)
            encoded = zip(starts, self.encoder.encode(fronts), ends, strict=True)
            return [start + ids + known[end] for start, ids, end in encoded]
        encoded = self.encoder.encode(texts)
        unique = list(dict.fromkeys(anchors))
        known = dict(zip(unique, self.encoder.encode(unique), strict=True))
        result = []
        for text, anchor, ids in zip(texts, anchors, encoded, strict=True):
            skip = known[anchor]
            exact = ids[: len(skip)] == skip
            result.append(ids[len(skip) :] if exact else self.encoder.encode([text[len(anchor) :]])[0])
        return result

    def _anchor(self, before: str) -> str:
        """End of the preceding piece, from its last special token on.

        Sentencepiece tokenizers put a space before a text's first word; behind the anchor a piece is not the first.
        """
        starts = [m.start() for m in self.encoder.special.finditer(before)]
        return before[starts[-1] :] if starts else before[-16:]


def _require_shown(whole: str, messages: Sequence[Message], source: str, tools: Sequence[Any]) -> None:
    """Raises TrainError where the template leaves out tools, calls of tools, or their results: it would do so in silence."""
    names = [tool["function"]["name"] for tool in tools]
    names += [call["function"]["name"] for message in messages for call in message.tool_calls]
    results = [message.content.strip() for message in messages if message.role == "tool"]
    missing = [text for text in (*names, *results) if text not in whole]
    if missing:
        raise TrainError(
            f"{source}: the row brings tools, and the chat template leaves out {missing[0][:60]!r}",
            "Leave such rows out, or set data.template to a template that shows tools (Qwen2.5's and Llama 3.1's own do).",
        )
