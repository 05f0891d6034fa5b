"""Files that matter: JSON read with limits, writes that survive a power cut, folders that appear whole or not at all.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .spec import TrainError

MAX_JSON_BYTES = 256 * 2**20


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. Raises TrainError, naming the file, for anything else: absent, too large, not UTF-8, not an object."""
    try:
        size = regular_size(path)
        if size > max_bytes:
            raise TrainError(f"{path}: {size} bytes of JSON, more than the limit of {max_bytes}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise TrainError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise TrainError(f"{path}: is not valid JSON: {e}", "The file is damaged; fetch or write it again.") from e
    if not isinstance(value, dict):
        raise TrainError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def regular_size(path: Path) -> int:
    """Bytes of a regular file. Raises OSError when it is absent, TrainError when it is a pipe, device or folder (reading one could wait for ever)."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise TrainError(f"{path}: is not a regular file")
    return status.st_size


def storage_error(error: OSError, path: Path, kept: str = "") -> TrainError:
    """The error for a write to `path` that the system refused; `kept` says in a sentence what is still whole."""
    remedy = {
        errno.ENOSPC: "Free some space on that disk, or write to another one.",
        errno.EDQUOT: "Your disk quota is used up: free some space, or write to another disk.",
        errno.EROFS: "That disk is mounted read-only: write to another one.",
        errno.EFBIG: "The file is larger than the limit of this shell or disk: see `ulimit -f`.",
        errno.EIO: "The disk itself failed (see dmesg): write to another one.",
        errno.EACCES: "You may not write there: change the owner or mode, or write elsewhere.",
    }.get(error.errno or 0, "Write to another place.")
    return TrainError(f"cannot write {path}: {error.strerror or error}", f"{remedy} {kept}".strip())


@contextlib.contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """Turn an OSError of the block into `storage_error`."""
    try:
        yield
    except OSError as e:
        raise storage_error(e, path, kept) from e


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str, kept: str = "") -> None:
    """Temporary name, fsync, rename: readers see the old content or the new, never a part. Raises TrainError."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with writing(path, kept):
        try:
            with open(temporary, "w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def write_json(path: Path, value: Any, kept: str = "") -> None:
    """Indented UTF-8, written as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", kept)


def refuse_existing(folder: Path) -> None:
    """Raises TrainError when anything stands at `folder`."""
    if os.path.lexists(folder):
        raise TrainError(f"{folder} exists", "Nothing was changed. Give another --out, or move that folder away first.")


def require_space(folder: Path, nbytes: int) -> None:
    """Raises TrainError when the disk of `folder` (which need not exist yet) has less than `nbytes` free."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise TrainError(
            f"{os.strerror(errno.ENOSPC)}: {folder} needs {nbytes / 1e9:.2f} GB, the disk of {existing} has {free / 1e9:.2f} GB free",
            "Nothing was written. Free some space on that disk, or write to another one.",
        )


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name; renamed to `final` when the block ends well, removed when it does not.

    Raises TrainError when `final` exists. Left-overs of a killed process of this host are removed first.
    """
    refuse_existing(final)
    partial = final.with_name(f".{final.name}.partial-{socket.gethostname()}-{os.getpid()}")
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        partial.mkdir()
    try:
        yield partial
        publish_folder(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _remove_leftovers(final: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(final.name)}\.partial-{re.escape(socket.gethostname())}-([1-9][0-9]*)")
    for path in final.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)


def publish_folder(partial: Path, final: Path) -> None:
    """Flush every file of `partial` to the disk, then rename it to `final`. Raises TrainError when `final` exists."""
    with writing(final):
        for folder, _, files in os.walk(partial):
            for name in files:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
    refuse_existing(final)
    with writing(final):
        os.rename(partial, final)
        fsync_path(final.parent)
