"""Adapters merged by the product and by PEFT, on small real models."""

import json
from argparse import ArgumentParser

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.tiny_checkpoints import adapted
from trainer import merge as stage
from trainer.merge_proof import DEFAULT_PROMPTS, Subject, prove

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def save_adapter(folder, base, dtype=torch.bfloat16, **options):
    adapted(base, dtype, **options).save_pretrained(folder, save_embedding_layers=False)
    return folder


def merge(base, adapter, out, *options):
    parser = ArgumentParser()
    stage.add_arguments(parser)
    argv = ["--adapter", str(adapter), "--out", str(out), *map(str, options)]
    stage.run(parser.parse_args([*argv, "--base", str(base)] if base else argv))
    return out


def weights(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def peft_merge(base, adapter, out, dtype):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    model.merge_and_unload().save_pretrained(out)
    return weights(out)


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])]
    assert different == []


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def proof_of(base, adapter, merged, dtype, **more):
    subject = Subject(base, ((adapter, 1.0),), merged, dtype, **more)
    return prove(subject, list(DEFAULT_PROMPTS), "cpu", trust_remote_code=False)
