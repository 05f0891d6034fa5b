"""Copies of checkpoints in a bucket: written whole, read back, and only then given their manifest.

    URL/RUN_ID/
        recipe.yaml, plan.json, status.json, ...    what the run folder is made again from
        checkpoints/step_000200/                    as in the run folder; without manifest.json it is no checkpoint

Any file system of fsspec that `PACKAGES` names. Nothing here imports torch, and fsspec only once a bucket is opened.
Source: filesystem-spec.readthedocs.io, AbstractFileSystem.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .checkpoint_format import MANIFEST, ShardFile, read_manifest, step_of, verify
from .disk import fsync_path, new_folder, require_space, writing
from .spec import EXIT_RETRY, EXIT_USER, TrainError

PACKAGES = {
    "file": "",
    "s3": "s3fs",
    "gs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "oss": "ossfs",
}
"""Scheme of the URL -> the package that knows it; "" where nothing has to be installed."""
READ_BYTES = 2**25
PARALLEL_FILES = 4
"""Each may hold a few parts of its file in memory (s3fs: ten of 50 MB)."""
CHECKPOINTS = "checkpoints"
_NEED_A_PERSON = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError")
"""What the clients raise without credentials; they share no base class that fsspec knows."""


class DamagedCopyError(TrainError):
    """What is in the bucket is not what its manifest says."""


class Storage:
    """One run's folder in a bucket. Every method raises TrainError: exit code 2 for what a person must mend (no such
    bucket, no right to it), 75 for what may pass."""

    def __init__(self, url: str, on_progress: Callable[[], None] = lambda: None) -> None:
        """`url` is that of the run's folder. `on_progress` is called whenever bytes have moved, from any thread."""
        self.url, self._on_progress = url.rstrip("/"), on_progress
        scheme = url.partition("://")[0]
        self._is_local = scheme == "file"
        with self._doing("open"):
            try:
                from fsspec.core import url_to_fs

                # A listing that is remembered would hide what another process has written since.
                self._fs, self._root = url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
            except ImportError as e:
                raise TrainError(
                    f"{url}: the package for {scheme}:// is missing ({e})",
                    f"Install it where the run works, on every host: pip install {PACKAGES.get(scheme) or 'fsspec'}",
                ) from e

    def probe(self) -> None:
        """Write, read and remove a small file, as a checkpoint will be: what is wrong shows before hours of training."""
        path = f"{self._root}/.probe"
        self._put_bytes(b"tunelaunch", path)
        with self._doing("remove a file from"):
            self._fs.rm_file(path)

    def steps(self) -> list[tuple[int, str]]:
        """(step, path in the bucket) of each whole checkpoint, newest first."""
        return [(step, path) for step, path, is_whole in self._step_folders() if is_whole]

    def put_checkpoint(self, folder: Path, keep: int, beside: Iterable[Path] = ()) -> bool:
        """Copy a checkpoint, and the files `beside` that make a run folder of it; False when it was there already.

        Read back and compared with the manifest before the manifest itself is written. Then all but the newest `keep` go.
        """
        manifest, there = (folder / MANIFEST).read_bytes(), f"{self._root}/{CHECKPOINTS}/{folder.name}"
        if self._read(f"{there}/{MANIFEST}") == manifest:
            return False
        with self._doing("replace a checkpoint in"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{there}/{MANIFEST}")
        read = read_manifest(folder)
        with ThreadPoolExecutor(min(len(read.files), PARALLEL_FILES), "storage") as threads:
            list(threads.map(lambda s: self._put_shard(folder / s.file, f"{there}/{s.file}", s), read.files))
        for path in beside:
            if path.is_file():
                self._put_bytes(path.read_bytes(), f"{self._root}/{path.name}")
        self._put_bytes(manifest, f"{there}/{MANIFEST}")
        self._prune(read.step, keep)
        return True

    def fetch_checkpoint(self, path: str, into: Path) -> Path:
        """Bring one of `steps` into the folder `into`, verified; returns its folder there, which must not exist before.

        Raises DamagedCopyError, and then leaves nothing.
        """
        final = into / path.rpartition("/")[2]
        with self._doing("list"):
            entries = [entry for entry in self._fs.ls(path, detail=True) if entry["type"] == "file"]
        require_space(into, sum(entry["size"] or 0 for entry in entries))
        with new_folder(final) as partial:
            for entry in entries:
                self._get(entry["name"], entry["size"], partial / entry["name"].rpartition("/")[2])
            problems = verify(partial)
            if problems:
                raise DamagedCopyError(f"{self.url}: {final.name} is damaged: {'; '.join(problems[:3])}")
        return final

    def fetch_files(self, names: Iterable[str], into: Path) -> list[str]:
        """Bring the files that were put `beside` a checkpoint into the folder `into`; returns those that are not there."""
        missing = []
        for name in names:
            content = self._read(f"{self._root}/{name}")
            if content is None:
                missing.append(name)
                continue
            with writing(into / name):
                (into / name).write_bytes(content)
        return missing

    def _step_folders(self) -> list[tuple[int, str, bool]]:
        """(step, path, whether it has a manifest) of each step folder, newest first."""
        with self._doing("list"):
            try:
                entries = self._fs.ls(f"{self._root}/{CHECKPOINTS}", detail=False)
            except FileNotFoundError:
                return []
            paths = {str(entry).rstrip("/") for entry in entries}
            found = [(step_of(path.rpartition("/")[2]), path) for path in paths]
            steps = sorted(((step, path) for step, path in found if step is not None), reverse=True)
            return [(step, path, self._is_there(f"{path}/{MANIFEST}")) for step, path in steps]

    def _is_there(self, path: str) -> bool:
        """Not fsspec's `exists`, which takes any error for a no: what is no checkpoint is removed."""
        try:
            self._fs.info(path)
        except FileNotFoundError:
            return False
        return True

    def _prune(self, newest_step: int, keep: int) -> None:
        """Remove all but the newest `keep`, and what a copy that was cut off has left. As `saver.prune`, a later step
        than the newest counts for nothing."""
        found = self._step_folders()
        whole = [path for step, path, is_whole in found if is_whole and step <= newest_step]
        cut_off = [path for _, path, is_whole in found if not is_whole]
        for path in (*whole[keep:], *cut_off):
            with self._doing("remove an old checkpoint from"):
                # First: what is half removed must not look like a checkpoint.
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(f"{path}/{MANIFEST}")
                self._fs.rm(path, recursive=True)

    def _put_shard(self, file: Path, path: str, shard: ShardFile) -> None:
        from fsspec.callbacks import Callback

        moved = Callback(hooks={"moved": lambda *_, **__: self._on_progress()})
        with self._doing("write to"):
            if self._is_local:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            self._fs.put_file(str(file), path, callback=moved)
            if self._is_local:
                fsync_path(Path(path))
        digest = hashlib.sha256()
        for start in range(0, shard.bytes, READ_BYTES):
            with self._doing("read from"):
                digest.update(self._fs.cat_file(path, start=start, end=min(start + READ_BYTES, shard.bytes)))
            self._on_progress()
        if digest.hexdigest() != shard.sha256:
            raise TrainError(
                f"{self.url}: {file.name} is read back as other bytes than were written",
                "It is copied again with the next checkpoint.",
                EXIT_RETRY,
            )

    def _put_bytes(self, content: bytes, path: str) -> None:
        """A small file, which readers see whole or not at all, read back."""
        with self._doing("write to"):
            if self._is_local:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                self._fs.pipe_file(f"{path}.tmp", content)
                fsync_path(Path(f"{path}.tmp"))
                os.replace(f"{path}.tmp", path)
                fsync_path(Path(path).parent)
            else:
                self._fs.pipe_file(path, content)
        if self._read(path) != content:
            raise TrainError(f"{self.url}: {path} is read back as other bytes than were written", "", EXIT_RETRY)
        self._on_progress()

    def _read(self, path: str) -> bytes | None:
        """None when there is no such file."""
        with self._doing("read from"):
            try:
                return self._fs.cat_file(path)
            except FileNotFoundError:
                return None

    def _get(self, path: str, size: int, file: Path) -> None:
        """In pieces, so that a failing disk here and a failing bucket there are told apart."""
        with writing(file), open(file, "wb") as out:
            for start in range(0, size, READ_BYTES):
                with self._doing("read from"):
                    block = self._fs.cat_file(path, start=start, end=min(start + READ_BYTES, size))
                out.write(block)
                self._on_progress()

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        try:
            yield
        except TrainError:
            raise
        except Exception as e:  # the clients of the vendors share no base class
            raise _told(e, f"cannot {what} {self.url}") from e


def _told(error: Exception, what: str) -> TrainError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = f"{what}: {lines[0][:300]}"
    if isinstance(error, PermissionError) or type(error).__name__ in _NEED_A_PERSON:
        hint = (
            "There are no credentials, or they do not allow it. For `launch runs fetch` they are set here; for a run, where its "
            "workers start, and are named in the recipe: secrets: [AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY]"
        )
        return TrainError(message, hint, EXIT_USER)
    if isinstance(error, (FileNotFoundError, ValueError, NotADirectoryError)):
        return TrainError(message, "Does the bucket or folder exist? storage.url names it.", EXIT_USER)
    return TrainError(message, f"Is it reachable from this host ({os.uname().nodename})?", EXIT_RETRY)
