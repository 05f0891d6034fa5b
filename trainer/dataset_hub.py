"""Datasets of the Hugging Face Hub and of ModelScope as local Arrow files, fetched once by `datasets`. No code of theirs is run."""

from __future__ import annotations

from pathlib import Path

from .modelscope_hub import download
from .spec import EXIT_RETRY, DataFile, TrainError

OTHER_SOURCES = (
    "Other ways to the same rows: a mirror (HF_ENDPOINT=https://hf-mirror.com), modelscope:ORG/NAME as the path, or files "
    "that you have copied here."
)


def fetch(source: DataFile) -> list[Path]:
    """The Arrow files of the source's subset and split, in order. Raises TrainError (2, or 75 where the network fails).

    Side effects: files in the cache of `datasets` (HF_HOME), and of ModelScope.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    # load_dataset takes a folder as it takes an id; it never runs a dataset's own script (datasets >= 4).
    place = source.path if source.kind == "hub" else str(download("dataset", source.path, "its id"))
    name = f"{source.path}{f':{source.subset}' if source.subset else ''}, split {source.split}"
    try:
        found = datasets.load_dataset(place, source.subset or None, split=source.split)
    except (ConnectionError, TimeoutError) as e:
        raise _no_network(name) from e
    except (FileNotFoundError, ValueError, DatasetsError) as e:
        raise TrainError(
            f"the dataset {name} cannot be read: {e}",
            "Check the spelling of ORG/NAME:SUBSET and of `split`; a private dataset needs HF_TOKEN.\n" + OTHER_SOURCES,
        ) from e
    files = [Path(entry["filename"]) for entry in getattr(found, "cache_files", [])]
    if not files:
        raise TrainError(f"the dataset {name} holds no rows", OTHER_SOURCES)
    return files


def _no_network(name: str) -> TrainError:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return TrainError(
            f"the dataset {name} is not in the local cache, and HF_HUB_OFFLINE forbids a download",
            f"Unset HF_HUB_OFFLINE, or fetch it on a machine with network and copy the cache. {OTHER_SOURCES}",
        )
    return TrainError(
        f"the Hub cannot be reached for the dataset {name}", f"Check the network. {OTHER_SOURCES}", EXIT_RETRY
    )
