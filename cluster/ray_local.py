"""A Ray that a job starts for itself on this host: its folder, its token, and that none of it is left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "tl-ray-"
_LOCK = "in_use"
OBJECT_STORE_BYTES = 128 * 2**20
"""Nothing large goes through Ray: workers read and write files. Ray's default would take a third of the memory."""


@contextlib.contextmanager
def local_folder() -> Iterator[Path]:
    """A private folder for the sockets and logs of one Ray; gone afterwards, and so are those that killed jobs left.

    It lies in /tmp whatever $TMPDIR says: paths of sockets may have 107 bytes, and Ray appends some 80.
    """
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
    # Held as long as this process lives, however it ends: pids would mean nothing in another container with the same /tmp.
    with open(folder / f"{_LOCK}.new", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, folder / _LOCK)  # found only once it is held
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_token(folder: Path) -> Path:
    """A new token of 256 bits in a file that only this user can read; the processes of this Ray are told its path."""
    path = folder / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(secrets.token_hex(32))
    return path


def local_env(token: Path) -> dict[str, str]:
    """Variables of a Ray of our own. They overrule what the user set for a cluster."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def sweep() -> None:
    """Remove folders of this user whose job no longer lives."""
    for folder in Path("/tmp").glob(f"{_PREFIX}*"):
        # Another user's, or one that another job removes at this moment.
        with contextlib.suppress(OSError), open(folder / _LOCK, "r+", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
