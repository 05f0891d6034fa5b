import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.merging import KINDS, assert_same_bits, edit_config, merge, peft_merge, proof_of, save_adapter, weights
from support.tiny_checkpoints import save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import merge as stage
from trainer.lora_adapter import read_adapter
from trainer.merge_plan import make_plan
from trainer.merge_proof import DEFAULT_PROMPTS, read_prompts
from trainer.merge_sum import row_blocks
from trainer.spec import TrainError
from trainer.worker import main

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": save_base(folder / "小羊驼"),
        "qwen2": save_base(folder / "qwen2", "qwen2", tied=True),
        "gpt2": save_base(folder / "gpt2", "gpt2", dtype=torch.float32),
        "fp32": save_base(folder / "fp32", dtype=torch.float32),
        "fp16": save_base(folder / "fp16", dtype=torch.float16),
    }


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("llama", "bf16", {}),
        ("qwen2", "bf16", {}),
        ("fp32", "fp32", {}),
        ("fp16", "fp16", {}),
        ("llama", "bf16", {"use_rslora": True, "r": 3, "lora_alpha": 5}),
        ("fp32", "fp32", {"use_rslora": True, "r": 3, "lora_alpha": 5}),
        (
            "fp32",
            "fp32",
            {"rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 7}, "alpha_pattern": {"o_proj": 1.5}},
        ),
        ("gpt2", "fp32", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        ("llama", "bf16", {"target_modules": ["lm_head", "q_proj"]}),
        ("llama", "bf16", {"target_modules": r".*layers\.1.*gate_proj"}),
    ],
)
def test_the_bits_are_those_of_peft(tmp_path, bases, family, dtype, options):
    adapter = save_adapter(tmp_path / "adapter", bases[family], KINDS[dtype], **options)
    out = merge(bases[family], adapter, tmp_path / "ours", "--no-proof")
    assert_same_bits(weights(out), peft_merge(bases[family], adapter, tmp_path / "theirs", KINDS[dtype]))
    assert json.loads((out / "merge_report.json").read_text())["verified"] is None


def test_an_fp32_adapter_is_not_rounded_before_the_sum(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], torch.float32)
    out = merge(bases["llama"], adapter, tmp_path / "ours", "--no-proof")
    assert_same_bits(weights(out), peft_merge(bases["llama"], adapter, tmp_path / "theirs", torch.bfloat16))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 40), (17, 700), (700, 1024), (529, 1000), (33, 40_000)])
def test_large_weights_are_merged_in_blocks_with_the_same_bits(tmp_path, transposed, shape):
    torch.manual_seed(0)
    rows, columns = shape
    weight, a = torch.randn(rows, columns), torch.randn(8, rows if transposed else columns)
    b = torch.randn(columns if transposed else rows, 8)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    save_file({"m.weight": weight}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    save_file(
        {"base_model.model.m.lora_A.weight": a, "base_model.model.m.lora_B.weight": b},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 3, "fan_in_fan_out": transposed}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    ours = weights(merge(base, adapter, tmp_path / "out", "--no-proof"))["m.weight"]
    update = b @ a
    assert torch.equal(ours, weight + (update.T if transposed else update) * (3 / 8))


def test_blocks_cover_every_row_once_and_none_is_thin():
    for rows in (1, 15, 16, 17, 1000, 1025, 4097):
        for columns in (1, 576, 40_000, 10**6):
            blocks = row_blocks(rows, columns)
            assert [b for a, z in blocks for b in range(a, z)] == list(range(rows))
            assert all(z - a >= min(16, rows) for a, z in blocks)


@pytest.mark.parametrize("sharded", [False, True])
def test_shards_in_and_out(tmp_path, bases, sharded):
    base = bases["llama"]
    if sharded:
        base = save_base(tmp_path / "base", max_shard_size="20KB")
        assert len(list(base.glob("model-*.safetensors"))) > 2
    adapter = save_adapter(tmp_path / "adapter", base)
    out = merge(base, adapter, tmp_path / "ours", "--no-proof", "--max-shard-size", "30KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    theirs = peft_merge(base, adapter, tmp_path / "theirs", torch.bfloat16)
    assert_same_bits(weights(out), theirs)
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in theirs.items())


@pytest.mark.parametrize(("family", "dtype"), [("llama", "fp32"), ("llama", "fp16"), ("fp32", "bf16")])
def test_another_dtype_is_rounded_once_and_named_in_the_config(tmp_path, bases, family, dtype):
    adapter = save_adapter(tmp_path / "adapter", bases[family])
    out = merge(bases[family], adapter, tmp_path / "ours", "--no-proof", "--dtype", dtype)
    exact = peft_merge(bases[family], adapter, tmp_path / "theirs", torch.float32)
    assert_same_bits(weights(out), {n: t.to(KINDS[dtype]) for n, t in exact.items()})
    assert AutoModelForCausalLM.from_pretrained(out).dtype == KINDS[dtype]


def test_the_result_is_a_whole_model_folder(tmp_path, bases, capsys):
    base = shutil.copytree(bases["qwen2"], tmp_path / "base")
    (base / "modeling_x.py").write_text("# 自定义")
    (base / "pytorch_model.bin").write_bytes(b"x")
    (base / "README.md").write_text("x")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 1 }}")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"bits": 4}, "说明": "小薇"}
    (base / "config.json").write_text(json.dumps(config))
    adapter = save_adapter(tmp_path / "adapter", bases["qwen2"], spread=0.3)
    more = tmp_path / "more.json"
    more.write_text(json.dumps(["小薇是谁？", {"user": "你好", "system": "简短回答"}]), encoding="utf-8")
    out = merge(base, adapter, tmp_path / "merged", "--prompts", more)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "modeling_x.py",
    }
    assert "additional_chat_templates/tool_use.jinja" in names
    assert not names & {"pytorch_model.bin", "README.md", "adapter_config.json"}
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in written
    assert written["说明"] == "小薇"
    assert AutoTokenizer.from_pretrained(out).decode(AutoTokenizer.from_pretrained(out)("小薇")["input_ids"]) == "小薇"
    report = json.loads((out / "merge_report.json").read_text(encoding="utf-8"))
    assert report["verified"] is True
    assert report["tensors_merged"] == 14
    assert report["proof"]["prompts"] == [*DEFAULT_PROMPTS, "小薇是谁？", "简短回答\n\n你好"]
    assert report["proof"]["adapter_effect"]["mean"] > 0
    assert "merged 14 of 26 tensors" in capsys.readouterr().out


def test_the_base_named_by_the_adapter_is_used(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"])
    assert (merge(None, adapter, tmp_path / "out", "--no-proof") / "model.safetensors").is_file()
    edit_config(adapter, base_model_name_or_path="some/hub-id")
    with pytest.raises(TrainError, match="'some/hub-id' is not a folder") as e:
        merge(None, adapter, tmp_path / "out2")
    assert "--base" in e.value.hint
    with pytest.raises(TrainError, match="is not a folder"):
        merge(tmp_path / "nowhere", adapter, tmp_path / "out2")


@pytest.mark.parametrize(
    "change",
    [
        {"layer_replication": [[0, 1]]},
        {"trainable_token_indices": [1]},
        {"lora_bias": True},
        {"use_qalora": True},
        {"alora_invocation_tokens": [5]},
        {"kasa_config": {"beta": 1}},
        {"megatron_config": {"a": 1}},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "loftq"},
        {"peft_type": "LOHA"},
        {"r": 0},
        {"lora_alpha": "8"},
        {"rank_pattern": [1]},
        {"modules_to_save": "lm_head"},
        {"target_parameters": [1]},
        {"bias": "some"},
        {"a_key_of_the_future": {"x": 1}},
    ],
)
def test_whatever_changes_the_formula_is_refused_by_name(tmp_path, bases, change):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"])
    edit_config(adapter, **change)
    with pytest.raises(TrainError, match=next(iter(change))) as e:
        merge(bases["llama"], adapter, tmp_path / "out")
    assert "not plain LoRA" in e.value.message


def test_every_misfit_is_listed_at_once(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{Q}.lora_B.weight"] = torch.zeros(31, 4)
    tensors[f"{Q.replace('q_proj', 'k_proj')}.lora_A.weight"] = torch.zeros(5, 32)
    del tensors[f"{Q.replace('q_proj', 'v_proj')}.lora_A.weight"]
    tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    tensors["base_model.model.model.layers.9.mlp.up_proj.lora_B.weight"] = torch.zeros(72, 4)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 300)
    tensors["base_model.model.model.norm.weight"] = torch.zeros(32)
    save_file(tensors, path)
    with pytest.raises(TrainError, match="does not fit the base") as e:
        merge(bases["llama"], adapter, tmp_path / "out")
    problems = e.value.message.splitlines()[1:]
    for said in (
        "the update is [31, 32], model.layers.0.self_attn.q_proj.weight of the base [32, 32]",
        "lora_A [5, 32] and lora_B [16, 4] are not of rank 4",
        "v_proj.lora_B.weight: its other half is missing",
        "the base has no model.layers.9.mlp.up_proj.weight",
        "embed_tokens.lora_embedding_A: its other half is missing",
        "norm.weight: neither a LoRA matrix nor a weight of modules_to_save",
    ):
        assert sum(said in problem for problem in problems) == 1, said
    assert len(problems) == 6


def test_damaged_and_unusual_inputs_are_named(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"])
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    data = (base / "model.safetensors").read_bytes()

    def refused(said, base=base, adapter=adapter):
        with pytest.raises(TrainError, match=said):
            merge(base, adapter, tmp_path / "out")

    (base / "model.safetensors").write_bytes(data[:-1])
    refused("model.safetensors: tensor .*cut short")
    (base / "model.safetensors").unlink()
    refused("neither model.safetensors nor")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    refused("weight_map")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    refused("1 of 1 shards are missing: x.safetensors")
    (base / "x.safetensors").write_bytes(data)
    refused("1 tensors are not where it says, such as 'a'")
    (base / "config.json").unlink()
    refused("holds no config.json")
    refused("holds no adapter_config.json", adapter=base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused("holds no adapter_model.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"])
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: torch.zeros(512, 1, dtype=torch.uint8)}, base / "model.safetensors")
    with pytest.raises(TrainError, match="dtypes U8"):
        merge(base, adapter, tmp_path / "out")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(TrainError, match="is quantised"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), 1e30])
def test_a_result_that_is_not_finite_is_refused_and_nothing_is_left(tmp_path, bases, bad):
    adapter = save_adapter(tmp_path / "adapter", bases["fp16"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"{Q}.lora_B.weight"][2, 1] = bad
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(TrainError, match=r"q_proj\.weight is not finite"):
        merge(bases["fp16"], adapter, tmp_path / "out", "--no-proof")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_an_existing_folder_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["merge", "--adapter", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]) == 2
    assert "out exists" in capsys.readouterr().err


def test_a_base_without_tokenizer_needs_no_proof(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"])
    base = shutil.copytree(bases["llama"], tmp_path / "base", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(TrainError, match="holds no tokenizer") as e:
        merge(base, adapter, tmp_path / "out")
    assert "--no-proof" in e.value.hint
    merge(base, adapter, tmp_path / "out", "--no-proof")


@pytest.fixture
def trained(tmp_path, bases):
    return save_adapter(tmp_path / "adapter", bases["fp32"], torch.float32, spread=0.3)


def compare(bases, adapter, merged, dtype):
    return proof_of(bases["fp32"], adapter, merged, dtype)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_faithful_merge_is_proved_and_a_missing_one_is_not(tmp_path, bases, trained, dtype):
    good = compare(
        bases, trained, merge(bases["fp32"], trained, tmp_path / "good", "--no-proof", "--dtype", dtype), dtype
    )
    assert good["failures"] == []
    bad = compare(bases, trained, bases["fp32"], dtype)
    assert "adapter's effect" in bad["failures"][0]
    assert bad["mean_difference_of_effect"] == pytest.approx(1, abs=1e-3)
    assert bad["argmax_agreement"] < good["argmax_agreement"]
    if dtype == "fp32":
        assert good["mean_difference"] < 1e-5
        assert good["greedy_agreement"] == good["argmax_agreement"] == 1


@pytest.mark.parametrize("share", [0.0, 0.99])
def test_one_wrong_weight_is_seen_in_fp32(tmp_path, bases, trained, share):
    plan = make_plan(bases["fp32"], [read_adapter(trained)], None, 10**9)
    target = "model.layers.1.mlp.down_proj.weight"
    (update,) = plan.sources[target].updates
    plan.sources[target] = replace(plan.sources[target], updates=(replace(update, scaling=update.scaling * share),))
    (tmp_path / "bad").mkdir()
    stage.write(plan, tmp_path / "bad")
    assert compare(bases, trained, tmp_path / "bad", "fp32")["failures"]


def test_a_failed_comparison_marks_the_folder_and_exits_2(tmp_path, bases, trained, monkeypatch, capsys):
    # The boundary that is bent here: which adapter PEFT loads for the comparison.
    other = save_adapter(tmp_path / "other", bases["fp32"], torch.float32, spread=0.6)
    real = PeftModel.from_pretrained
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda model, _: real(model, str(other)))
    argv = ["merge", "--base", str(bases["fp32"]), "--adapter", str(trained), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "differs from base + adapter" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["verified"] is False
    assert report["proof"]["failures"]


def test_an_update_lost_in_bf16_is_noted(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["fp32"], torch.float32, spread=0.01)
    base = merge(bases["fp32"], adapter, tmp_path / "bf16", "--no-proof", "--dtype", "bf16")
    proof = proof_of(base, adapter, base, "bf16")
    assert proof["failures"] == []
    assert "lost 100% of the adapter's effect" in proof["notes"][0]


@pytest.mark.parametrize("text", ["{}", "[1]", '[""]', '[{"user": 1}]', '[{"system": "x"}]', "[", "\ud800"])
def test_odd_prompt_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "prompts.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(TrainError, match=r"prompts\.json"):
        read_prompts(path)
    with pytest.raises(TrainError, match="cannot be read"):
        read_prompts(Path(tmp_path / "absent.json"))


def test_a_model_with_its_own_code_is_not_run_unasked(tmp_path, bases):
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    adapter = save_adapter(tmp_path / "adapter", bases["llama"])
    with pytest.raises(TrainError, match="cannot be loaded for the comparison") as e:
        merge(base, adapter, tmp_path / "out")
    assert "--trust-remote-code" in e.value.hint
    assert not (tmp_path / "ran").exists()


def test_the_template_of_the_run_becomes_the_merged_models_own(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"])
    template = tmp_path / "自己的.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", encoding="utf-8")
    out = merge(bases["llama"], adapter, tmp_path / "out", "--no-proof", "--template", template)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False) == "<user>你好"
