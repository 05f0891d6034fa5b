"""What a submission sends: exactly the recipe and the files it names, under names that work on the cluster."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.errors import LaunchError, RecipeError
from launcher.recipe import LoadedRecipe, load_recipe
from launcher.upload import Item, collect, pack, page, parse_size, require_size

ROW = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with more in it than a submission may send."""
    work = tmp_path / "my 'work' 目录"
    for name in (
        "r.yaml",
        "base.yaml",
        "rows.jsonl",
        "多 行's.jsonl",
        "sub/rows.jsonl",
        ".env",
        ".git/config",
        "t.jinja",
    ):
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROW, encoding="utf-8")
    for name in ("tiny/config.json", "tiny/tokenizer.json", "tiny/model.safetensors", "tiny/notes.txt"):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("{}", encoding="utf-8")
    return work


def load(folder: Path, text: str, elsewhere: Sequence[Path] = ()) -> LoadedRecipe:
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "r.yaml", (), elsewhere)


def unpacked(items: list[Item], target: Path) -> Path:
    package = pack(items)
    with zipfile.ZipFile(package.file) as archive:
        assert archive.testzip() is None
        archive.extractall(target)
    package.file.close()
    return target / items[0].name


def test_a_chain_with_its_files_loads_to_an_equal_recipe_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / "base.yaml").write_text("model: random:tiny\nmethod: lora\ntrain: {epochs: 2}\n", encoding="utf-8")
    loaded = load(
        folder,
        'extends: base.yaml\ndata:\n  files: [rows.jsonl, sub/rows.jsonl, "多 行\'s.jsonl"]\n'
        "  held_out_files: [.//sub/../t.jinja]\n  template: t.jinja\nsecrets: [HF_TOKEN]\n",
    )
    items = collect(loaded, ())
    assert [item.name for item in items] == [
        "r.yaml",
        "data/rows.jsonl",
        "data/2/rows.jsonl",
        "data/多 行's.jsonl",
        "data/t.jinja",
        "model/config.json",
        "model/tokenizer.json",
    ]
    there = load_recipe(unpacked(items, tmp_path / "cluster"))
    assert [Path(f.path).relative_to(tmp_path / "cluster").as_posix() for f in there.recipe.data.files] == [
        "data/rows.jsonl",
        "data/2/rows.jsonl",
        "data/多 行's.jsonl",
    ]
    assert there.name == loaded.name
    assert there.recipe.secrets == loaded.recipe.secrets
    assert there.recipe.train == loaded.recipe.train
    for before, after in zip(loaded.recipe.data.files, there.recipe.data.files, strict=True):
        assert Path(before.path).read_bytes() == Path(after.path).read_bytes()
    sent = sorted(
        p.relative_to(tmp_path / "cluster").as_posix() for p in (tmp_path / "cluster").rglob("*") if p.is_file()
    )
    assert sent == sorted(item.name for item in items)
    assert all(str(item.size) in page(items) or "KB" in page(items) for item in items)


def test_links_are_read_through_and_shown(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "far.jsonl").write_text(ROW * 2, encoding="utf-8")
    (folder / "link.jsonl").symlink_to(tmp_path / "far.jsonl")
    items = collect(load(folder, "model: a/b\nmethod: lora\ndata: link.jsonl\n"), ())
    assert [(i.name, i.size) for i in items[1:]] == [("data/link.jsonl", 2 * len(ROW))]
    assert f"-> {tmp_path / 'far.jsonl'}" in page(items)
    unpacked(items, tmp_path / "cluster")
    assert not (tmp_path / "cluster" / "data" / "link.jsonl").is_symlink()


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".env.local",
        ".git/config",
        "checkpoints/step_000010/rows.jsonl",
        ".netrc",
        "huggingface/token",
        "id_rsa",
    ],
)
@pytest.mark.parametrize("by_link", [False, True])
def test_what_is_never_sent_is_refused_also_behind_a_link(folder: Path, name: str, by_link: bool) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(ROW, encoding="utf-8")
    if by_link:
        (folder / "link.jsonl").symlink_to(folder / name)
    loaded = load(folder, f"model: a/b\nmethod: lora\ndata: {'link.jsonl' if by_link else name}\n")
    with pytest.raises(RecipeError, match="is not sent") as caught:
        collect(loaded, ())
    assert f"{folder / 'r.yaml'}:3" in str(caught.value)


def test_what_only_resembles_it_is_sent(folder: Path) -> None:
    (folder / "id_train").mkdir()
    (folder / "id_train" / "token.jsonl").write_text(ROW, encoding="utf-8")
    items = collect(load(folder, "model: a/b\nmethod: lora\ndata: id_train/token.jsonl\n"), ())
    assert [i.name for i in items[1:]] == ["data/token.jsonl"]


@pytest.mark.parametrize("source", ["./tiny", "m.gguf"])
def test_local_models_are_refused_with_what_to_do(folder: Path, source: str) -> None:
    (folder / "m.gguf").write_bytes(b"GGUF")
    loaded = load(folder, f"model: {source}\nmethod: lora\ndata: rows.jsonl\n")
    with pytest.raises(RecipeError, match="models are not sent") as caught:
        collect(loaded, ())
    assert "Hub id" in str(caught.value)
    assert f"--shared {folder}" in str(caught.value)


@pytest.mark.parametrize("source", ["Qwen/Qwen2.5-7B-Instruct", "modelscope:Qwen/Qwen2.5-7B", "package:some/x.gguf"])
def test_models_that_the_cluster_finds_itself_stay_as_written(folder: Path, source: str) -> None:
    items = collect(load(folder, f"model: {source}\nmethod: lora\ndata: rows.jsonl\n"), ())
    assert f"source: {source}" in items[0].text.replace('"', "")
    assert len(items) == 2


def test_shared_folders_are_named_not_sent_and_need_not_exist_here(folder: Path) -> None:
    text = "model: /shared/models/q\nmethod: lora\ndata: [/shared/a b.jsonl, rows.jsonl]\n"
    with pytest.raises(RecipeError, match="does not exist"):
        load(folder, text)
    shared = [Path("/shared")]
    items = collect(load(folder, text, shared), shared)
    assert [item.name for item in items] == ["r.yaml", "data/rows.jsonl"]
    assert "source: /shared/models/q" in items[0].text
    assert "/shared/a b.jsonl" in items[0].text
    for outside in ("/shared2/q", "/shared/../etc/q", "/sharedx"):
        with pytest.raises(RecipeError, match="does not exist"):
            load(folder, f"model: {outside}\nmethod: lora\ndata: rows.jsonl\n", shared)


def test_over_the_limit_the_largest_files_are_named(folder: Path) -> None:
    with (folder / "rows.jsonl").open("wb") as f:
        f.truncate(3_000_000)
    items = collect(load(folder, "model: a/b\nmethod: lora\ndata: [rows.jsonl, sub/rows.jsonl]\n"), ())
    require_size(items, 4_000_000)
    with pytest.raises(LaunchError, match=r"3\.0 MB, the limit is 1\.0 MB") as caught:
        require_size(items, 1_000_000)
    lines = str(caught.value).splitlines()
    assert lines[1].split() == ["3.0", "MB", *str(folder / "rows.jsonl").split()]
    assert "--upload-limit" in str(caught.value)
    assert "--shared" in str(caught.value)


def test_the_name_of_an_upload_follows_from_its_contents_alone(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder, "model: a/b\nmethod: lora\ndata: rows.jsonl\n")
    first = pack(collect(loaded, ()))
    (folder / "rows.jsonl").touch()
    assert pack(collect(loaded, ())).name == first.name
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert pack(collect(load_recipe(moved / "r.yaml"), ())).name == first.name
    (moved / "rows.jsonl").write_text(ROW.replace("x", "z"), encoding="utf-8")
    assert pack(collect(load_recipe(moved / "r.yaml"), ())).name != first.name


@pytest.mark.parametrize(("text", "size"), [("100MB", 10**8), ("1.5 gb", 15 * 10**8), ("2000", 2000), ("7k", 7000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1MB", "1TB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(LaunchError, match="is not a size"):
        parse_size(text)
