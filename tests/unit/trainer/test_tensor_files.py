import errno
import json
import os
import resource
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainer.disk import new_folder, publish_folder, read_json, require_space, write_json
from trainer.spec import TrainError
from trainer.tensor_files import (
    SafetensorsWriter,
    TensorFile,
    all_finite,
    bf16_bits,
    from_float32,
    parse_size,
    plan_shards,
    read_as,
    to_float32,
    write_index,
)
from trainer.tensor_header import TensorSpec, read_header

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(path, header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_a_file_of_the_safetensors_library_is_read(tmp_path):
    tensors = {"小": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "n": torch.tensor(7), "e": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert file.header.metadata == {"format": "pt"}
        assert {n: e.shape for n, e in file.entries.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
        assert np.array_equal(file.array("小"), tensors["小"].numpy())
        assert np.array_equal(file.read("小", 4, 3), tensors["小"].flatten()[4:7].numpy())
        assert np.array_equal(file.read("b"), tensors["b"].view(torch.uint16).numpy())
        assert file.read("n") == 7


def test_a_written_file_is_byte_for_byte_that_of_the_safetensors_library(tmp_path):
    tensors = {"a.小": torch.randn(3, 5), "b": torch.randn(400, 700), "c": torch.randn(1)}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    specs = [TensorSpec(n, "F32", tuple(t.shape)) for n, t in tensors.items()]
    with TensorFile(tmp_path / "theirs") as theirs, SafetensorsWriter(tmp_path / "ours", specs) as ours:
        ours.write("a.小", tensors["a.小"].numpy())
        ours.copy("b", theirs, theirs.entries["b"])
        ours.write("c", tensors["c"].numpy())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_copying_works_where_the_kernel_cannot_copy_between_the_files(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    save_file({"b": torch.randn(400, 700)}, tmp_path / "theirs", {"format": "pt"})
    monkeypatch.setattr(os, "copy_file_range", refuse)
    spec = TensorSpec("b", "F32", (400, 700))
    with TensorFile(tmp_path / "theirs") as theirs, SafetensorsWriter(tmp_path / "ours", [spec]) as ours:
        ours.copy("b", theirs, theirs.entries["b"])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    ("header", "options", "said"),
    [
        ({"a": GOOD}, {"length": 2**63}, "claims"),
        ({"a": GOOD}, {"length": 10**9}, "claims"),
        (b"[1]", {}, "not a JSON object"),
        (b"{", {}, "not valid JSON"),
        (b"[" * 100_000, {}, "not valid JSON"),
        (b"\xff\xfe", {}, "not valid JSON"),
        (b'{"a": 1, "a": 2}', {}, "stands twice"),
        ({"a": GOOD}, {"data": b"\0" * 7}, "cut short"),
        ({"a": GOOD}, {"data": b"\0" * 9}, "follow"),
        ({"a": GOOD, "b": GOOD}, {}, "overlaps"),
        ({"a": GOOD, "b": GOOD | {"data_offsets": [12, 20]}}, {"data": b"\0" * 20}, "gap"),
        ({"a": GOOD | {"dtype": "F31"}}, {}, "unknown dtype"),
        ({"a": GOOD | {"dtype": ["F32"]}}, {}, "unknown dtype"),
        ({"a": GOOD | {"shape": [3]}}, {}, "do not hold"),
        ({"a": GOOD | {"shape": [-1]}}, {}, "shape"),
        ({"a": GOOD | {"shape": [True, 2]}}, {}, "shape"),
        ({"a": GOOD | {"shape": [2**62] * 60}}, {}, "do not hold"),
        ({"a": GOOD | {"data_offsets": [-8, 0]}}, {}, "data_offsets"),
        ({"a": GOOD | {"data_offsets": [8, 0]}}, {}, "do not hold"),
        ({"a": GOOD | {"more": 1}}, {}, "expected dtype"),
        ({"a\u001b[2J": GOOD}, {}, "tensor name"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', {}, "tensor name"),
        ({"a": GOOD, "__metadata__": {"x": 1}}, {}, "__metadata__"),
    ],
)
def test_a_header_that_breaks_the_format_is_refused_by_name(tmp_path, header, options, said):
    path = raw_file(tmp_path / "bad.safetensors", header, **options)
    with pytest.raises(TrainError, match=said) as e:
        read_header(path)
    assert str(path) in e.value.message


def test_an_absent_short_or_unusual_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "short").write_bytes(b"abc")
    for name, said in (
        ("absent", "cannot be read"),
        ("short", "too few"),
        ("pipe", "not a regular file"),
        (".", "not a reg"),
    ):
        with pytest.raises(TrainError, match=said):
            read_header(tmp_path / name)


def test_bf16_rounding_is_that_of_torch_for_every_kind_of_number():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 2_000_000, dtype=np.uint32)
    halves = (np.arange(2**16, dtype=np.uint32) << 16)[:, None] + np.array(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32
    )
    values = np.concatenate([bits, halves.ravel()]).view(np.float32)
    ours = torch.from_numpy(bf16_bits(values)).view(torch.bfloat16)
    theirs = torch.from_numpy(values).bfloat16()
    nan = np.isnan(values)
    assert torch.equal(ours.isnan(), torch.from_numpy(nan))
    assert torch.equal(ours[~nan].view(torch.int16), theirs[~nan].view(torch.int16))


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
def test_conversions_are_those_of_torch(dtype, kind):
    values = torch.randn(10_000) * torch.logspace(-9, 4, 10_000)
    stored = from_float32(values.numpy(), dtype)
    assert np.array_equal(to_float32(stored, dtype), values.to(kind).float().numpy())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_is_seen(dtype, bad):
    values = np.full(1000, -6e4, np.float32)
    assert all_finite(from_float32(values, dtype), dtype)
    values[777] = bad
    assert not all_finite(from_float32(values, dtype), dtype)


def test_a_value_too_large_for_fp16_is_refused(tmp_path):
    save_file({"w": torch.tensor([1.0, 7e4])}, tmp_path / "a.safetensors")
    with TensorFile(tmp_path / "a.safetensors") as file, pytest.raises(TrainError, match=r"w holds a value.*F16"):
        read_as(file, "w", "F16", 0, file.entries["w"].numel)


def test_shards_keep_the_order_and_the_limit(tmp_path):
    tensors = [TensorSpec(f"t{i}", "BF16", (n,)) for i, n in enumerate([10, 10, 500, 10])]
    shards = plan_shards(tensors, 100)
    assert [[t.name for t in s.tensors] for s in shards] == [["t0", "t1"], ["t2"], ["t3"]]
    assert [s.file for s in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    write_index(tmp_path, shards)
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 1060
    assert index["weight_map"]["t3"] == "model-00003-of-00003.safetensors"
    assert [s.file for s in plan_shards(tensors, 5000)] == ["model.safetensors"]


def test_sizes():
    assert [parse_size(t) for t in ("5GB", "1.5 MB", "2GiB", "700", "3k")] == [
        5 * 10**9,
        1_500_000,
        2 * 2**30,
        700,
        3000,
    ]
    for text in ("", "GB", "-1GB", "0", "5 apples", "1e9"):
        with pytest.raises(TrainError, match="not a size"):
            parse_size(text)


def test_a_file_over_the_size_limit_is_an_error_that_names_it(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with (
            pytest.raises(TrainError, match="cannot write") as e,
            new_folder(tmp_path / "out") as folder,
            SafetensorsWriter(folder / "big", [TensorSpec("a", "F32", (10**6,))]) as w,
        ):
            w.write("a", np.zeros(10**6, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "big" in e.value.message
    assert "ulimit" in e.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "word"), [(errno.ENOSPC, "Free some space"), (errno.EROFS, "read-only"), (errno.EIO, "dmesg")]
)
def test_what_the_disk_refuses_is_explained(tmp_path, monkeypatch, number, word):
    real = os.write

    def full(fd, data):
        if len(data) > 1000:
            raise OSError(number, os.strerror(number))
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    with (
        pytest.raises(TrainError, match=os.strerror(number)) as e,
        new_folder(tmp_path / "out") as folder,
        SafetensorsWriter(folder / "f", [TensorSpec("a", "F32", (999,))]) as w,
    ):
        w.write("a", np.zeros(999, np.float32))
    assert word in e.value.hint
    assert "Nothing was published" in e.value.hint
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_known_before_writing(tmp_path):
    with pytest.raises(TrainError, match="GB free"):
        require_space(tmp_path / "not" / "there", 10**18)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "a" / "out") as folder:
        write_json(folder / "x.json", {"名": "小薇"})
        assert not (tmp_path / "a" / "out").exists()
    assert "小薇" in (tmp_path / "a" / "out" / "x.json").read_text(encoding="utf-8")
    with pytest.raises(KeyError), new_folder(tmp_path / "b") as folder:
        raise KeyError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_an_existing_folder_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(TrainError, match="exists") as e, new_folder(tmp_path / "out"):
        pytest.fail("must not be entered")
    assert "--out" in e.value.hint
    (tmp_path / "new").mkdir()
    with pytest.raises(TrainError, match="exists"):
        publish_folder(tmp_path / "new", tmp_path / "out")


def test_the_leftover_of_a_killed_process_goes_away_and_that_of_a_live_one_stays(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, 1):
        (tmp_path / f".out.partial-{socket.gethostname()}-{pid}").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".out.partial-{socket.gethostname()}-1", "out"]


def test_an_unfinished_tensor_is_our_own_bug(tmp_path):
    specs = [TensorSpec("a", "U8", (2,)), TensorSpec("b", "U8", (2,))]
    with pytest.raises(AssertionError, match="not written: b"), SafetensorsWriter(tmp_path / "x", specs) as writer:
        writer.write("a", np.zeros(2, np.uint8))
