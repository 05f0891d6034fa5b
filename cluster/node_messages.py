"""What the launcher and the agent on a host say to each other: one JSON object a line, through ssh's standard input and output."""

from __future__ import annotations

import contextlib
import json
from typing import Any

_MARK = b"@tunelaunch "
"""Begins each message: a login shell may print a greeting before the agent runs."""
_LONGEST_LINE = 64 * 2**20


def encode(message: dict[str, Any]) -> bytes:
    """One line; text of any language passes every locale as ASCII."""
    return _MARK + json.dumps(message).encode() + b"\n"


class Decoder:
    """Bytes as they arrive -> messages; what is none is kept apart."""

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, data: bytes) -> tuple[list[dict[str, Any]], list[str]]:
        """(the messages that are complete now, the other lines in between)."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-_LONGEST_LINE:]
        messages: list[dict[str, Any]] = []
        others: list[str] = []
        for line in lines:
            value: Any = None
            if line.startswith(_MARK):
                with contextlib.suppress(ValueError):
                    value = json.loads(line[len(_MARK) :])
            if isinstance(value, dict):
                messages.append(value)
            elif line.strip():
                others.append(line.decode("utf-8", errors="replace").rstrip())
        return messages, others
