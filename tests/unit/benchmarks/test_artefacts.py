"""The folders that consolidating and merging are timed on are what DeepSpeed, transformers and PEFT read."""

import argparse
import json
import sys

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from peft import PeftModel
from safetensors.torch import load_file
from support.tiny_checkpoints import save_base
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.artefacts import COPY, Entry, entries_of, main, measure, write_page
from benchmarks.model_shapes import SHAPES, _Sparse, weight_shapes, write_adapter, write_checkpoint
from benchmarks.peer_venvs import BenchError
from trainer import consolidate

TINY = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 50}


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape])
def test_names_and_shapes_are_those_of_the_model(name):
    config = {**(SHAPES[name] or {}), **TINY}
    with torch.device("meta"):
        fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "torch_dtype")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == weight_shapes(config)


@pytest.mark.parametrize(("zero", "ranks"), [(2, 2), (2, 3), (3, 2), (3, 4)])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_deepspeeds_own_tool_and_ours_read_the_same_weights(tmp_path, zero, ranks, lora_rank):
    config = {**(SHAPES["qwen2_0.5b"] or {}), **TINY, "tie_word_embeddings": False}
    folder = write_checkpoint(tmp_path / "checkpoint", config, zero, ranks, lora_rank)
    assert write_checkpoint(folder, config, zero, ranks) == folder
    expected = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    expected = {n.replace(".default", ""): t for n, t in expected.items() if not lora_rank or ".lora_" in n}
    parser = argparse.ArgumentParser()
    consolidate.add_arguments(parser)
    argv = ["--source", str(folder), "--out", str(tmp_path / "out"), "--dtype", "fp32"]
    consolidate.run(parser.parse_args(argv))
    found = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_zeros_take_no_room_and_read_back_as_zeros(tmp_path):
    path = tmp_path / "x.pt"
    content = {"a": torch.zeros(2**23), "b": torch.arange(7), "c": torch.zeros(3)}
    file = _Sparse(path)
    torch.save(content, file)
    file.close()
    assert path.stat().st_blocks * 512 < path.stat().st_size / 8
    loaded = torch.load(path, weights_only=True)
    assert all(torch.equal(loaded[n], t) for n, t in content.items())


def test_the_adapter_is_one_that_peft_loads(tmp_path):
    base = save_base(tmp_path / "base", "qwen2")
    adapter = write_adapter(tmp_path / "adapter", base, 4)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    loaded = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    stored = load_file(adapter / "adapter_model.safetensors")
    assert len(loaded) == len(stored) == 2 * 7 * 2
    assert all(torch.equal(loaded[n.replace(".weight", ".default.weight")], t) for n, t in stored.items())


def test_every_command_is_run_in_turn_and_a_failure_is_named(tmp_path):
    out = tmp_path / "out"
    write = f"import pathlib; p = pathlib.Path({str(out)!r}); p.mkdir(); (p / 'x').write_bytes(bytes(2**20))"
    good = Entry("r", "what", "good", [sys.executable, "-c", write], out)
    copy = Entry("r", "what", COPY, ["cp", "-r", str(out), str(tmp_path / "copy")], tmp_path / "copy")
    bad = Entry("r", "what", "bad", [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "nothing")
    measure([good, copy, bad], 2, tmp_path)
    assert (len(good.seconds), len(copy.seconds), bad.failed[:6]) == (2, 2, "exit 3")
    assert good.result_mb == copy.result_mb == 1
    assert good.peak_mb[0] > 3
    assert not out.exists()
    write_page([good, copy, bad], tmp_path)
    page = (tmp_path / "table.md").read_text()
    assert "| what | good |" in page
    assert "exit 3" in page
    assert json.loads((tmp_path / "results.json").read_text())[0]["contender"] == "good"


def test_rows(tmp_path):
    base = save_base(tmp_path / "base", "qwen2", tied=True)
    options = argparse.Namespace(work=tmp_path, smollm2=base, venvs=tmp_path / "venvs", no_peers=True)
    (merging,) = entries_of("merge", options)
    assert [entry.contender for entry in merging] == ["tunelaunch", "peft", COPY, "python with numpy"]
    consolidating = list(entries_of("consolidate", options))
    assert [entries[0].what for entries in consolidating] == [f"SmolLM2-135M, ZeRO-{z}, 2 shards" for z in (2, 3)]
    ours = consolidating[0][:1]
    measure(ours, 1, tmp_path)
    assert ours[0].failed == ""
    for rows, model, said in (("merge,x", base, "x: unknown"), ("merge", tmp_path / "absent", "is no model folder")):
        with pytest.raises(BenchError, match=said):
            main(["--rows", rows, "--smollm2", str(model), "--work", str(tmp_path), "--out", str(tmp_path)])
