"""transformers without torch, for stages that need no model: its import takes a third of the time.

Measured with transformers 5.23 and torch 2.13: a tokenizer is there after 2.0 s, and with torch after 5.7 s.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SILENCE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_needs_no_model = False


def no_model_is_needed() -> None:
    """Said once by a process that ends with its stage. Before it `without_torch` does nothing."""
    global _needs_no_model
    _needs_no_model = True


@contextmanager
def without_torch(has_own_code: bool = False) -> Iterator[None]:
    """What is imported within finds no torch; transformers then keeps to tokenizers and configurations for good.

    Does nothing where torch or transformers is there already, or where the model folder `has_own_code`, which may need it.
    """
    if not _needs_no_model or has_own_code or not sys.modules.keys().isdisjoint(("torch", "transformers")):
        yield
        return
    told = os.environ.get(_SILENCE)
    os.environ[_SILENCE] = "1"  # "PyTorch was not found"
    sys.modules["torch"] = None  # type: ignore[assignment]  # documented: import and find_spec then find nothing
    try:
        yield
    finally:
        del sys.modules["torch"]
        if told is None:
            del os.environ[_SILENCE]
        else:
            os.environ[_SILENCE] = told
