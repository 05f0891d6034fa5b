"""Data files of every kind: the same rows, whatever the file; and what is said of one that is broken."""

import gzip
import json
import random
import tracemalloc

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from trainer import row_files
from trainer.data_paths import data_files
from trainer.row_files import read_values
from trainer.row_values import RowError
from trainer.spec import TrainError

ROWS = [{"instruction": f'第{i}\n"行"', "output": "ответ 😀 " * (i % 5)} for i in range(2500)]


def write(path, rows):
    """`rows` in the kind of file that the name says."""
    kind = path.name.partition(".")[2]
    if kind in ("parquet", "arrow", "stream.arrow"):
        table = pa.Table.from_pylist(rows)
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=700)
        else:
            new = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
            with new(str(path), table.schema) as out:
                out.write_table(table, max_chunksize=900)
        return path
    if "csv" in kind or "tsv" in kind:
        import csv
        import io

        text = io.StringIO()
        out = csv.DictWriter(text, rows[0], delimiter="\t" if "tsv" in kind else ",", lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
        data = text.getvalue().encode()
    elif "jsonl" in kind:
        data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    else:
        data = json.dumps(rows, indent=1).encode()
    if kind.endswith("gz"):
        data = gzip.compress(data)
    if kind.endswith("zst"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as out:
            out.write(data)
        data = sink.getvalue().to_pybytes()
    path.write_bytes(data)
    return path


KINDS = [
    "json", "jsonl", "json.gz", "jsonl.gz", "json.zst", "jsonl.zst", "csv", "tsv", "csv.gz", "csv.zst", "parquet", "arrow", "stream.arrow",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_hold_the_same_rows(tmp_path, kind):
    found = list(read_values(write(tmp_path / f"rows.{kind}", ROWS)))
    assert [row for _, row in found] == ROWS
    numbers = [number for number, _ in found]
    assert numbers == sorted(set(numbers))
    if kind in ("jsonl", "jsonl.zst", "parquet", "arrow", "stream.arrow"):
        assert numbers == list(range(1, len(ROWS) + 1))
    if kind == "csv":
        assert numbers[:3] == [2, 4, 6], "a quoted field of each row holds a line end"
    if kind == "json":
        assert numbers[:2] == [2, 6], "indented: four lines a row"


@pytest.mark.parametrize("kind", ["json.gz", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "stream.arrow"])
def test_a_file_that_breaks_off_is_said_to_be_damaged(tmp_path, kind):
    path = write(tmp_path / f"rows.{kind}", ROWS)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(TrainError, match="is damaged") as caught:
        list(read_values(path))
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_what_a_file_begins_with_decides_not_its_name(tmp_path):
    write(tmp_path / "rows.jsonl.gz", ROWS[:3]).rename(tmp_path / "rows.jsonl")
    assert [row for _, row in read_values(tmp_path / "rows.jsonl")] == ROWS[:3]
    write(tmp_path / "rows.parquet", ROWS[:3]).rename(tmp_path / "rows.json")
    assert [row for _, row in read_values(tmp_path / "rows.json")] == ROWS[:3]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1000])
def test_arrays_are_cut_anywhere(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(row_files, "CHUNK", chunk)
    rows = [1, -2.5e-7, "", "]", '"\\,[', {"a": [1, {"b": "\u2028é😀"}], "c": None}, True, [], {}, "x" * 300]
    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=2, ensure_ascii=False),
        json.dumps(rows, separators=(",", ":")),
    ):
        (tmp_path / "d.json").write_text(text + "\n\n", encoding="utf-8")
        found = list(read_values(tmp_path / "d.json"))
        assert [value for _, value in found] == rows
        assert [line for line, _ in found] == [_line_of(text, i, rows) for i in range(len(rows))]


def _line_of(text, i, rows):
    """Line of element i, found by decoding all before it from the start."""
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    for n in range(len(rows)):
        while text[at] in " ,\n":
            at += 1
        if n == i:
            return text.count("\n", 0, at) + 1
        at = decoder.raw_decode(text, at)[1]
    raise AssertionError


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[{"a": 1},\n{"a": }]', 2, "Expecting value"),
        ('[{"a": 1}\n{"a": 2}]', 2, "Expecting ',' or ']' between rows"),
        ('[{"a": 1},\n{"a": "x\n"}]', 2, "Invalid control character"),
        ('[{"a": 1},\n{"a": 2},\n', 3, "the array is not closed"),
        ('[{"a": 1},\n{"a": "never closed', 2, "Unterminated string"),
        ('[{"a": 1}]\n{"a": 2}', 2, "something follows the end of the array"),
        ('[{"a": 1}]\n\n\n\n\n\n[', 7, "something follows the end of the array"),
    ],
)
def test_a_broken_array_is_named_with_its_line(tmp_path, monkeypatch, chunk, text, line, message):
    monkeypatch.setattr(row_files, "CHUNK", chunk)
    (tmp_path / "d.json").write_text(text, encoding="utf-8")
    found = list(read_values(tmp_path / "d.json"))
    assert found[0] == (1, {"a": 1})
    number, error = found[-1]
    assert isinstance(error, RowError)
    assert (number, message in error.message) == (line, True), error.message


def test_an_error_at_the_beginning_of_a_large_array_needs_no_more_than_the_beginning(tmp_path):
    (tmp_path / "d.json").write_text('[{"a": x},' + '{"a": "' + "y" * (20 << 20) + '"}]', encoding="utf-8")
    tracemalloc.start()
    ((line, error),) = read_values(tmp_path / "d.json")
    assert (line, type(error)) == (1, RowError)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "json.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(row_files, "CHUNK", 1 << 14)

    def peak(num_rows):
        made = random.Random(0)
        rows = [{"instruction": str(made.random()), "output": str(made.random()) * 20} for _ in range(num_rows)]
        path = write(tmp_path / f"rows{num_rows}.{kind}", rows)
        del rows
        tracemalloc.start()
        assert sum(1 for _ in read_values(path)) == num_rows
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(10_000) < 1.3 * peak(2_500)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", 3, "3 fields, and the first line names 2"),
        ('a,b\n1,2\n"x\ny",2\n"x"y,2\n', 5, "not valid CSV"),
    ],
)
def test_a_broken_csv_line_is_named(tmp_path, text, line, message):
    (tmp_path / "d.csv").write_text(text, encoding="utf-8")
    number, error = list(read_values(tmp_path / "d.csv"))[-1]
    assert isinstance(error, RowError)
    assert (number, message in error.message) == (line, True), error.message


def test_csv_names_its_columns(tmp_path):
    (tmp_path / "d.csv").write_text("a,a\n1,2\n", encoding="utf-8")
    with pytest.raises(TrainError, match=r"d\.csv:1: the first line is no list of different names"):
        list(read_values(tmp_path / "d.csv"))
    (tmp_path / "d.csv").write_bytes("\ufefftext\n鸟\n".encode())
    assert list(read_values(tmp_path / "d.csv")) == [(2, {"text": "鸟"})]
    (tmp_path / "d.csv").write_bytes("text\n我是小鹪，由团队开发的聊天助手。\n".encode("gbk"))
    with pytest.raises(TrainError, match="it looks like GBK"):
        list(read_values(tmp_path / "d.csv"))


def test_each_line_of_a_txt_file_is_a_text(tmp_path):
    (tmp_path / "d.txt").write_bytes("\ufeff[鸟\r\n\n \n{b\n".encode())
    assert list(read_values(tmp_path / "d.txt")) == [(1, {"text": "[鸟"}), (4, {"text": "{b"})]
    (tmp_path / "d.txt").write_bytes("plain\n我是小鹪，由团队开发的聊天助手。\n".encode("gbk"))
    with pytest.raises(TrainError, match=r"d\.txt:2: the file is not UTF-8; it looks like GBK"):
        list(read_values(tmp_path / "d.txt"))


def test_nulls_of_a_table_are_keys_that_are_not_there(tmp_path):
    path = write(tmp_path / "rows.parquet", [{"text": "a", "system": None}, {"text": None, "system": "b"}])
    assert list(read_values(path)) == [(1, {"text": "a"}), (2, {"system": "b"})]


def test_folders_of_save_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    train, test = Dataset.from_list(ROWS[:30]), Dataset.from_list(ROWS[30:40])
    train.save_to_disk(str(tmp_path / "one"), num_shards=3)
    DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))

    def rows(name, **split):
        return [row for path in data_files(str(tmp_path / name), **split) for _, row in read_values(path)]

    assert rows("one") == rows("both") == ROWS[:30]
    assert rows("both", split="test") == ROWS[30:40]
    with pytest.raises(TrainError, match="has no split `dev`") as caught:
        data_files(str(tmp_path / "both"), split="dev")
    assert "train, test" in caught.value.hint
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(TrainError, match="names files that are not there"):
        data_files(str(tmp_path / "one"))
