"""The token of a Ray cluster: found where Ray itself looks, read when it is used, and kept nowhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .job import ClusterError

TOKEN, TOKEN_PATH, TOKEN_FILE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"
HOW_TO_GET_ONE = (
    f"Ray looks for it in {TOKEN}, then in the file that {TOKEN_PATH} names, then in {TOKEN_FILE}. "
    "Ask for the cluster's own; a new one is made by: ray get-auth-token --generate"
)


@dataclass(frozen=True)
class Token:
    """What is sent as `Authorization: Bearer`. Its value is in no representation and no error."""

    value: str = field(repr=False)
    source: str
    """Where it was found, for people."""


def read_token(env: Mapping[str, str]) -> Token | None:
    """The token, in Ray's own order (its token-auth page; Ray 2.52 and newer); None where there is none.

    Raises ClusterError where the place that counts holds nothing usable: a later one is then not looked at, as in Ray.
    """
    if env.get(TOKEN):
        return _checked(env[TOKEN], TOKEN)
    if env.get(TOKEN_PATH):
        source = f"the file that {TOKEN_PATH} names"
        try:
            return _checked(Path(env[TOKEN_PATH]).expanduser().read_text(encoding="utf-8"), source)
        except (OSError, UnicodeDecodeError):
            raise ClusterError(f"{source} cannot be read: {env[TOKEN_PATH]}", HOW_TO_GET_ONE) from None
    home = Path(env.get("HOME") or os.path.expanduser("~"))
    path = home / TOKEN_FILE.removeprefix("~/")
    try:
        return _checked(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None
    except (OSError, UnicodeDecodeError):
        raise ClusterError(f"{path} cannot be read", HOW_TO_GET_ONE) from None


def _checked(text: str, source: str) -> Token:
    """Checked here because an HTTP library that meets a line break in a header shows the header in its error."""
    value = text.strip()
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        what = "is empty" if not value else "is no token: it holds spaces, line breaks or characters outside ASCII"
        raise ClusterError(f"what {source} holds {what}", HOW_TO_GET_ONE)
    return Token(value, source)
