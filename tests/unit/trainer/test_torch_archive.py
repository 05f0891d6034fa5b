"""Files of torch.save read without torch: the same numbers, and nothing that a hostile one asks for."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.spec import TrainError
from trainer.torch_archive import ArchiveTensor, read_archive


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def whole(tensor: ArchiveTensor) -> np.ndarray:
    return tensor.read(0, tensor.numel).reshape(tensor.shape)


def test_tensors_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = torch.randn(7, 5)
    value = {
        "plain": base,
        "part": base[2:4],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "whole": torch.arange(6),
        "bits": torch.tensor([True, False]),
        "half": torch.randn(4).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "nested": [OrderedDict(a=torch.ones(2)), (1, "text", None, torch.Size([2, 3]))],
    }
    found = read_archive(saved(tmp_path / "a.pt", value))
    for name in ("plain", "part", "whole", "bits", "half", "scalar", "empty"):
        assert np.array_equal(whole(found[name]), value[name].numpy()), name
    assert np.array_equal(whole(found["parameter"]), value["parameter"].detach().numpy())
    assert np.array_equal(found["plain"].read(9, 4), base.flatten()[9:13].numpy())
    assert np.array_equal(whole(found["nested"][0]["a"]), np.ones(2))
    assert found["nested"][1] == (1, "text", None, (2, 3))
    brain = torch.randn(5).bfloat16()
    bits = whole(read_archive(saved(tmp_path / "b.pt", [brain]))[0])
    assert np.array_equal(bits, brain.view(torch.int16).numpy().view(np.uint16))


def test_a_transposed_tensor_is_described_but_not_read_as_if_it_were_flat(tmp_path: Path) -> None:
    found = read_archive(saved(tmp_path / "a.pt", torch.randn(3, 4).t()))
    assert not found.is_contiguous


class Planted:
    """Unpickled by anybody else, it makes a file."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "shutil.rmtree"])
def test_code_in_a_file_is_named_and_not_run(tmp_path: Path, name: str) -> None:
    import builtins
    import shutil
    import subprocess

    module, _, attribute = name.rpartition(".")
    function = getattr({"os": os, "builtins": builtins, "subprocess": subprocess, "shutil": shutil}[module], attribute)
    victim = tmp_path / "victim"
    victim.mkdir()
    planted = {
        "os.system": f"touch {tmp_path}/ran",
        "builtins.eval": f"open('{tmp_path}/ran', 'w')",
        "builtins.exec": f"open('{tmp_path}/ran', 'w')",
        "subprocess.Popen": ["touch", f"{tmp_path}/ran"],
        "shutil.rmtree": str(victim),
    }[name]
    path = saved(
        tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"w": torch.ones(2), "x": Planted(function, planted)}
    )
    with pytest.raises(TrainError) as error:
        read_archive(path)
    # pickle writes the name of the module that a function is defined in.
    assert f"asks for {function.__module__}.{attribute}" in error.value.message
    assert path.name in error.value.message
    assert not (tmp_path / "ran").exists()
    assert victim.exists()


def test_known_objects_do_nothing(tmp_path: Path) -> None:
    """getattr stands in XTuner's files; here it is an object that does nothing, so it cannot reach a function either."""
    planted = Planted(getattr, os, "system")
    planted.call = (getattr, ("", "join"))
    found = read_archive(saved(tmp_path / "a.pt", {"x": planted, "w": torch.ones(2)}))
    assert not callable(getattr(found["x"], "join", None))
    assert np.array_equal(whole(found["w"]), np.ones(2))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"w": torch.randn(1000)})
    content = path.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:size])
        with pytest.raises(TrainError, match=r"a\.pt"):
            read_archive(path)
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(TrainError, match=r"a\.pt: is not an archive"):
        read_archive(path)
    with pytest.raises(TrainError, match="cannot be read"):
        read_archive(tmp_path / "gone.pt")


def rewritten(path: Path, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """The archive with members replaced, or left out (None)."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    root = next(iter(members)).split("/")[0]
    members |= {f"{root}/{name}": content for name, content in change.items()}  # type: ignore[dict-item]  # None is dropped below
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)


@pytest.mark.parametrize(
    ("change", "compression", "told"),
    [
        ({"data/0": None}, zipfile.ZIP_STORED, "has no storage '0'"),
        ({"data/0": b"abc"}, zipfile.ZIP_STORED, "storage 0 has 3 bytes, 1000 elements of F32 were promised"),
        ({}, zipfile.ZIP_DEFLATED, "is compressed"),
        ({"byteorder": b"big"}, zipfile.ZIP_STORED, "big-endian"),
        ({"data.pkl": b"\x80\x02}q\x00(X\x01"}, zipfile.ZIP_STORED, "its pickle is damaged"),
        ({"data.pkl": b""}, zipfile.ZIP_STORED, "its pickle is damaged"),
        ({"data.pkl": None}, zipfile.ZIP_STORED, "holds 0 pickles"),
    ],
)
def test_archives_that_were_tampered_with_are_refused(
    tmp_path: Path, change: dict[str, bytes | None], compression: int, told: str
) -> None:
    path = saved(tmp_path / "a.pt", {"w": torch.randn(1000)})
    rewritten(path, change, compression)
    with pytest.raises(TrainError) as error:
        read_archive(path)
    assert told in error.value.message


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", torch.arange(4.0))
    with zipfile.ZipFile(path) as archive:
        data = archive.read("a/data.pkl")
    # The shape (4,) as a tuple of one small integer.
    assert data.count(b"K\x04\x85") == 1
    rewritten(path, {"data.pkl": data.replace(b"K\x04\x85", b"K\x64\x85")})
    with pytest.raises(TrainError, match="does not fit into its storage"):
        read_archive(path)


def test_xtuners_layout(tmp_path: Path) -> None:
    """The layout that XTuner leaves with DeepSpeed: `iter_N.pth/`, names under `llm.`."""
    from trainer.deepspeed_folder import find_shards, read
    from trainer.foreign import Given

    folder = tmp_path / "work_dirs" / "iter_500.pth"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    names = {
        f"llm.base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.default.weight": shape
        for side, shape in (("A", (2, 5)), ("B", (5, 2)))
    }
    flat = torch.randn(20)
    saved(
        folder / "mp_rank_00_model_states.pt",
        {
            "module": {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in names.items()},
            "param_shapes": [OrderedDict((name, torch.Size(shape)) for name, shape in names.items())],
            "global_steps": 500,
        },
    )
    for rank in range(2):
        state = {
            "single_partition_of_fp32_groups": [flat[10 * rank :][:10].clone()],
            "zero_stage": 2,
            "partition_count": 2,
        }
        saved(folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": state})
    assert find_shards(tmp_path / "work_dirs", None) == folder
    assert find_shards(folder, None) == folder
    with pytest.raises(TrainError, match="holds no step 3"):
        find_shards(tmp_path / "work_dirs", 3)
    found = read(folder, Given(alpha=4.0))
    assert found.manifest.step == 500
    assert found.manifest.dtype == "bf16"
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert found.manifest.parameters == {
        f"{layer}.lora_A.default.weight": (2, 5),
        f"{layer}.lora_B.default.weight": (5, 2),
    }
    read_back = [t.read(at, n) for name in found.slices for _, t, at, n in found.slices[name]]
    assert np.array_equal(np.concatenate(read_back), flat.numpy())


class AsTensor(Planted):
    """Asks for a tensor over a file of its own choice."""


def test_no_file_but_the_archive_itself_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_bytes(b"0123456789abcdef" * 4)
    storage = (secret, "F32", 0, 16)
    path = saved(
        tmp_path / "a.pt", AsTensor(torch._utils._rebuild_tensor_v2, storage, 0, (8,), (1,), False, OrderedDict())
    )
    with pytest.raises(TrainError, match="a tensor without a storage of this file"):
        read_archive(path)


class Changed:
    """A known object, to which the pickle then gives another state (opcode BUILD)."""

    def __init__(self, function: Any, args: tuple[Any, ...], state: Any) -> None:
        self.call = (function, args, state)

    def __reduce__(self) -> Any:
        return self.call


def test_a_tensor_cannot_be_pointed_elsewhere(tmp_path: Path) -> None:
    value = torch.arange(4.0)
    function, args = value.__reduce_ex__(2)[:2]
    state = {"path": str(tmp_path / "other"), "at": 0}
    path = saved(tmp_path / "a.pt", Changed(function, args, state))
    with pytest.raises(TrainError, match="may not change a tensor"):
        read_archive(path)


def test_a_compressed_or_endless_member_is_not_unpacked(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", torch.arange(4.0))
    rewritten(path, {"byteorder": b"l" * 100})
    with pytest.raises(TrainError, match="byteorder has 100 bytes"):
        read_archive(path)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(TrainError, match="not a regular file"):
        read_archive(tmp_path / "pipe.pt")


@pytest.mark.parametrize("content", [b"\x80\x02Nr\x00\x00\x00\x40.", b"\x80\x02Np1000000000\n."])
def test_a_memo_that_would_fill_the_memory_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
    with pytest.raises(TrainError, match=r"place 1[0-9]* of its memo"):
        read_archive(path)


def test_tuples_of_tuples_that_would_double_for_ever_are_refused(tmp_path: Path) -> None:
    """Sixty bytes more double the time that a hash, or a message, takes."""
    nested: object = (1, 1)
    for _ in range(60):
        nested = (nested, nested)
    for protocol in (2, 4):
        for content in (pickle.dumps(nested, protocol), pickle.dumps({"a": [nested]}, protocol)):
            path = tmp_path / "x.pt"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("x/data.pkl", content)
            with pytest.raises(TrainError, match="nests tuples without end"):
                read_archive(path)
    again = b"".join((b"\x80\x02K\x01", b"2\x86" * 60, b"}", b"."))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", again)
    with pytest.raises(TrainError, match="nests tuples without end"):
        read_archive(path)


@pytest.mark.parametrize(("at", "value"), [(6, 1), (8, 99)])
def test_encrypted_and_unknown_kinds_of_members_are_named(tmp_path: Path, at: int, value: int) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path)
    data = bytearray(path.read_bytes())
    for signature, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        start = data.find(signature)
        while start >= 0:
            data[start + at + shift] = value
            start = data.find(signature, start + 4)
    path.write_bytes(bytes(data))
    with pytest.raises(TrainError, match=r"x\.pt"):
        read_archive(path)
