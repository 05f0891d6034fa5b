"""`launch recipes import`: fifteen configs of five programs become recipes that check, with an account of every key."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli_recipes import app
from launcher.errors import LaunchError, RecipeError
from launcher.import_recipe import Imported, import_recipe, write
from launcher.import_report import report
from launcher.recipe import load_recipe

IMPORTS = Path(__file__).parents[2] / "golden" / "imports"
PROGRAMS = ("xtuner", "llamafactory", "axolotl", "swift", "trl")
CONFIGS = sorted(f"{p}/{f.name}" for p in PROGRAMS for f in (IMPORTS / p).iterdir() if ".golden" not in f.name)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configs with their data, away from the goldens beside them."""
    shutil.copytree(IMPORTS, tmp_path / "theirs", ignore=shutil.ignore_patterns("*.golden*", "keys_*"))
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path


def imported(source: Path, program: str = "") -> Imported:
    return import_recipe(source, program, Path("mine.yaml"))


def made_from(folder: Path, name: str, text: str, program: str = "") -> Imported:
    source = folder / "theirs" / "data" / name
    source.write_text(text, encoding="utf-8")
    return imported(source, program)


def losses(found: Imported) -> dict[str, str]:
    return {entry.key: entry.why for entry in found.draft.left if entry.matters}


def test_there_are_three_of_each_program() -> None:
    assert [sum(name.startswith(f"{p}/") for name in CONFIGS) for p in PROGRAMS] == [3] * 5


@pytest.mark.parametrize("name", CONFIGS)
def test_config_becomes_a_recipe_that_checks(folder: Path, name: str, golden: Callable[[str, str], str]) -> None:
    found = imported(folder / "theirs" / name)
    problems = write(found)
    assert problems == []
    loaded = load_recipe(Path("mine.yaml"))
    assert all(Path(file.path).is_file() for file in loaded.recipe.data.files)
    text = f"{report(found, problems)}\n\n{found.text}".replace(str(folder), "<folder>")
    assert text == golden(f"imports/{name}.golden.txt", text), "if the change is meant: --update-golden"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_the_file_is_accounted_for(folder: Path, name: str) -> None:
    found = imported(folder / "theirs" / name)
    told = {m.key for m in found.draft.mapped} | {entry.key for entry in found.draft.left}
    assert {key for key, _ in found.foreign.settings} - told == set()


@pytest.mark.parametrize("name", CONFIGS)
def test_program_is_told_by_the_content_under_another_name(folder: Path, name: str) -> None:
    source = folder / "theirs" / name
    other = source.with_name(f"settings{source.suffix}")
    source.rename(other)
    assert imported(other).foreign.program == name.partition("/")[0]


def test_command_writes_the_recipe_and_never_over_another(folder: Path) -> None:
    source = str(folder / "theirs" / "llamafactory" / "llama3_lora_sft.yaml")
    result = CliRunner().invoke(app, ["import", source])
    assert result.exit_code == 0, result.output
    assert "-> data.template: llamafactory/llama3" in result.output
    assert result.output.endswith(
        "wrote llama3_lora_sft.yaml\nit passes `launch recipes check`; run it: launch llama3_lora_sft.yaml\n"
    )
    assert CliRunner().invoke(app, ["check", "llama3_lora_sft.yaml"]).exit_code == 0
    again = CliRunner().invoke(app, ["import", source, "--out", "llama3_lora_sft.yaml"])
    assert isinstance(again.exception, LaunchError)
    assert "exists" in str(again.exception)


def test_command_exits_with_2_where_a_person_must_choose(folder: Path) -> None:
    source = folder / "theirs" / "data" / "dpo.yaml"
    source.write_text(
        "model_name_or_path: Qwen/Qwen2.5-7B-Instruct\nstage: dpo\nfinetuning_type: lora\ndataset: identity_zh\n"
        "dataset_dir: .\ntemplate: qwen\npref_beta: 0.1\n",
        encoding="utf-8",
    )
    result = CliRunner().invoke(app, ["import", str(source)])
    assert result.exit_code == 2
    assert "to decide\n  dpo.yaml:2: stage: dpo is not offered" in result.output
    assert "# To decide: stage: dpo is not offered" in Path("dpo.yaml").read_text(encoding="utf-8")


def test_unknown_keys_are_all_errors_with_the_nearest_key(folder: Path) -> None:
    text = "model_name_or_path: m/m\nfinetuning_type: lora\ncutof_len: 100\nlora_rnk: 8\nstage: sft\nzzz: 1\n"
    with pytest.raises(RecipeError) as error:
        made_from(folder, "x.yaml", text)
    messages = [(p.where.rpartition("/")[2], p.message) for p in error.value.problems]
    assert messages == [
        ("x.yaml:3:1", "LLaMA-Factory has no key `cutof_len`; did you mean cutoff_len?"),
        ("x.yaml:4:1", "LLaMA-Factory has no key `lora_rnk`; did you mean lora_rank?"),
        ("x.yaml:6:1", "LLaMA-Factory has no key `zzz`"),
    ]
    assert not Path("mine.yaml").exists()


def test_a_key_that_axolotl_would_drop_is_an_error_inside_a_data_set_too(folder: Path) -> None:
    text = "base_model: m/m\nsequence_len: 10\nmicro_batch_size: 1\nsample_pack: true\ndatasets:\n  - path: chat.jsonl\n    typ: alpaca\n"
    with pytest.raises(RecipeError) as error:
        made_from(folder, "a.yml", text)
    assert [p.message for p in error.value.problems] == [
        "Axolotl has no key `sample_pack`; did you mean sample_packing?",
        "Axolotl has no key `datasets[].typ`; did you mean datasets[].type?",
    ]


def test_a_misspelt_variable_of_xtuner_is_an_error(folder: Path) -> None:
    source = folder / "theirs" / "xtuner" / "qwen_qlora_alpaca.py"
    text = source.read_text(encoding="utf-8").replace("weight_decay = 0\n", "weight_decay = 0\nmax_lenght = 4096\n")
    source.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="nothing in the config reads `max_lenght`; did you mean max_length"):
        imported(source)


def test_settings_of_two_programs_need_the_format(folder: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be told"):
        made_from(folder, "odd.yaml", "seed: 1\n")
    found = made_from(folder, "odd.yaml", "seed: 1\nmodel_name_or_path: m/m\ndataset_name: chat.jsonl\n", "trl")
    assert (found.foreign.program, found.draft.values["train.seed"]) == ("trl", 1)
    with pytest.raises(LaunchError, match=re.escape("--format vicuna: there is no such format")):
        made_from(folder, "odd.yaml", "seed: 1\n", "vicuna")


def test_values_of_secrets_are_nowhere(folder: Path) -> None:
    found = imported(folder / "theirs" / "llamafactory" / "qwen_qlora_packed.json")
    shown = report(found, write(found)) + found.text
    assert "hf_hub_token: (hidden)" in shown
    assert "hf_abcdefgh" not in shown


def test_what_was_on_and_is_lost_is_said_and_what_was_off_is_not(folder: Path) -> None:
    text = (
        "model_name_or_path: Qwen/Qwen2.5-7B-Instruct\nfinetuning_type: lora\nstage: sft\ndataset: identity_zh\n"
        "dataset_dir: .\ntemplate: qwen\nneftune_noise_alpha: 5\nuse_dora: true\npissa_init: false\noptim: lion_8bit\n"
        "adam_epsilon: 1e-8\nlabel_smoothing_factor: 0.0\nwarmup_steps: 10\n"
    )
    lost = losses(made_from(folder, "x.yaml", text))
    assert sorted(lost) == ["neftune_noise_alpha", "optim", "use_dora", "warmup_steps"]


def test_defaults_that_a_recipe_does_not_share_are_written_out(folder: Path) -> None:
    text = (
        "model_name_or_path: Qwen/Qwen2.5-7B\nfinetuning_type: lora\nstage: sft\ndataset: identity_zh\ndataset_dir: .\n"
    )
    values = made_from(folder, "x.yaml", text).draft.values
    expected = {
        "model.dtype": "fp32",
        "method.rank": 8,
        "data.packing": False,
        "train.learning_rate": 5e-05,
        "train.schedule": "linear",
        "train.warmup_ratio": 0.0,
        "train.micro_batch": 8,
    }
    assert {key: values[key] for key in expected} == expected


def test_ms_swift_without_accumulation_makes_16_rows_a_step(folder: Path) -> None:
    command = (
        "swift sft --model Qwen/Qwen2.5-7B-Instruct --use_hf --dataset chat.jsonl --per_device_train_batch_size 4\n"
    )
    values = made_from(folder, "x.sh", command).draft.values
    assert (values["train.global_batch"], values["train.weight_decay"], values["method.alpha"]) == (16, 0.1, 32.0)
    assert values["model.source"] == "Qwen/Qwen2.5-7B-Instruct"


def test_a_command_line_overrides_the_file_that_it_names(folder: Path) -> None:
    (folder / "theirs" / "data" / "base.yaml").write_text(
        "model_name_or_path: Qwen/Qwen2.5-7B\nfinetuning_type: lora\nstage: sft\ndataset: identity_zh\ndataset_dir: .\n"
        "template: qwen\nlearning_rate: 1e-4\nlora_rank: 8\n",
        encoding="utf-8",
    )
    command = "FORCE_TORCHRUN=1 llamafactory-cli train base.yaml learning_rate=3e-5 # faster\n"
    found = made_from(folder, "run.sh", command)
    assert (found.draft.values["train.learning_rate"], found.draft.values["method.rank"]) == (3e-05, 8)
    assert [(k, n.value) for k, n in found.foreign.started] == [("FORCE_TORCHRUN", "1")]


def test_xtuner_started_by_a_command_takes_its_flags(folder: Path) -> None:
    source = folder / "theirs" / "xtuner" / "run.sh"
    source.write_text(
        "NPROC_PER_NODE=2 xtuner train qwen_qlora_alpaca.py --deepspeed deepspeed_zero3_offload --seed 7\n",
        encoding="utf-8",
    )
    values = imported(source).draft.values
    assert (values["parallel.zero"], values["parallel.offload"], values["train.seed"]) == (3, "parameters", 7)


@pytest.mark.parametrize("verb", ["rlhf --rlhf_type dpo", "grpo"])
def test_preference_training_is_refused_by_name(folder: Path, verb: str) -> None:
    program = "swift" if "rlhf" in verb else "trl"
    with pytest.raises(LaunchError, match=f"`{verb.split()[0]}` is not offered"):
        made_from(folder, "x.sh", f"{program} {verb} --model_name_or_path m/m\n")


def test_a_vision_model_is_one_choice_and_names_no_model_of_ours(folder: Path) -> None:
    source = folder / "theirs" / "xtuner" / "qwen_qlora_alpaca.py"
    text = source.read_text(encoding="utf-8").replace("type=SupervisedFinetune", "type=LLaVAModel, freeze_llm=True")
    source.write_text(text, encoding="utf-8")
    found = imported(source)
    messages = [choice.message for choice in found.draft.choices]
    assert messages == ["model.type: LLaVAModel: cannot be taken over", "model.freeze_llm: true: cannot be taken over"]


def test_what_only_running_the_config_would_tell_is_an_error_where_it_is_needed(folder: Path) -> None:
    source = folder / "theirs" / "xtuner" / "qwen_qlora_alpaca.py"
    text = source.read_text(encoding="utf-8").replace("lr = 2e-4", "lr = float(open('lr.txt').read())")
    source.write_text(text, encoding="utf-8")
    with pytest.raises(
        RecipeError, match=r"optim_wrapper.optimizer.lr: `float\(open\('lr.txt'\).read\(\)\)` cannot be known"
    ):
        imported(source)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("r=64", "r=-1", "model.lora.r: -1; expected a whole number, 1 or more"),
        ("betas = (0.9, 0.999)", "betas = ('a', 'b')", "expected two numbers"),
        ("lr = 2e-4", "lr = 'fast'", "optim_wrapper.optimizer.lr: fast; expected a number"),
        ("batch_size = 1 ", "batch_size = 1.5 ", "train_dataloader.batch_size: 1.5; expected a whole number"),
    ],
)
def test_values_of_the_wrong_kind_are_errors_with_their_line(folder: Path, old: str, new: str, said: str) -> None:
    source = folder / "theirs" / "xtuner" / "qwen_qlora_alpaca.py"
    text = source.read_text(encoding="utf-8")
    assert old in text
    source.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError, match=re.escape(said)) as error:
        imported(source)
    assert re.search(r"qwen_qlora_alpaca\.py:\d+:\d+$", error.value.problems[0].where)


def test_a_config_on_top_of_another_is_refused_with_its_name(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"builds on others, which are not read: from \.base import \*"):
        made_from(folder, "x.py", "with read_base():\n    from .base import *\nmodel = dict()\n")


def test_data_sets_of_a_hub_and_missing_files_are_named(folder: Path) -> None:
    text = "model_name_or_path: m/m\nfinetuning_type: lora\nstage: sft\ndataset: nope\ndataset_dir: .\ntemplate: qwen\n"
    found = made_from(folder, "x.yaml", text)
    assert [c.message for c in found.draft.choices] == ["nope is not registered: no dataset_info.json has it"]
    assert [p.message for p in write(found)] == ["data.files is missing"]


def test_paths_are_found_in_the_folders_above_the_file(folder: Path) -> None:
    deep = folder / "theirs" / "examples" / "train_lora"
    deep.mkdir(parents=True)
    shutil.copytree(folder / "theirs" / "data", folder / "theirs" / "examples" / "data")
    (deep / "x.yaml").write_text(
        "model_name_or_path: m/m\nfinetuning_type: lora\nstage: sft\ndataset: identity_zh\ntemplate: qwen\n",
        encoding="utf-8",
    )
    found = imported(deep / "x.yaml")
    assert not write(found)
    (item,) = found.draft.values["data.files"]
    assert item["path"] == str(folder / "theirs" / "examples" / "data" / "alpaca_zh.json")
    assert "path: ../theirs/examples/data/alpaca_zh.json" in found.text


def test_fsdp_becomes_zero_3_with_its_offload(folder: Path) -> None:
    text = (
        "base_model: m/m\nsequence_len: 512\nmicro_batch_size: 1\nlearning_rate: 1e-5\ndebug:\n"
        "datasets:\n  - path: alpaca_zh.json\n    type: alpaca\n"
        "fsdp: [full_shard, auto_wrap]\nfsdp_config: {fsdp_offload_params: true}\n"
    )
    found = made_from(folder, "a.yaml", text)
    assert (found.draft.values["parallel.zero"], found.draft.values["parallel.offload"]) == (3, "parameters")
    assert {e.key: e.why for e in found.draft.left}["debug"] == "Axolotl has no such key; it is not set"
    assert not write(found)


def test_rank_stabilised_alpha_scales_the_same(folder: Path) -> None:
    values = imported(folder / "theirs" / "llamafactory" / "qwen_qlora_packed.json").draft.values
    rank = values["method.rank"]
    assert values["method.alpha"] / rank == pytest.approx(64 / rank**0.5)


def test_iterations_of_xtuner_become_optimizer_steps(folder: Path) -> None:
    values = imported(folder / "theirs" / "xtuner" / "internlm2_full_sp.py").draft.values
    assert (values["train.accumulate"], values["parallel.sp"]) == (16, 4)
    assert (values["checkpoint.every_steps"], values["evaluate.samples_every_steps"]) == (50, 10)


def test_a_system_prompt_that_training_never_saw_is_not_asked_with(folder: Path) -> None:
    found = imported(folder / "theirs" / "xtuner" / "qwen_qlora_alpaca.py")
    assert found.draft.values["evaluate.prompts"] == [
        "请给我介绍五个上海的景点",
        "Please tell me five scenic spots in Shanghai",
    ]
    assert "custom_hooks[EvaluateChatHook].system" in losses(found)
    own = imported(folder / "theirs" / "xtuner" / "internlm2_full_sp.py")
    assert own.draft.values["evaluate.prompts"] == [{"user": "你是谁？", "system": "你是小鹪。"}]
