"""Datasets of hubs. What stands behind `datasets.load_dataset` is a folder here: it takes one as it takes an id."""

import sys
import types

import pytest

from trainer import dataset_hub
from trainer.rows import read_rows, source_files
from trainer.spec import DataFile, TrainError


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A dataset with two subsets, as its repository on a hub looks."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    (folder / "two").mkdir(parents=True)
    (folder / "one.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    (folder / "two" / "x.jsonl").write_text('{"text": "鸟"}\n', encoding="utf-8")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n"
        "  data_files:\n  - split: test\n    path: two/x.jsonl\n---\n",
        encoding="utf-8",
    )
    source_files.cache_clear()
    return folder


def texts(path, **settings):
    return [row.text for row in read_rows((DataFile(str(path), "auto", **settings),), 0)]


def test_subsets_and_splits(repository):
    assert texts(repository, kind="hub", subset="one") == ["a", "b"]
    assert texts(repository, kind="hub", subset="one", max_rows=1) == ["a"]
    assert texts(repository, kind="hub", subset="two", split="test") == ["鸟"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"subset": "nine"}, "'nine' not found"), ({"subset": "two"}, 'Unknown split "train"'), ({}, "'one', 'two'")],
)
def test_what_there_is_instead_is_said(repository, settings, expected):
    with pytest.raises(TrainError) as caught:
        texts(repository, kind="hub", **settings)
    assert expected in caught.value.message
    assert caught.value.exit_code == 2


def test_without_network(monkeypatch, tmp_path):
    with pytest.raises(TrainError, match="HF_HUB_OFFLINE forbids a download") as caught:
        dataset_hub.fetch(DataFile("someone/nothing-of-that-name", "auto", kind="hub"))
    assert "HF_ENDPOINT" in caught.value.hint


def test_modelscope(repository, monkeypatch):
    kinds = types.ModuleType("modelscope.hub.errors")
    names = (
        "NotExistError", "NoValidRevisionError", "InvalidParameter", "NotLoginException", "RequestError", "FileDownloadError", "FileIntegrityError"
    )  # fmt: skip
    for name in names:
        setattr(kinds, name, type(name, (Exception,), {}))
    hub, package = types.ModuleType("modelscope.hub"), types.ModuleType("modelscope")
    hub.errors = kinds
    asked = []

    def download(name):
        asked.append(name)
        if name == "me/gone":
            raise kinds.NotExistError("gone")
        if name == "me/cut":
            raise kinds.FileDownloadError("cut")
        return str(repository)

    package.dataset_snapshot_download = download
    for name, module in (("modelscope", package), ("modelscope.hub", hub), ("modelscope.hub.errors", kinds)):
        monkeypatch.setitem(sys.modules, name, module)
    assert texts("me/data", kind="modelscope", subset="one") == ["a", "b"]
    assert asked == ["me/data"]
    for name, code in (("me/gone", 2), ("me/cut", 75)):
        with pytest.raises(TrainError, match=name) as caught:
            texts(name, kind="modelscope")
        assert caught.value.exit_code == code


def test_modelscope_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(TrainError) as caught:
        dataset_hub.fetch(DataFile("me/data", "auto", kind="modelscope"))
    assert "pip install modelscope" in caught.value.hint
