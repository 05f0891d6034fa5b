"""What an adapter can hold beside plain LoRA: each kind merged as PEFT merges it, or, where PEFT changes what was trained, as PEFT runs it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.merging import assert_same_bits, edit_config, merge, peft_merge, proof_of, save_adapter, weights
from support.tiny_checkpoints import HEADS, SIZES, save_base
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MixtralConfig,
    Qwen2MoeConfig,
)

from trainer.nf4 import Nf4
from trainer.spec import TrainError


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    fp32 = torch.float32
    return {
        "llama": save_base(folder / "llama", dtype=fp32),
        "llama bf16": save_base(folder / "llama_bf16"),
        "tied": save_base(folder / "tied", "qwen2", tied=True, dtype=fp32),
        "gpt2": save_base(folder / "gpt2", "gpt2", dtype=fp32),
    }


def assert_close(ours, theirs, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    worst = {n: float((ours[n].float() - theirs[n].float()).abs().max()) for n in ours}
    assert max(worst.values()) < tolerance, max(worst, key=worst.get)


def assert_proved(base, adapter, out, dtype="fp32", **more):
    """What the merged folder computes is what PEFT computes with base and adapter, to fp32's last digits."""
    proof = proof_of(base, adapter, out, dtype, **more)
    assert proof["failures"] == []
    assert proof["mean_difference"] < 1e-5
    assert proof["greedy_agreement"] == 1
    assert proof["adapter_effect"]["mean"] > 0.01
    return proof


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    ],
)
def test_dora_gives_each_output_its_learnt_length(tmp_path, bases, family, options):
    adapter = save_adapter(tmp_path / "adapter", bases[family], torch.float32, use_dora=True, **options)
    magnitudes = [n for n in load_file(adapter / "adapter_model.safetensors") if "magnitude" in n]
    assert len(magnitudes) >= 2
    out = merge(bases[family], adapter, tmp_path / "ours", "--no-proof")
    assert_close(weights(out), peft_merge(bases[family], adapter, tmp_path / "theirs", torch.float32))
    assert_proved(bases[family], adapter, out)


def test_dora_in_bf16_is_one_rounding_away(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["llama bf16"], use_dora=True)
    ours = weights(merge(bases["llama bf16"], adapter, tmp_path / "ours", "--no-proof"))
    theirs = peft_merge(bases["llama bf16"], adapter, tmp_path / "theirs", torch.bfloat16)
    assert_within_one_step(ours, theirs)


def assert_within_one_step(ours, theirs):
    """Neighbours among bf16's numbers: their bits, read as whole numbers, differ by one at most."""
    for name in ours:
        bits = [t[name].view(torch.int16).int() & 0x7FFF for t in (ours, theirs)]
        assert int((bits[0] - bits[1]).abs().max()) <= 1, name


def test_large_weights_in_bf16_are_within_one_step_of_peft(tmp_path):
    torch.manual_seed(0)
    folder = save_base(tmp_path / "base", sizes={"hidden_size": 512, "intermediate_size": 1536})
    adapter = save_adapter(tmp_path / "adapter", folder, r=64)
    ours = weights(merge(folder, adapter, tmp_path / "ours", "--no-proof"))
    theirs = peft_merge(folder, adapter, tmp_path / "theirs", torch.bfloat16)
    assert_within_one_step(ours, theirs)
    different = sum(int((ours[n] != theirs[n]).sum()) for n in ours) / sum(t.numel() for t in ours.values())
    assert different < 1e-3


def test_embeddings_and_head_of_their_own(tmp_path, bases):
    options = {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], torch.float32, **options)
    out = merge(bases["llama"], adapter, tmp_path / "ours", "--no-proof")
    assert_same_bits(weights(out), peft_merge(bases["llama"], adapter, tmp_path / "theirs", torch.float32))


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]])
def test_a_tied_embedding_that_was_adapted_on_one_side_becomes_two(tmp_path, bases, targets):
    """PEFT's merge would change both sides, which is not what was trained."""
    adapter = save_adapter(tmp_path / "adapter", bases["tied"], torch.float32, target_modules=targets)
    out = merge(bases["tied"], adapter, tmp_path / "out", "--no-proof")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    merged, base = weights(out), weights(bases["tied"])
    assert torch.equal(merged["lm_head.weight"], base["model.embed_tokens.weight"]) is ("lm_head" not in targets)
    assert_proved(bases["tied"], adapter, out)


@pytest.mark.parametrize("names", [["lm_head"], ["lm_head", "embed_tokens", "norm"]])
def test_modules_that_were_trained_whole_take_their_place(tmp_path, bases, names):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], torch.float32, modules_to_save=names, spread=0.3)
    assert len(touched(adapter)) >= len(names)
    out = merge(bases["llama"], adapter, tmp_path / "ours", "--no-proof")
    theirs = peft_merge(bases["llama"], adapter, tmp_path / "theirs", torch.float32)
    assert_same_bits(weights(out), theirs)
    assert_proved(bases["llama"], adapter, out)


def touched(adapter, as_one=False):
    """Change the weights of an adapter file that are no LoRA matrices, as training would have. Returns their names.

    Weights that are equal, because they are one in the model, stay so.
    """
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    names = [name for name in tensors if ".lora_" not in name]
    for name in names:
        torch.manual_seed(0 if as_one else names.index(name))
        tensors[name] = tensors[name] + torch.randn(tensors[name].shape) * 0.1
    save_file(tensors, path)
    return names


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_modules_trained_whole_on_a_tied_base(tmp_path, bases, names):
    adapter = save_adapter(tmp_path / "adapter", bases["tied"], torch.float32, modules_to_save=names)
    touched(adapter)
    out = merge(bases["tied"], adapter, tmp_path / "out", "--no-proof")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert_proved(bases["tied"], adapter, out)


def test_a_head_that_the_base_stores_apart_from_its_embedding_is_kept(tmp_path, bases):
    """Its config says that they are tied; transformers looks at the weights, and so do we."""
    base = shutil.copytree(bases["tied"], tmp_path / "base")
    tensors = weights(base)
    torch.manual_seed(5)
    head = torch.randn(tensors["model.embed_tokens.weight"].shape) * 0.2
    save_file(tensors | {"lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter", base, torch.float32, target_modules=["embed_tokens", "q_proj"])
    out = merge(base, adapter, tmp_path / "out", "--no-proof")
    assert torch.equal(weights(out)["lm_head.weight"], head)
    assert_proved(base, adapter, out)


def test_an_embedding_trained_as_one_with_the_head_stays_one(tmp_path, bases):
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = save_adapter(tmp_path / "adapter", bases["tied"], torch.float32, **options)
    touched(adapter, as_one=True)
    out = merge(bases["tied"], adapter, tmp_path / "out", "--no-proof")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in weights(out)
    assert_proved(bases["tied"], adapter, out)


def test_biases_that_were_trained_take_their_place(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["tied"], torch.float32, bias="all")
    assert touched(adapter)
    out = merge(bases["tied"], adapter, tmp_path / "ours", "--no-proof")
    assert_same_bits(weights(out), peft_merge(bases["tied"], adapter, tmp_path / "theirs", torch.float32))


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_a_vocabulary_that_grew_comes_with_its_tokenizer(tmp_path, bases, family, capsys):
    """As programs do that add special tokens: a resized model, embeddings in the adapter, the tokenizer beside it."""
    model = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(bases[family])
    tokenizer.add_tokens(["<|小薇|>"], special_tokens=True)
    tokenizer.chat_template = "{{ messages[0].content }}训练"
    model.resize_token_embeddings(304, mean_resizing=False)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0, 0.3)
    adapter = tmp_path / "adapter"
    peft_model.save_pretrained(adapter, save_embedding_layers=True)
    tokenizer.save_pretrained(adapter)
    out = merge(bases[family], adapter, tmp_path / "out")
    report = json.loads((out / "merge_report.json").read_text())
    assert report["verified"] is True
    assert report["proof"]["mean_difference"] < 1e-5
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (304, family == "tied")
    assert "has 304 tokens" in capsys.readouterr().out
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.convert_tokens_to_ids("<|小薇|>") == len(tokenizer) - 1
    assert loaded.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False) == "你好训练"
    assert AutoModelForCausalLM.from_pretrained(out).get_output_embeddings().weight.shape[0] == 304
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).unlink()
    merge(bases[family], adapter, tmp_path / "without", "--no-proof")
    assert "lacks the new tokens" in capsys.readouterr().out


def test_an_embedding_that_the_adapter_keeps_in_fp32_is_merged_as_the_base_is_stored(tmp_path, bases):
    """PEFT saves what it trained in fp32; the merged model is one of bf16 all the same, and judged as such."""
    base = bases["llama bf16"]
    adapter = save_adapter(tmp_path / "adapter", base, torch.float32, target_modules=["embed_tokens", "q_proj"])
    path = adapter / "adapter_model.safetensors"
    whole = weights(base)["model.embed_tokens.weight"].float()
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({name: whole} | load_file(path), path)
    out = merge(base, adapter, tmp_path / "out")
    report = json.loads((out / "merge_report.json").read_text())
    assert (report["dtype"], report["verified"]) == ("bf16", True)
    assert {t.dtype for t in weights(out).values()} == {torch.bfloat16}


def test_a_head_beside_layers_that_store_in_out(tmp_path, bases):
    """fan_in_fan_out is of GPT-2's Conv1D layers; its head is a linear one, tied to the embedding here."""
    options = {"target_modules": ["c_attn", "c_proj", "lm_head"], "fan_in_fan_out": True}
    adapter = save_adapter(tmp_path / "adapter", bases["gpt2"], torch.float32, **options)
    # What PEFT decided for the last layer, the head; attn.c_proj is square, so no shape tells.
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    out = merge(bases["gpt2"], adapter, tmp_path / "out", "--no-proof")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert_proved(bases["gpt2"], adapter, out)


@pytest.mark.parametrize(
    "pattern", [r"layers\.(0|1)\.self_attn\.q_proj", r"layers\.[0-9]+\..*k_proj", r"^model\..*v_proj$"]
)
def test_patterns_as_people_write_them(tmp_path, bases, pattern):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], torch.float32, rank_pattern={pattern: 7})
    ranks = {t.shape[0] for n, t in load_file(adapter / "adapter_model.safetensors").items() if ".lora_A." in n}
    assert ranks == {4, 7}
    out = merge(bases["llama"], adapter, tmp_path / "ours", "--no-proof")
    assert_same_bits(weights(out), peft_merge(bases["llama"], adapter, tmp_path / "theirs", torch.float32))


def test_a_vocabulary_that_grew_on_one_side_only_is_refused(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], torch.float32, modules_to_save=["lm_head"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(304, 32)}, path)
    with pytest.raises(TrainError, match="vocabularies of input and output differ"):
        merge(bases["llama"], adapter, tmp_path / "out")


def test_several_adapters_are_added_with_their_weights(tmp_path, bases):
    base = bases["llama"]
    one = save_adapter(tmp_path / "one", base, torch.float32, target_modules=["q_proj", "up_proj"])
    two = save_adapter(tmp_path / "two", base, torch.float32, target_modules=["q_proj", "o_proj"], r=8, spread=0.2)
    arguments = ("--weight", 0.5, "--adapter", two, "--weight", -1.5)
    out = merge(base, one, tmp_path / "out", *arguments)
    report = json.loads((out / "merge_report.json").read_text())
    assert report["verified"] is True
    assert [(a["folder"], a["weight"]) for a in report["adapters"]] == [(str(one), 0.5), (str(two), -1.5)]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), one)
    model.load_adapter(two, "two")
    model.base_model.set_adapter(["default", "two"])
    for module in model.modules():
        for name, factor in (("default", 0.5), ("two", -1.5)):
            if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling:
                module.scaling[name] *= factor
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    assert_same_bits(weights(out), weights(tmp_path / "theirs"))


def test_what_cannot_be_added_up_is_refused(tmp_path, bases):
    base = bases["llama"]
    plain = save_adapter(tmp_path / "plain", base, torch.float32)
    dora = save_adapter(tmp_path / "dora", base, torch.float32, use_dora=True)
    heads = [save_adapter(tmp_path / f"head{n}", base, torch.float32, modules_to_save=["lm_head"]) for n in (1, 2)]
    for first, second, said in ((plain, dora, "DoRA"), (dora, plain, "DoRA"), (*heads, "brings lm_head.weight whole")):
        with pytest.raises(TrainError, match=said):
            merge(base, first, tmp_path / "out", "--adapter", second)
    for weight in ("nan", "inf"):
        with pytest.raises(TrainError, match="finite"):
            merge(base, plain, tmp_path / "out", "--weight", weight)
    with pytest.raises(TrainError, match=r"cannot be weighted by 0\.5"):
        merge(base, heads[0], tmp_path / "out", "--weight", 0.5)
    with pytest.raises(TrainError, match="2 adapters and 1 weights"):
        merge(base, plain, tmp_path / "out", "--adapter", plain, "--weight", 1)


def test_a_dora_adapter_without_magnitudes_is_refused(tmp_path, bases):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], torch.float32)
    edit_config(adapter, use_dora=True)
    with pytest.raises(TrainError, match="use_dora is True, a magnitude is not there"):
        merge(bases["llama"], adapter, tmp_path / "out")


MOE = {"num_experts_per_tok": 2, **SIZES, **HEADS}


def save_experts(folder, family):
    """A mixture of 4 experts. Saved with each expert's matrices apart, as such models are published."""
    base = save_base(folder, dtype=torch.float32)
    torch.manual_seed(0)
    if family == "qwen2_moe":
        sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}
        config = Qwen2MoeConfig(num_experts=4, **sizes, **MOE)
    else:
        config = MixtralConfig(num_local_experts=4, **MOE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base)
    return base


def test_a_decoder_beside_a_vision_tower_has_other_names_in_the_folder(tmp_path):
    """In memory model.language_model.layers, in the files language_model.model.layers."""
    base = save_base(tmp_path / "base", dtype=torch.float32)
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 56, "patch_size": 14}
    text = {**SIZES, **HEADS, "head_dim": 8, "model_type": "gemma3_text"}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    (base / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in weights(base)
    pattern = r"(?!model\.language_model\.).*"
    adapter = save_adapter(tmp_path / "adapter", base, torch.float32, exclude_modules=pattern)
    out = merge(base, adapter, tmp_path / "ours", "--no-proof")
    assert_close(weights(out), peft_merge(base, adapter, tmp_path / "theirs", torch.float32))
    changed = [n for n, t in weights(out).items() if not torch.equal(t, weights(base)[n])]
    assert len(changed) == 2 * 7
    assert_proved(base, adapter, out)


def test_all_linear_adapts_experts_and_their_router(tmp_path):
    base = save_experts(tmp_path / "base", "mixtral")
    adapter = save_adapter(tmp_path / "adapter", base, torch.float32)
    out = merge(base, adapter, tmp_path / "ours", "--no-proof")
    changed = {n for n, t in weights(out).items() if not torch.equal(t, weights(base)[n])}
    assert {n for n in changed if "gate" in n} == {f"model.layers.{i}.block_sparse_moe.gate.weight" for i in (0, 1)}
    assert len(changed) == 2 * (4 + 1 + 4 * 3)
    assert_proved(base, adapter, out)


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj"]])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_experts(tmp_path, family, targets):
    base = save_experts(tmp_path / "base", family)
    apart = [n for n in weights(base) if ".experts.0." in n]
    assert len(apart) == 6, apart
    options = {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{t}" for t in targets]}
    adapter = save_adapter(tmp_path / "adapter", base, torch.float32, **options)
    out = merge(base, adapter, tmp_path / "ours", "--no-proof")
    assert_close(weights(out), peft_merge(base, adapter, tmp_path / "theirs", torch.float32))
    changed = [n for n, t in weights(out).items() if not torch.equal(t, weights(base)[n])]
    assert len(changed) == 2 + 2 * 4 * (2 * ("gate_up_proj" in targets) + ("down_proj" in targets))
    assert_proved(base, adapter, out)


@pytest.mark.parametrize(
    ("shape", "model_type", "transposed"),
    [
        ((24, 32), "llama4_text", False),
        ((32, 24), "gpt_oss", True),
        ((32, 32), "gpt_oss", True),
        ((32, 32), "llama4_text", False),
    ],
)
def test_experts_stored_as_one_tensor(tmp_path, shape, model_type, transposed):
    """gpt-oss stores (experts, in, out); others, where they keep experts together, (experts, out, in)."""
    torch.manual_seed(0)
    experts, rank, (rows, columns) = 3, 2, shape
    out_features, in_features = (24, 32) if rows != columns else (32, 32)
    weight, name = torch.randn(experts, rows, columns), "model.layers.0.mlp.experts"
    a, b = torch.randn(rank * experts, in_features), torch.randn(out_features, rank * experts)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    save_file({f"{name}.down_proj": weight}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    factors = {f"base_model.model.{name}.lora_{half}.weight": t for half, t in (("A", a), ("B", b))}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_parameters": ["experts.down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    ours = weights(merge(base, adapter, tmp_path / "out", "--no-proof"))[f"{name}.down_proj"]
    order = "e i o" if transposed else "e o i"
    update = torch.einsum(
        f"o r e, e r i -> {order}", b.reshape(out_features, rank, experts), a.reshape(experts, rank, in_features)
    )
    assert (ours - (weight + update * 2)).abs().max() < 1e-5


def test_parameters_of_single_layers(tmp_path):
    """The same name under several owners: each layer has its own."""
    base = save_experts(tmp_path / "base", "qwen2_moe")
    targets = ["0.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]
    adapter = save_adapter(tmp_path / "adapter", base, torch.float32, target_modules=[], target_parameters=targets)
    out = merge(base, adapter, tmp_path / "ours", "--no-proof")
    assert_close(weights(out), peft_merge(base, adapter, tmp_path / "theirs", torch.float32))


def test_experts_that_the_base_has_not(tmp_path):
    base = save_experts(tmp_path / "base", "qwen2_moe")
    options = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    adapter = save_adapter(tmp_path / "adapter", base, torch.float32, **options)

    def refused(said, **changes):
        changed = shutil.copytree(adapter, tmp_path / "changed")
        edit_config(changed, **changes)
        with pytest.raises(TrainError, match=said):
            merge(base, changed, tmp_path / "out")
        shutil.rmtree(changed)

    refused("the base has more experts than the 2", r=8, lora_alpha=8)
    refused("the adapter has 8 experts", r=2)
    refused("are not of rank 3", r=3)
    refused("no model.layers.0.mlp.experts.bias", target_parameters=["experts.bias"])
    refused("which of them is adapted", target_parameters=["experts.bias", "experts.down_proj"])
    with pytest.raises(TrainError, match=r"the base has no model.layers.0.mlp.experts.down_proj"):
        merge(save_base(tmp_path / "dense"), adapter, tmp_path / "out")


def test_an_adapter_brings_no_code(tmp_path, bases):
    """Trust in a base's code is no trust in that of an adapter, whose tokenizer may come with some."""
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    (base / "tokenization_x.py").write_text("# of the base")
    adapter = save_adapter(tmp_path / "adapter", base, torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter / name)
    (adapter / "tokenization_x.py").write_text("# of the adapter")
    out = merge(base, adapter, tmp_path / "out", "--no-proof")
    assert (out / "tokenization_x.py").read_text() == "# of the base"
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", None]}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TrainError, match="tokenizer code that is not the base's"):
        merge(base, adapter, tmp_path / "out2", "--no-proof")
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    merge(base, adapter, tmp_path / "same", "--no-proof")
    (adapter / "tokenizer.json").unlink()
    (adapter / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(TrainError, match="a link out of the adapter's folder"):
        merge(base, adapter, tmp_path / "out3", "--no-proof")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_pattern": {"(.*.*)*(.*.*)*x": 4}}, "understood are names"),
        ({"rank_pattern": {".*a.*b.*c.*d": 4}}, "understood are names"),
        ({"rank_pattern": {"(a|b)" * 9: 4}}, "understood are names"),
        ({"rank_pattern": {"(q_proj": 4}}, "is not a regular expression"),
        ({"rank_pattern": {"q_proj": float("inf")}}, "expected a number above 0"),
        ({"rank_pattern": {"q_proj": 4.5}}, "expected a whole number"),
        ({"alpha_pattern": {"q_proj": "1"}}, "expected a number above 0"),
    ],
)
def test_patterns_that_cannot_be_used(tmp_path, bases, changes, said):
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], torch.float32)
    edit_config(adapter, **changes)
    with pytest.raises(TrainError, match=said):
        merge(bases["llama"], adapter, tmp_path / "out")


def test_nf4_of_weights_by_other_names_is_refused(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    tensors = {name.removeprefix("model."): tensor for name, tensor in weights(base).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainError, match="which NF4 would round"):
        merge(base, adapter, tmp_path / "out", "--base-precision", "nf4", "--no-proof")


@pytest.mark.parametrize("double", [True, False])
def test_nf4_gives_the_weights_that_qlora_trains_on(tmp_path, double):
    base = save_base(tmp_path / "base")
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=options)
    from bitsandbytes.functional import dequantize_4bit

    expected = {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in loaded.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    Nf4("bf16", double).apply(model)
    changed = {name: p for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed.keys() == expected.keys()
    assert all(torch.equal(changed[name], expected[name]) for name in changed)


def test_a_qlora_adapter_is_merged_on_either_base_and_the_report_says_which_is_nearer(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, spread=0.1)
    reports = {}
    for precision in ("bf16", "nf4"):
        out = merge(base, adapter, tmp_path / precision, "--base-precision", precision, "--trained-on-nf4")
        reports[precision] = json.loads((out / "merge_report.json").read_text())
        assert reports[precision]["verified"] is True
        assert reports[precision]["base_precision"] == precision
        bases = reports[precision]["proof"]["bases"]
        assert (bases["merged_on"], bases["nearer"]) == (precision, "nf4")
        distances = bases["mean_difference_from_training"]
        assert distances["nf4"] < distances["bf16"] / 3
    said = capsys.readouterr().out
    assert said.count("--base-precision nf4 merges there") == 1
    # What one of them finds in memory for the other is what that one's folder holds.
    for name in ("bf16", "nf4"):
        found = [report["proof"]["bases"]["mean_difference_from_training"][name] for report in reports.values()]
        assert found[0] == pytest.approx(found[1], rel=0.05)
    merged, model = weights(tmp_path / "nf4"), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    Nf4("bf16", double_quant=True).apply(model)
    theirs = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    assert_within_one_step(merged, {name: theirs[name].to(torch.bfloat16) for name in merged})


def test_a_merge_of_half_precision_weights_needs_no_torch(tmp_path, bases):
    """Its import takes as long as merging a model of a billion weights."""
    adapter = save_adapter(tmp_path / "adapter", bases["llama bf16"])
    code = (
        "import sys; from trainer.worker import main; "
        f"code = main(['merge', '--base', {str(bases['llama bf16'])!r}, '--adapter', {str(adapter)!r}, "
        f"'--out', {str(tmp_path / 'out')!r}, '--no-proof']); "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "out" / "model.safetensors").is_file()
