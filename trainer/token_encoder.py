"""A tokenizer as layouts use it: text in pieces -> token ids, with nothing added or cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


class TokenEncoder:
    """`special` finds the special tokens in a text, `added` those and all others that were added to the vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            # tokenizer.json may bring either; documents are cut, and rows filled, by us.
            self._backend.no_truncation()
            self._backend.no_padding()
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(t) for t in added if t.special} | set(tokenizer.all_special_tokens)
        self.special, self.added = any_of(special), any_of(special | {str(t) for t in added})

    def takes_space_before(self, token: str) -> bool:
        """Whether this added token swallows spaces in front of it: then a text cannot be cut there."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        return any(t.lstrip for t in added if str(t) == token)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, by one (parallel) call."""
        if self._backend is None:
            return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def any_of(tokens: set[str]) -> re.Pattern[str]:
    """Pattern of any of these texts, the longest first; of nothing, when there are none."""
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or r"(?!)")
