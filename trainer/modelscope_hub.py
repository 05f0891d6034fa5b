"""Downloads from ModelScope by its own package, which is not among the dependencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .spec import EXIT_RETRY, TrainError


def download(kind: str, location: str, check: str, **how: Any) -> Path:
    """The folder in ModelScope's cache that holds a "model" or "dataset". `check`: where its id stands; `how`: its function's arguments.

    Raises TrainError: 2 for a missing package or an id that it does not give out, 75 where the network fails.
    """
    name = location if kind == "model" else f"the dataset {location}"
    try:
        import modelscope  # pyright: ignore[reportMissingImports]
        from modelscope.hub import errors  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise TrainError(
            f"{location} comes from ModelScope, and the package `modelscope` is not installed",
            "Install it: pip install modelscope",
        ) from e
    fetch = modelscope.snapshot_download if kind == "model" else modelscope.dataset_snapshot_download
    refused = (errors.NotExistError, errors.NoValidRevisionError, errors.InvalidParameter, errors.NotLoginException)
    broken = (errors.RequestError, errors.FileDownloadError, errors.FileIntegrityError)
    try:
        return Path(fetch(location, **how))
    except (*refused, ValueError) as e:
        raise TrainError(
            f"ModelScope does not give out {name}: {e}",
            f"Check the spelling of {check}; a private {kind} needs `modelscope login`.",
        ) from e
    except (*broken, ConnectionError, TimeoutError) as e:
        raise TrainError(f"{name} could not be downloaded from ModelScope: {e}", "Try again later.", EXIT_RETRY) from e
