import json
import shutil
import sys
import types

import gguf
import httpx2 as httpx
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file
from support.tiny_chat_model import CHATML, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.model_source import check_folder, materialise, tokenizer_files
from trainer.spec import ModelSpec, TrainError


def spec(kind, location, cache="/nowhere", revision="main"):
    return ModelSpec(str(location), kind, str(location), revision, "bf16", False, str(cache))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def assert_refused(model, *expected, exit_code=2):
    with pytest.raises(TrainError) as caught:
        materialise(model)
    assert caught.value.exit_code == exit_code
    for text in expected:
        assert text in str(caught.value)
    return caught.value


def test_a_folder_is_itself(folder):
    assert materialise(spec("folder", folder)) == folder


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        (["config.json"], "holds no config.json"),
        (["model.safetensors"], "holds neither model.safetensors nor"),
        (["tokenizer.json"], "has no tokenizer"),
        (["tokenizer.json", "tokenizer_config.json"], "has no tokenizer"),
    ],
)
def test_incomplete_folders(folder, removed, expected):
    for name in removed:
        (folder / name).unlink()
    assert assert_refused(spec("folder", folder), expected, str(folder)).hint


def test_what_is_not_a_model_folder(folder, tmp_path):
    assert_refused(spec("folder", tmp_path / "absent"), "does not exist")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert_refused(spec("folder", adapter), "is an adapter")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    assert_refused(spec("folder", folder), "Git LFS pointer", "lfs pull")


def test_truncated_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(spec("folder", folder), "model.safetensors")


def test_tokenizer_files_are_what_decides_the_tokens(folder):
    (folder / "merges.txt").write_text("", encoding="utf-8")
    names = {p.name for p in tokenizer_files(folder)}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"} <= names
    assert not names & {"config.json", "model.safetensors", "generation_config.json"}


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api"))


@pytest.mark.parametrize(
    ("failure", "exit_code", "expected"),
    [
        (errors.GatedRepoError("x", response=response(403)), 2, "HF_TOKEN"),
        (errors.RepositoryNotFoundError("x", response=response(404)), 2, "the Hub has no model me/model"),
        (errors.HFValidationError("x"), 2, "the Hub has no model me/model"),
        (errors.RevisionNotFoundError("x", response=response(404)), 2, "has no revision v9"),
        (errors.HfHubHTTPError("x", response=response(503)), 75, "answered 503"),
        (errors.HfHubHTTPError("x", response=response(401)), 2, "answered 401"),
        (ConnectionError("x"), 75, "cannot be reached"),
    ],
)
def test_what_the_hub_may_answer(monkeypatch, failure, exit_code, expected):
    def snapshot_download(name, revision, **patterns):
        assert (name, revision) == ("me/model", "v9")
        raise failure

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_refused(spec("hub", "me/model", revision="v9"), expected, exit_code=exit_code)


def test_the_hub_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for offline, exit_code, expected in ((True, 2, "HF_HUB_OFFLINE forbids"), (False, 75, "cannot be reached")):
        monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda value=offline: value)
        monkeypatch.setattr("huggingface_hub.snapshot_download", _not_cached)
        error = assert_refused(spec("hub", "me/model"), expected, "me/model", exit_code=exit_code)
        for way in ("HF_ENDPOINT", "modelscope:", "local folder"):
            assert way in error.hint


def _not_cached(*_, **__):
    raise errors.LocalEntryNotFoundError("not in the cache")


def test_modelscope_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert_refused(spec("modelscope", "me/model"), "pip install modelscope")


@pytest.mark.parametrize(("revision", "passed"), [("main", {}), ("v2", {"revision": "v2"})])
def test_modelscope(monkeypatch, folder, revision, passed):
    seen = {}

    def snapshot_download(name, **options):
        seen.update(options, name=name)
        return str(folder)

    names = "NotExistError NoValidRevisionError InvalidParameter NotLoginException RequestError FileDownloadError FileIntegrityError"
    kinds = types.ModuleType("modelscope.hub.errors")
    for name in names.split():
        setattr(kinds, name, type(name, (Exception,), {}))
    hub = types.ModuleType("modelscope.hub")
    hub.errors = kinds
    package = types.ModuleType("modelscope")
    package.snapshot_download = snapshot_download
    for name, module in (("modelscope", package), ("modelscope.hub", hub), ("modelscope.hub.errors", kinds)):
        monkeypatch.setitem(sys.modules, name, module)
    assert materialise(spec("modelscope", "me/model", revision=revision)) == folder
    assert seen["name"] == "me/model"
    assert {k: v for k, v in seen.items() if k == "revision"} == passed
    package.snapshot_download = _raising(kinds.NotExistError("gone"))
    assert_refused(spec("modelscope", "me/model"), "gone")
    package.snapshot_download = _raising(kinds.FileDownloadError("cut"))
    assert_refused(spec("modelscope", "me/model"), "cut", exit_code=75)


def _raising(error):
    def snapshot_download(*_, **__):
        raise error

    return snapshot_download


def test_random_weights_are_made_once_and_are_the_same_everywhere(folder, tmp_path, capsys):
    (folder / "model.safetensors").unlink()
    before = torch.random.get_rng_state()
    first = materialise(spec("random", folder, tmp_path / "a"))
    assert torch.equal(before, torch.random.get_rng_state())
    assert "random weights" in capsys.readouterr().out
    assert materialise(spec("random", folder, tmp_path / "a")) == first
    assert capsys.readouterr().out == ""
    second = materialise(spec("random", folder, tmp_path / "b"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert {t.dtype for t in load_file(first / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(first).chat_template == CHATML
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}), encoding="utf-8")
    assert materialise(spec("random", folder, tmp_path / "a")) != first
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}), encoding="utf-8")
    assert_refused(spec("random", folder, tmp_path / "a"), "config.json cannot be used", "num_hidden_layers")
    (folder / "config.json").write_text('{"model_type": "no_such_model"}', encoding="utf-8")
    assert_refused(spec("random", folder, tmp_path / "a"), "no_such_model")
    assert [p.name for p in (tmp_path / "a" / "models").iterdir() if p.name.startswith(".")] == []


def write_gguf(path, quantised=True):
    """A Llama of one layer with tied embeddings, as llama.cpp would write it."""
    rng = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "ab", "cd"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_eot_token_id(0)
    writer.add_chat_template(CHATML)
    shapes = {
        "token_embd": (len(tokens), 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
        "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "output_norm": (32,),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_a_plain_folder(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    made = materialise(spec("gguf", path, tmp_path / "cache"))
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", True)
    tensors = load_file(made / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((made / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == [0, 2]
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert (tokenizer.chat_template, tokenizer.eos_token) == (CHATML, "<|im_end|>")
    ours = AutoModelForCausalLM.from_pretrained(made)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.bfloat16)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, reference(ids).logits)
    stamp = made.stat().st_mtime_ns
    assert materialise(spec("gguf", path, tmp_path / "cache")) == made
    assert made.stat().st_mtime_ns == stamp
    check_folder(made)


def test_files_that_are_no_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    assert_refused(spec("gguf", path, tmp_path), "does not exist")
    path.write_bytes(b"version https://git-lfs")
    assert_refused(spec("gguf", path, tmp_path), "is not a GGUF file")
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert_refused(spec("gguf", path, tmp_path), "cannot be converted")
    assert not any((tmp_path / "models").iterdir())
