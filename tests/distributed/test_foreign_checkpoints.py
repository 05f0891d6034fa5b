"""Checkpoints of other programs: what `launch consolidate` makes of them against DeepSpeed's own zero_to_fp32."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.foreign_process import model_of
from support.many_runs import carry_out
from transformers import AutoModelForCausalLM

from trainer import consolidate
from trainer.deepspeed_folder import find_shards
from trainer.spec import TrainError

CASES = [(by, method, zero) for by in ("deepspeed", "trainer") for method in ("full", "lora") for zero in (1, 2, 3)]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case, written by two processes."""
    folder = tmp_path_factory.mktemp("foreign")
    items = [
        {"folder": str(folder / f"{by}-{method}-{zero}"), "method": method, "zero": zero, "by": by}
        for by, method, zero in [*CASES, *(("fsdp", method, 0) for method in ("full", "lora"))]
    ]
    carry_out(folder, 2, items, script="foreign_process.py")
    return folder


def consolidated(source: Path, out: Path, *flags: str) -> dict[str, torch.Tensor]:
    parser = argparse.ArgumentParser()
    consolidate.add_arguments(parser)
    consolidate.run(parser.parse_args(["--source", str(source), "--out", str(out), *flags]))
    (weights,) = out.glob("*.safetensors")
    return load_file(weights)


@pytest.mark.parametrize(("by", "method", "zero"), CASES)
def test_the_weights_are_those_of_deepspeeds_own_tool(
    foreign: Path, tmp_path: Path, by: str, method: str, zero: int
) -> None:
    folder = foreign / f"{by}-{method}-{zero}"
    checkpoint = folder if by == "deepspeed" else folder / "checkpoint-2"
    expected = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    expected = {name.replace(".default", ""): tensor for name, tensor in expected.items()}
    found = consolidated(folder, tmp_path / "fp32", "--dtype", "fp32")
    if method == "lora":
        expected = {name: tensor for name, tensor in expected.items() if "lora_" in name}
    else:
        # Tied: written once, under the name of the embedding.
        assert torch.equal(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.float()), name

    rounded = consolidated(checkpoint, tmp_path / "bf16")
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in expected.items())
    # What DeepSpeed and the Trainer put beside their shards has no place in a model.
    assert not {p.name for p in (tmp_path / "bf16").iterdir()} & {
        "zero_to_fp32.py",
        "zero_to_torch.py",
        "trainer_state.json",
    }
    if method == "full":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.float32).state_dict()
        assert torch.equal(loaded["lm_head.weight"], expected["model.embed_tokens.weight"].float())
        names = {name: name for name in expected}
    else:
        adapted = PeftModel.from_pretrained(model_of("full"), str(tmp_path / "bf16"))
        loaded = adapted.state_dict()
        names = {name: name.replace(".weight", ".default.weight") for name in expected}
    for name, parameter in names.items():
        assert torch.equal(loaded[parameter].float(), (found if method == "full" else rounded)[name].float()), name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the full models, with its weights."""
    folder = tmp_path_factory.mktemp("base")
    model_of("full").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_fsdp_sharded_is_put_together(foreign: Path, base: Path, tmp_path: Path, method: str) -> None:
    folder = foreign / f"fsdp-{method}-0"
    expected = torch.load(folder / "expected.pt", weights_only=True)
    expected = {n.replace(".default", ""): t for n, t in expected.items() if method == "full" or "lora_" in n}
    if method == "full":
        assert torch.equal(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    step = folder / "checkpoint-1"
    for number, source in enumerate((folder, step, step / "pytorch_model_fsdp_0")):
        flags = ("--base", str(base)) if method == "full" else ()
        found = consolidated(source, tmp_path / str(number), *flags)
        assert found.keys() == expected.keys()
        assert all(t.dtype == torch.bfloat16 and torch.equal(t, expected[n]) for n, t in found.items())
        assert json.loads((tmp_path / str(number) / "consolidation.json").read_text())["step"] == 1
    # Of the wrapped model's own names, without a base to compare them with.
    if method == "full":
        assert consolidated(step, tmp_path / "own").keys() >= expected.keys()


def test_damage_in_fsdps_files_is_named(foreign: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(foreign / "fsdp-full-0" / "checkpoint-1" / "pytorch_model_fsdp_0", folder)

    def refused(said: str) -> None:
        with pytest.raises(TrainError) as error:
            consolidated(folder, tmp_path / "out", "--base", str(base))
        assert said in error.value.message, error.value.message
        assert not (tmp_path / "out").exists()

    shard, metadata = folder / "__1_0.distcp", folder / ".metadata"
    whole, described = shard.read_bytes(), metadata.read_bytes()
    shard.write_bytes(whole[:1000])
    refused("__1_0.distcp")
    shard.write_bytes(b"x" * len(whole))
    refused("__1_0.distcp")
    shard.unlink()
    refused("__1_0.distcp")
    shard.write_bytes(whole)
    metadata.write_bytes(described[:-20])
    refused(".metadata")
    metadata.write_bytes(described.replace(b"__1_0.distcp", b"../_0.distcp"))
    refused("'../_0.distcp', which is no file beside it")
    metadata.write_bytes(pickle.dumps(Hostile()))
    refused(f"asks for {os.system.__module__}.system")
    assert not (tmp_path / "ran").exists()
    metadata.write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    refused("not the description of a checkpoint")
    metadata.write_bytes(b"\x80\x02Nr\x00\x00\x00\x40.")
    refused("of its memo")


def test_two_models_in_one_checkpoint_are_refused(tmp_path: Path, base: Path) -> None:
    import torch.distributed.checkpoint as dcp

    weights = model_of("full").state_dict()
    average = {name: tensor * 2 for name, tensor in weights.items()}
    dcp.save({"model": weights, "ema": average}, checkpoint_id=tmp_path / "both", no_dist=True)
    with pytest.raises(TrainError) as error:
        consolidated(tmp_path / "both", tmp_path / "out", "--base", str(base))
    assert "two parts of the checkpoint hold" in error.value.message


def test_a_head_that_was_frozen_is_kept(foreign: Path, tmp_path: Path) -> None:
    """Freeze training: the head is no trained weight, and it is not the embedding."""
    base, copy = tmp_path / "base", tmp_path / "copy"
    model = model_of("full")
    model.config.tie_word_embeddings = False
    model.save_pretrained(base)
    head = load_file(base / "model.safetensors")["model.embed_tokens.weight"] * 3
    save_file(load_file(base / "model.safetensors") | {"lm_head.weight": head}, base / "model.safetensors")
    shutil.copytree(foreign / "deepspeed-full-2", copy)
    (file,) = (copy / "global_step1").glob("mp_rank_00_model_states.pt")
    state = torch.load(file, weights_only=False)
    state["frozen_param_shapes"] = {"lm_head.weight": head.shape}
    torch.save(state, file)
    found = consolidated(copy, tmp_path / "out", "--base", str(base))
    assert torch.equal(found["lm_head.weight"], head)


class Hostile:
    def __reduce__(self) -> object:
        return os.system, ("touch ran",)


def test_a_rank_that_is_missing_is_named_and_nothing_is_written(foreign: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(foreign / "deepspeed-full-2", copy)
    for rank, told in ((1, "written by 2 ranks, the files of 1 are here"), (0, "the file of rank 0 is missing")):
        (lost,) = (copy / "global_step1").glob(f"*pp_rank_{rank}_*optim_states.pt")
        content = lost.read_bytes()
        lost.unlink()
        with pytest.raises(TrainError) as error:
            consolidated(copy, tmp_path / "out")
        assert told in error.value.message
        lost.write_bytes(content[: len(content) // 2])
        with pytest.raises(TrainError) as error:
            consolidated(copy, tmp_path / "out")
        assert lost.name in error.value.message
        lost.write_bytes(content)
    assert not (tmp_path / "out").exists()
    consolidated(copy, tmp_path / "out")


def test_a_step_is_taken_by_its_own_name(foreign: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(foreign / "deepspeed-lora-2", copy)
    shutil.copytree(copy / "global_step1", copy / "global_step7")
    (copy / "latest").write_text("global_step7")
    assert find_shards(copy, None) == copy / "global_step7"
    assert find_shards(copy, 1) == copy / "global_step1"
    with pytest.raises(TrainError) as error:
        find_shards(copy, 3)
    assert "holds no step 3" in error.value.message
    assert "global_step7" in error.value.hint
    # XTuner's folders, by iterations: eight of them to an optimizer step.
    work = tmp_path / "work_dirs"
    for number in (8, 16):
        shutil.copytree(copy / "global_step1", work / f"iter_{number}.pth")
    assert consolidated(work, tmp_path / "out", "--step", "8", "--lora-alpha", "6")
    with pytest.raises(TrainError) as error:
        consolidated(work / "iter_8.pth", tmp_path / "other", "--step", "16", "--lora-alpha", "6")
    assert "is of step 1, not 16" in error.value.message


def test_frozen_weights_of_a_full_model_must_be_in_the_base(foreign: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(foreign / "deepspeed-full-2", copy)
    (file,) = (copy / "global_step1").glob("mp_rank_00_model_states.pt")
    state = torch.load(file, weights_only=False)
    state["frozen_param_shapes"] = {"model.extra.weight": torch.Size([2, 2])}
    torch.save(state, file)
    with pytest.raises(TrainError) as error:
        consolidated(copy, tmp_path / "out")
    assert "model.extra.weight" in error.value.message
    assert "--base" in error.value.hint


def test_an_adapter_without_its_config_asks_for_what_the_weights_do_not_say(foreign: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(foreign / "deepspeed-lora-3", copy)
    own = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").unlink()
    with pytest.raises(TrainError) as error:
        consolidated(copy, tmp_path / "out")
    assert "rank 3" in error.value.message
    assert "--lora-alpha" in error.value.hint
    consolidated(copy, tmp_path / "out", "--lora-alpha", "6")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (own["r"], own["lora_alpha"]) == (3, 6)
    assert set(config["target_modules"]) == {name.rpartition(".")[2] for name in own["target_modules"]}
