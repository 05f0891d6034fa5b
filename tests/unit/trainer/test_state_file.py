"""Single files of weights, as XTuner 0.1 (mmengine) and others leave them, and the folders in which they lie."""

import argparse
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.tiny_checkpoints import adapted, save_base
from transformers import AutoModelForCausalLM

from trainer import consolidate
from trainer.foreign import Given
from trainer.foreign_sources import find, inside_ray
from trainer.spec import TrainError

CFG = """
from peft import LoraConfig
pretrained_model_name_or_path = {base!r}
SYSTEM = '你是小薇'
model = dict(llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path),
    lora=dict(type='peft.LoraConfig', r=4, lora_alpha=6, lora_dropout=0.1))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def mmengine(monkeypatch):
    """Classes by the names that mmengine's have: only names stand in a pickle."""
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = sys.modules["mmengine.logging.history_buffer"]
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    return module.HistoryBuffer


def checkpoint(path: Path, weights: dict, base: Path, buffer=None) -> Path:
    """As mmengine's Runner.save_checkpoint lays it out."""
    history = buffer() if buffer else None
    if history is not None:
        history.__dict__.update(_log_history=np.arange(3.0), _count_history=np.arange(3), _statistics_methods={})
    number = int(path.stem.rpartition("_")[2])
    hub = {"log_scalars": {"train/loss": history}, "runtime_info": {"iter": number}, "resumed_keys": {}}
    meta = {"cfg": CFG.format(base=str(base)), "iter": number, "epoch": 0, "seed": 1, "time": "20260102_030405"}
    torch.save({"meta": meta, "state_dict": weights, "message_hub": hub, "optimizer": {"state": {}}}, path)
    return path


def consolidated(source: Path, out: Path, *flags: str) -> dict:
    parser = argparse.ArgumentParser()
    consolidate.add_arguments(parser)
    consolidate.run(parser.parse_args(["--source", str(source), "--out", str(out), *flags]))
    return load_file(next(out.glob("*.safetensors")))


def adapter_weights(base: Path) -> tuple:
    model = adapted(base)
    return model, {f"llm.{name}": p.detach() for name, p in model.named_parameters() if ".lora_" in name}


def test_an_adapter_of_xtuner_needs_neither_mmengine_nor_its_config(tmp_path, base, mmengine, capsys):
    model, weights = adapter_weights(base)
    path = checkpoint(tmp_path / "iter_7.pth", weights, base, mmengine)
    sys.modules.pop("mmengine.logging.history_buffer")
    found = consolidated(path, tmp_path / "adapter")
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        name.removeprefix("llm.").replace(".default", ""): tuple(t.shape) for name, t in weights.items()
    }
    said = capsys.readouterr().out
    assert "rank 4" in said
    assert "lora_alpha 6 from the training program's config" in said
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6, str(base))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").state_dict()
    own = {name: p for name, p in model.state_dict().items() if ".lora_" in name}
    assert all(torch.equal(loaded[name], p.to(loaded[name].dtype)) for name, p in own.items())
    assert json.loads((tmp_path / "adapter" / "consolidation.json").read_text())["step"] == 7


def test_a_full_model_of_xtuner_becomes_a_model_folder(tmp_path, base):
    weights = {f"llm.{name}": p for name, p in AutoModelForCausalLM.from_pretrained(base).state_dict().items()}
    weights["llm.model.rotary_emb.inv_freq"] = torch.ones(4)
    weights = {name: t + 0.5 for name, t in weights.items()}
    checkpoint(tmp_path / "iter_7.pth", weights, base)
    found = consolidated(tmp_path / "iter_7.pth", tmp_path / "out")
    assert len(found) == len(weights) - 1
    assert all(torch.equal(t, weights[f"llm.{name}"]) for name, t in found.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(t, weights[f"llm.{name}"]) for name, t in model.items())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("under", [None, "model", "module"])
def test_a_tied_head_in_a_plain_state_dict(tmp_path, wrapped, under):
    base = save_base(tmp_path / "base", "qwen2", tied=True, dtype=torch.float32)
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert "lm_head.weight" in weights
    content = {f"{wrapped}{name}": t for name, t in weights.items()}
    torch.save({under: content} if under else content, tmp_path / "pytorch_model_fsdp.bin")
    found = consolidated(tmp_path, tmp_path / "out", "--base", str(base))
    assert "lm_head.weight" not in found
    assert all(torch.equal(t, weights[name]) for name, t in found.items())


def test_the_newest_file_of_a_work_folder_is_taken(tmp_path, base):
    _, weights = adapter_weights(base)
    for number in (9, 10):
        checkpoint(tmp_path / f"iter_{number}.pth", {n: t + number for n, t in weights.items()}, base)
    name = next(iter(weights))
    short = name.removeprefix("llm.").replace(".default", "")
    assert torch.equal(consolidated(tmp_path, tmp_path / "new")[short], weights[name] + 10)
    assert torch.equal(consolidated(tmp_path, tmp_path / "old", "--step", "9")[short], weights[name] + 9)
    with pytest.raises(TrainError, match="holds no step 8") as e:
        consolidated(tmp_path, tmp_path / "out", "--step", "8")
    assert "9, 10" in e.value.hint


def test_what_is_not_known_is_asked_for_or_said(tmp_path, base, capsys):
    _, weights = adapter_weights(base)
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(TrainError, match="lora_alpha") as e:
        consolidated(tmp_path / "a.pth", tmp_path / "out")
    assert "--lora-alpha 8" in e.value.hint
    for alpha in ("0", "nan", "-1", "inf"):
        with pytest.raises(TrainError, match="--lora-alpha"):
            consolidated(tmp_path / "a.pth", tmp_path / "out", f"--lora-alpha={alpha}")
    # The whole of a PeftModel: what is not the adapter's is left out, and said.
    whole = {f"llm.{name}": p.detach() for name, p in adapted(base).named_parameters()}
    torch.save(whole, tmp_path / "a.pth")
    found = consolidated(tmp_path / "a.pth", tmp_path / "out", "--lora-alpha", "8")
    assert len(found) == len(weights)
    assert f"left out: {len(whole) - len(weights)} weights of the base" in capsys.readouterr().out


def test_a_trained_weight_that_no_adapter_file_can_hold_is_not_dropped(tmp_path, base):
    """Without base layers in the file, all that is there was trained."""
    _, weights = adapter_weights(base)
    torch.save(weights | {"llm.base_model.model.model.norm.weight": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(TrainError, match="no adapter file can hold it"):
        consolidated(tmp_path / "a.pth", tmp_path / "out", "--lora-alpha", "8")


def test_a_part_of_a_model_is_no_model(tmp_path, base):
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    half = {name: t for name, t in weights.items() if "layers.1." not in name}
    torch.save(half, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(TrainError, match="one file of several"):
        consolidated(tmp_path / "pytorch_model-00001-of-00002.bin", tmp_path / "out", "--base", str(base))
    torch.save(half, tmp_path / "half.bin")
    with pytest.raises(TrainError, match=f"{len(weights) - len(half)} weights of .* are not in the checkpoint"):
        consolidated(tmp_path / "half.bin", tmp_path / "out", "--base", str(base))
    assert not (tmp_path / "out").exists()


def test_weights_of_one_name_are_refused(tmp_path, base):
    _, weights = adapter_weights(base)
    twice = weights | {name.replace("llm.", "ema."): t * 2 for name, t in weights.items()}
    torch.save(twice, tmp_path / "a.pth")
    with pytest.raises(TrainError, match="which of them is meant"):
        consolidated(tmp_path / "a.pth", tmp_path / "out", "--lora-alpha", "8")


def test_another_step_than_the_files_own_is_refused(tmp_path, base):
    _, weights = adapter_weights(base)
    path = checkpoint(tmp_path / "iter_7.pth", weights, base)
    with pytest.raises(TrainError, match="is of step 7, not 100"):
        consolidated(path, tmp_path / "out", "--step", "100")
    assert consolidated(path, tmp_path / "out", "--step", "7")


def test_an_alpha_that_contradicts_the_config_beside_it_is_refused(tmp_path, base):
    model, weights = adapter_weights(base)
    torch.save(weights, tmp_path / "a.pth")
    model.peft_config["default"].save_pretrained(str(tmp_path))
    with pytest.raises(TrainError, match="says lora_alpha 6, --lora-alpha 8"):
        consolidated(tmp_path / "a.pth", tmp_path / "out", "--lora-alpha", "8")
    assert consolidated(tmp_path / "a.pth", tmp_path / "out", "--lora-alpha", "6")
    (tmp_path / "adapter_config.json").unlink()
    path = checkpoint(tmp_path / "iter_7.pth", weights, base)
    with pytest.raises(TrainError, match="config says lora_alpha 6, --lora-alpha 8"):
        consolidated(path, tmp_path / "other", "--lora-alpha", "8")


def test_a_layer_without_its_adapter_is_missed(tmp_path, base):
    model, weights = adapter_weights(base)
    model.peft_config["default"].save_pretrained(str(tmp_path))
    lost = {name: t for name, t in weights.items() if "layers.1.mlp.up_proj" not in name}
    path = checkpoint(tmp_path / "iter_7.pth", lost, base)
    with pytest.raises(TrainError, match=r"1 of the layers .* have no adapter, such as model\.layers\.1\.mlp\.up_proj"):
        consolidated(path, tmp_path / "out")
    # Adapters of some layers only, as their config says.
    model = adapted(base, layers_to_transform=[0], target_modules=["q_proj", "up_proj"])
    model.peft_config["default"].save_pretrained(str(tmp_path))
    some = {f"llm.{name}": p.detach() for name, p in model.named_parameters() if ".lora_" in name}
    assert len(consolidated(checkpoint(path, some, base), tmp_path / "some")) == len(some) < len(weights)
    # Without a config nobody knows which layers there should be.
    (tmp_path / "adapter_config.json").unlink()
    assert len(consolidated(checkpoint(path, lost, base), tmp_path / "lost")) == len(lost)


def test_names_that_are_no_adapters(tmp_path):
    torch.save(
        {"q_proj.lora_A.weight": torch.zeros(2, 3), "q_proj.lora_B.weight": torch.zeros(3, 2)}, tmp_path / "a.pth"
    )
    with pytest.raises(TrainError, match="not named as PEFT names"):
        consolidated(tmp_path / "a.pth", tmp_path / "out", "--lora-alpha", "8")


def test_files_that_hold_no_model_are_refused_by_name(tmp_path, base):
    def refused(content, said, name="x.pth"):
        torch.save(content, tmp_path / name)
        with pytest.raises(TrainError, match=said):
            consolidated(tmp_path / name, tmp_path / "out", "--base", str(base))
        assert not (tmp_path / "out").exists()

    refused({"state_dict": {}}, r"x.pth: holds no weights")
    refused([1, 2], "holds no weights")
    refused({"a.weight": torch.zeros(2, 3).T}, "a.weight is a view")
    refused({"model.norm.weight": torch.zeros(3)}, "is not the model that was trained")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(TrainError, match="is a file") as e:
        consolidated(tmp_path / "x.safetensors", tmp_path / "out")
    assert ".pth" in e.value.hint


class Hostile:
    def __reduce__(self):
        return exec, (f"open({str(Path(__file__).with_name('ran'))!r}, 'w')",)


@pytest.mark.parametrize("place", ["meta", "message_hub", "weights"])
def test_code_in_any_part_of_the_file_is_refused_and_not_run(tmp_path, base, place):
    _, weights = adapter_weights(base)
    content = {"meta": {}, "message_hub": {}, "state_dict": weights}
    if place == "weights":
        content["state_dict"] = weights | {"llm.x": Hostile()}
    else:
        content[place] = {"x": Hostile()}
    torch.save(content, tmp_path / "iter_1.pth")
    with pytest.raises(TrainError, match=r"iter_1.pth: asks for builtins.exec"):
        consolidated(tmp_path / "iter_1.pth", tmp_path / "out")
    assert not Path(__file__).with_name("ran").exists()


def test_a_config_is_read_as_text(tmp_path, base):
    _, weights = adapter_weights(base)
    path = tmp_path / "iter_1.pth"
    for cfg in (
        "lora_alpha = __import__('os').getpid()",
        "dict(lora_alpha=-1)",
        "dict(lora_alpha=float('inf'))",
        "((",
        "x" * 10**5,
    ):
        torch.save({"meta": {"cfg": cfg, "iter": "x"}, "state_dict": weights}, path)
        found = find(path, None)
        assert found is not None
        with pytest.raises(TrainError, match="lora_alpha does not"):
            found[1](found[0], Given())


def test_what_is_finished_already_is_said(tmp_path, base):
    model, _ = adapter_weights(base)
    model.save_pretrained(tmp_path / "run" / "checkpoint-5", save_embedding_layers=False)
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoint-5"):
        with pytest.raises(TrainError, match="holds an adapter already") as e:
            consolidated(source, tmp_path / "out")
        assert f"launch merge {tmp_path / 'run' / 'checkpoint-5'}" in e.value.hint
    with pytest.raises(TrainError, match="holds a model already"):
        consolidated(base, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainError, match="holds no checkpoint"):
        consolidated(tmp_path / "empty", tmp_path / "out")


def test_ray_folders_lead_to_what_lies_in_them(tmp_path, base):
    """A run of Ray Train holds checkpoint_* folders; its callback for transformers puts Trainer's into `checkpoint`."""
    _, weights = adapter_weights(base)
    run = tmp_path / "run"
    for number, name in enumerate(
        ("checkpoint_2026-11-24_10-00-00.000001", "checkpoint_2026-11-24_11-00-00.000001"), 4
    ):
        inner = run / name / ("checkpoint" if number == 5 else ".")
        inner.mkdir(parents=True)
        checkpoint(inner / f"iter_{number}.pth", weights, base)
    newest = run / "checkpoint_2026-11-24_11-00-00.000001" / "checkpoint"
    assert inside_ray(run, None) == newest
    assert inside_ray(newest.parent, None) == newest
    assert inside_ray(run, 4) == run / "checkpoint_2026-11-24_10-00-00.000001"
    with pytest.raises(TrainError, match="holds no step 3") as e:
        inside_ray(run, 3)
    assert "4, 5" in e.value.hint
    assert len(consolidated(run, tmp_path / "out")) == len(weights)
    assert inside_ray(tmp_path / "absent", None) == tmp_path / "absent"
    shutil.rmtree(run)
