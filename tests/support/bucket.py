"""A bucket on this machine: a real S3 server (moto), which s3fs talks to over HTTP."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .commands import wait_until

NAME = "bucket"


@contextlib.contextmanager
def bucket(log: Path) -> Iterator[dict[str, str]]:
    """An empty bucket called `NAME`. Gives what a client's environment must hold; the server ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(log, "wb") as out, subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: _listens(port) or server.poll() is not None, 30, "the S3 server")
            assert server.poll() is None, log.read_text(encoding="utf-8")
            env = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "canary-4711-secret",
            }
            make = f"import s3fs; s3fs.S3FileSystem().mkdir('{NAME}')"
            subprocess.run([sys.executable, "-c", make], env={**os.environ, **env}, check=True)
            yield env
        finally:
            server.kill()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False
