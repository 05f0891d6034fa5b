import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.tiny_checkpoints import adapted, adapter_config, save_base, save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import consolidate as stage
from trainer.checkpoint_format import sha256_file
from trainer.spec import TrainError
from trainer.worker import main

ROOT = Path(__file__).parents[3]
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "小模型")


def consolidate(source, out, *options):
    parser = ArgumentParser()
    stage.add_arguments(parser)
    stage.run(parser.parse_args(["--source", str(source), "--out", str(out), *map(str, options)]))
    return out


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_lora(folder, base, num_ranks=1, dtype="bf16", masters=None, **fields):
    """A checkpoint of an adapter with fp32 masters that bf16 cannot hold, and the PeftModel with the rounded masters."""
    peft_model = adapted(base, KINDS[dtype])
    torch.manual_seed(3)
    masters = masters or {n: p.detach().float() + 1e-4 * torch.randn(p.shape) for n, p in trainable(peft_model).items()}
    for name, parameter in trainable(peft_model).items():
        parameter.data = masters[name].to(KINDS[dtype])
    step_dir = folder / f"step_{fields.get('step', 200):06d}"
    save_checkpoint(step_dir, masters, num_ranks, dtype=dtype, adapter_config=adapter_config(peft_model), **fields)
    return peft_model


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_adapter_file_is_byte_for_byte_that_of_save_pretrained(tmp_path, base, num_ranks, dtype):
    peft_model = save_lora(tmp_path / "checkpoints", base, num_ranks, dtype)
    peft_model.save_pretrained(tmp_path / "theirs")
    out = consolidate(tmp_path / "checkpoints", tmp_path / "ours")
    theirs = tmp_path / "theirs" / "adapter_model.safetensors"
    assert (out / "adapter_model.safetensors").read_bytes() == theirs.read_bytes()
    ours, expected = (json.loads((d / "adapter_config.json").read_text()) for d in (out, tmp_path / "theirs"))
    assert ours | {"target_modules": 0} == expected | {"target_modules": 0}
    assert set(ours["target_modules"]) == set(expected["target_modules"])
    report = json.loads((out / "consolidation.json").read_text(encoding="utf-8"))
    assert report["sha256"] == {"adapter_model.safetensors": sha256_file(theirs)}
    assert report["run_id"].startswith("小薇")


def test_peft_loads_it_and_gives_the_same_logits(tmp_path, base):
    peft_model = save_lora(tmp_path / "checkpoints", base, 2, "fp32")
    out = consolidate(tmp_path / "checkpoints" / "step_000200", tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out)
    with torch.no_grad():
        expected = peft_model.eval()(IDS).logits
        assert torch.equal(loaded.eval()(IDS).logits, expected)
        assert not torch.equal(
            loaded.get_base_model()(IDS).logits, AutoModelForCausalLM.from_pretrained(base)(IDS).logits
        )


def test_another_dtype_is_rounded_once_from_the_masters(tmp_path, base):
    save_lora(tmp_path / "checkpoints", base, 2)
    whole = load_file(
        consolidate(tmp_path / "checkpoints", tmp_path / "a", "--dtype", "fp32") / "adapter_model.safetensors"
    )
    rounded = load_file(consolidate(tmp_path / "checkpoints", tmp_path / "b") / "adapter_model.safetensors")
    for name, master in whole.items():
        assert torch.equal(rounded[name], master.bfloat16())
        assert not torch.equal(master, rounded[name].float())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_full_model_is_that_of_save_pretrained(tmp_path, tied, num_ranks):
    base = save_base(tmp_path / "base", "qwen2", tied)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) * 0.01
    masters = dict(model.named_parameters())
    save_checkpoint(tmp_path / "ck" / "step_000200", masters, num_ranks, method="full", base_model=str(base))
    out = consolidate(tmp_path / "ck", tmp_path / "out", "--max-shard-size", "20KB")
    model.bfloat16().save_pretrained(tmp_path / "theirs")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    shards = sorted(out.glob("model-*.safetensors"))
    ours = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert len(shards) > 3
    assert ours.keys() == expected.keys()
    assert ("lm_head.weight" in ours) == (not tied)
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False) == "<user>你好小薇："


def test_the_dtype_of_a_full_model_stands_in_its_config(tmp_path):
    base = save_base(tmp_path / "base")
    masters = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    save_checkpoint(tmp_path / "step_000200", masters, method="full")
    out = consolidate(tmp_path / "step_000200", tmp_path / "out", "--base", base, "--dtype", "fp16")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float16


def test_a_second_name_of_a_tied_head_is_not_kept(tmp_path):
    base = save_base(tmp_path / "base", tied=True)
    stored = load_file(base / "model.safetensors")
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    masters = {n: p.detach() + 1 for n, p in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    save_checkpoint(tmp_path / "step_000200", masters, method="full")
    out = consolidate(tmp_path / "step_000200", tmp_path / "out", "--base", base)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, masters["model.embed_tokens.weight"].bfloat16())


def test_what_training_did_not_touch_comes_from_the_base(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base)
    masters = {n: p.detach() * 0 for n, p in model.named_parameters() if "mlp" not in n}
    save_checkpoint(tmp_path / "step_000200", masters, method="full")
    ours = load_file(consolidate(tmp_path / "step_000200", tmp_path / "out", "--base", base) / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours[name], tensor.bfloat16() if "mlp" in name else torch.zeros_like(tensor).bfloat16())


def test_another_base_is_refused_before_anything_is_written(tmp_path):
    base = save_base(tmp_path / "base")
    save_checkpoint(
        tmp_path / "step_000200", {"model.other.weight": torch.ones(2), "lm_head.weight": torch.ones(3)}, method="full"
    )
    with pytest.raises(TrainError, match="not the model that was trained") as e:
        consolidate(tmp_path / "step_000200", tmp_path / "out", "--base", base)
    assert "model.other.weight is not in the base" in e.value.message
    assert "lm_head.weight is [3], in the base [300, 32]" in e.value.message
    with pytest.raises(TrainError, match="base model folder is not known") as e:
        consolidate(tmp_path / "step_000200", tmp_path / "out")
    assert "--base" in e.value.hint
    assert not (tmp_path / "out").exists()


def test_the_newest_whole_checkpoint_is_used_and_the_damaged_one_named(tmp_path, base, capsys):
    for step in (100, 200, 300):
        save_lora(tmp_path / "ck", base, step=step)
    shard = tmp_path / "ck" / "step_000300" / "rank_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    out = consolidate(tmp_path / "ck", tmp_path / "a")
    said = capsys.readouterr().out
    assert "step_000300" in said
    assert "cut short" in said
    assert "consolidated step 200" in said
    assert json.loads((out / "consolidation.json").read_text())["step"] == 200
    out = consolidate(tmp_path / "ck", tmp_path / "b", "--step", "100")
    assert json.loads((out / "consolidation.json").read_text())["step"] == 100
    with pytest.raises(TrainError, match="cut short"):
        consolidate(tmp_path / "ck", tmp_path / "c", "--step", "300")
    with pytest.raises(TrainError, match="holds no step 7") as e:
        consolidate(tmp_path / "ck", tmp_path / "c", "--step", "7")
    assert "100, 200, 300" in e.value.hint
    with pytest.raises(TrainError, match="is of step 200, not 7"):
        consolidate(tmp_path / "ck" / "step_000200", tmp_path / "c", "--step", "7")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: flip(d / "rank_00001.safetensors"), "rank_00001.safetensors"),
        (lambda d: (d / "rank_00000.safetensors").unlink(), "rank_00000.safetensors: is missing"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json"),
        (lambda d: (d / "rank_00000.safetensors").write_bytes(b"\xff" * 400), "rank_00000.safetensors"),
    ],
)
def test_a_damaged_only_checkpoint_is_an_error_that_names_the_file(tmp_path, base, damage, said):
    save_lora(tmp_path / "ck", base, 2)
    damage(tmp_path / "ck" / "step_000200")
    for source in (tmp_path / "ck", tmp_path / "ck" / "step_000200"):
        with pytest.raises(TrainError) as e:
            consolidate(source, tmp_path / "out")
        assert said in e.value.message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck"]


def test_a_run_that_never_saved_is_an_error(tmp_path):
    for source in (tmp_path, tmp_path / "absent"):
        with pytest.raises(TrainError, match="holds no checkpoint"):
            consolidate(source, tmp_path / "out")


def zero_b(masters):
    return {n: t * 0 if ".lora_B." in n else t for n, t in masters.items()}


def test_an_adapter_that_learned_nothing_is_refused_once_a_step_was_taken(tmp_path, base):
    masters = {n: p.detach().float() for n, p in trainable(adapted(base)).items()}
    save_lora(tmp_path / "ck", base, masters=zero_b(masters))
    with pytest.raises(TrainError, match="nothing was learned: every lora_B is zero after 200 steps"):
        consolidate(tmp_path / "ck", tmp_path / "out")
    save_lora(tmp_path / "start", base, masters=zero_b(masters), step=0)
    consolidate(tmp_path / "start", tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_left(tmp_path, base, bad):
    masters = {n: p.detach().float().clone() for n, p in trainable(adapted(base)).items()}
    list(masters.values())[5][0, 1] = bad
    save_lora(tmp_path / "ck", base, masters=masters)
    with pytest.raises(TrainError, match="NaN or infinity") as e:
        consolidate(tmp_path / "ck", tmp_path / "out")
    assert list(masters)[5] in e.value.message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck"]


def test_a_value_too_large_for_fp16_says_so(tmp_path, base):
    masters = {n: p.detach().float() for n, p in trainable(adapted(base)).items()}
    masters[next(iter(masters))][0, 0] = 70_000
    save_lora(tmp_path / "ck", base, masters=masters, dtype="bf16")
    with pytest.raises(TrainError, match="70000, which F16 cannot hold"):
        consolidate(tmp_path / "ck", tmp_path / "out", "--dtype", "fp16")


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda n: n.replace("lora_B", "lora_velora"), "no adapter file can hold it"),
        (lambda n: n.replace("layers.1.self_attn.q_proj.lora_B", "layers.3.self_attn.q_proj.lora_B"), "has no"),
        (lambda n: n.removeprefix("base_model."), "no adapter file can hold it"),
    ],
)
def test_names_that_no_adapter_has_are_refused(tmp_path, base, rename, said):
    peft_model = adapted(base)
    masters = {rename(n): p for n, p in trainable(peft_model).items()}
    save_checkpoint(tmp_path / "step_000200", masters, adapter_config=adapter_config(peft_model))
    with pytest.raises(TrainError, match=said):
        consolidate(tmp_path / "step_000200", tmp_path / "out")


def test_modules_to_save_get_the_names_that_peft_gives_them(tmp_path, base):
    peft_model = adapted(base, torch.float32, modules_to_save=["lm_head"])
    save_checkpoint(
        tmp_path / "step_000200", trainable(peft_model), 2, dtype="fp32", adapter_config=adapter_config(peft_model)
    )
    ours = load_file(consolidate(tmp_path / "step_000200", tmp_path / "out") / "adapter_model.safetensors")
    peft_model.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_existing_output_is_refused_before_reading(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(TrainError, match="out exists"):
        consolidate(tmp_path / "absent", tmp_path / "out")


def test_the_command_exits_2_for_what_the_user_can_fix(tmp_path, base, capsys):
    save_lora(tmp_path / "ck", base)
    argv = ["consolidate", "--source", str(tmp_path / "ck"), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    assert main(argv) == 2
    assert "exists" in capsys.readouterr().err


def test_torch_is_not_imported():
    code = "import sys, trainer.consolidate; print([m for m in ('torch', 'safetensors', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
