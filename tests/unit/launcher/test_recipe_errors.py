"""Every kind of mistake in a recipe: where it is reported, what is said, which fix is offered."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import LaunchError, Problem, RecipeError
from launcher.recipe import load_recipe

HEAD = "model: Qwen/Qwen2.5-7B-Instruct\nmethod: lora\ndata: d.jsonl\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    return tmp_path


def problems(text: str, *sets: str) -> list[Problem]:
    """What loading `text` as r.yaml reports; [] when it loads."""
    Path("r.yaml").write_text(text, encoding="utf-8")
    try:
        load_recipe(Path("r.yaml"), sets)
    except RecipeError as e:
        return e.problems
    return []


def only(text: str, *sets: str) -> Problem:
    found = problems(text, *sets)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("lines", "where", "message"),
    [
        ("train:\n  leaning_rate: 1e-4\n", "5:3", "did you mean learning_rate?"),
        ("train:\n  Learning-Rate: 1e-4\n", "5:3", "did you mean learning_rate?"),
        ("learning_rate: 1e-4\n", "4:1", "it belongs under train"),
        ("trian:\n  epochs: 1\n", "4:1", "did you mean train?"),
        ("train:\n  rank: 8\n", "5:3", "it belongs under method"),
        ("train:\n  name: x\n", "5:3", "it belongs under method or run"),
        ("train:\n  model: x\n", "5:3", "model is a section of its own"),
        ("train:\n  extends: x\n", "5:3", "extends must stand at the top"),
        ("max_lenght: 5\n", "4:1", "did you mean data.max_length?"),
        ("frobnicate: 5\n", "4:1", "unknown key `frobnicate`"),
        ("evaluate:\n  - user: a\n    contain: [b]\n", "6:5", "did you mean contains?"),
    ],
)
def test_unknown_keys_name_the_nearest(lines: str, where: str, message: str) -> None:
    problem = only(HEAD + lines)
    assert problem.where == f"r.yaml:{where}"
    assert problem.message.startswith("unknown key") or "extends" in lines
    assert message in problem.message


def test_unknown_key_lists_what_is_allowed() -> None:
    assert only(HEAD + "checkpoint:\n  zzz: 1\n").hint == "Allowed under checkpoint: every_steps, keep, async, on_error"


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("lr: 1e-4", "train.learning_rate"),
        ("per_device_train_batch_size: 2", "train.micro_batch"),
        ("gradient_accumulation_steps: 4", "train.accumulate"),
        ("accumulative_counts: 4", "train.accumulate"),
        ("batch_size: 2", "train.micro_batch"),
        ("cutoff_len: 1024", "data.max_length"),
        ("num_train_epochs: 3", "train.epochs"),
        ("max_epochs: 3", "train.epochs"),
        ("model_name_or_path: a/b", "model.source"),
        ("finetuning_type: lora", "method.name"),
        ("lora_rank: 8", "method.rank"),
        ("lora_alpha: 8", "method.alpha"),
        ("lora_target: all", "method.targets"),
        ("save_steps: 100", "checkpoint.every_steps"),
        ("save_total_limit: 2", "checkpoint.keep"),
        ("pack_to_max_length: true", "data.packing"),
        ("sequence_parallel_size: 2", "parallel.sp"),
        ("max_norm: 1", "train.max_grad_norm"),
        ("deepspeed: ds_z2.json", "parallel.zero"),
        ("bf16: true", "model.dtype"),
        ("quantization_bit: 4", "method.name"),
        ("dataset: identity", "data.files"),
        ("output_dir: out", "run.dir"),
        ("SYSTEM: hello", "data.system"),
        ("prompt_template: qwen_chat", "data.template"),
        ("evaluation_freq: 50", "evaluate.samples_every_steps"),
        ("evaluation_inputs: [a]", "evaluate.prompts"),
        ("val_size: 0.1", "data.held_out"),
        ("test_size: 0.1", "data.held_out"),
        ("eval_dataset: test.jsonl", "data.held_out_files"),
        ("eval_steps: 50", "evaluate.loss_every_steps"),
    ],
)
def test_words_of_other_tools_are_translated(line: str, ours: str) -> None:
    problem = only(f"{HEAD}{line}\n")
    assert problem.where == "r.yaml:4:1"
    assert problem.message == f"unknown key `{line.split(':')[0]}`; a recipe calls it {ours}"
    assert problem.hint


def test_translation_writes_the_lines_out() -> None:
    assert only(HEAD + "lr: 5e-5\n").hint == "Write it there:\ntrain:\n  learning_rate: 5e-5"
    assert only(HEAD + "train:\n  lr: 5e-5\n").hint == "Write `learning_rate: 5e-5`"
    assert only(HEAD + "val_size: 0.1\n").hint == "Write the share of the rows under data: `held_out: 0.05`."
    assert only(HEAD + "evaluate:\n  eval_steps: 50\n").hint == "Write `loss_every_steps: 50`"


def test_settings_that_a_recipe_does_not_have() -> None:
    assert "data.held_out" in only(HEAD + "do_eval: true\n").hint
    assert "--gpus 0,2" in only(HEAD + "num_gpus: 2\n").hint
    assert only(HEAD + "warmup_ratio: 0.1\n").message.endswith("it belongs under train")


@pytest.mark.parametrize(
    ("lines", "where", "message", "fix"),
    [
        ("train:\n  micro_batch: '2'\n", "5:16", "'2' is a string; expected a whole number", "Write 2 without quotes"),
        ("train:\n  micro_batch: 2.0\n", "5:16", "2.0; expected|2.0 is a number; expected", "Write 2"),
        ("train:\n  max_steps: 1e3\n", "5:14", "1e3 is a number; expected a whole number", "Write 1000"),
        ("train:\n  micro_batch: 0\n", "5:16", "train.micro_batch: 0; expected a whole number, 1 or more", ""),
        ("train:\n  micro_batch: true\n", "5:16", "true is a switch", ""),
        ("train:\n  epochs: three\n", "5:11", "'three' is a string; expected a number", ""),
        ("train:\n  epochs: [3]\n", "5:11", "a list of 1; expected a number", "Write one value without brackets: 3"),
        ("train:\n  epochs:\n    x: 3\n", "6:5", "a mapping with keys of its own; expected a number", "same line"),
        ("train:\n  seed: 1_000\n", "5:9", "'1_000' is a string", "Write 1000"),
        ("train:\n  seed: 1,000\n", "5:9", "'1,000' is a string", "Write 1000"),
        ("train:\n  seed: 017\n", "5:9", "'017' is a string", "Write 17, without the leading zero"),
        ("train:\n  seed: 0x1F\n", "5:9", "'0x1F' is a string", "Write 31"),
        ("train:\n  warmup_ratio: 3%\n", "5:17", "'3%' is a string", "Write 0.03"),
        (
            "cluster:\n  port: 99999\n",
            "5:9",
            "cluster.port: 99999; expected a whole number, 0 or more and 65535 or less",
            "",
        ),
        ("train:\n  warmup_ratio: 1.0\n", "5:17", "train.warmup_ratio: 1.0; expected a number, 0 or more and less", ""),
        ("train:\n  betas: [0.9]\n", "5:10", "a list of 1; expected a list of 2 numbers", ""),
        ("train:\n  betas: [0.9, x]\n", "5:16", "train.betas[2]: 'x' is a string; expected a number", ""),
        ("train:\n  betas: [0.9, 1.0]\n", "5:16", "train.betas[2]: 1.0; expected a number, 0 or more and less", ""),
        ("train:\n  gradient_checkpointing: yes\n", "5:27", "'yes' is a string; expected true or false", "Write true"),
        ("train:\n  gradient_checkpointing: 1\n", "5:27", "1 is a number; expected true or false", "Write true"),
        ("train:\n  schedule: Cosine\n", "5:13", "expected cosine, linear or constant", "Write cosine"),
        ("train:\n  schedule: liner\n", "5:13", "expected cosine, linear or constant", "Did you mean linear?"),
        ("parallel:\n  zero: true\n", "5:9", "true is a switch (true/false); expected auto, 0, 1, 2 or 3", ""),
        ("parallel:\n  zero: 2.0\n", "5:9", "2.0 is a number; expected auto, 0, 1, 2 or 3", "Write 2"),
        ("parallel:\n  zero: '3'\n", "5:9", "'3' is a string; expected auto, 0, 1, 2 or 3", "Write 3 without quotes"),
        ("parallel:\n  zero: 4\n", "5:9", "4 is a number; expected auto, 0, 1, 2 or 3", ""),
        ("parallel:\n  sp: atuo\n", "5:7", "expected a whole number, 1 or more, or auto", "Did you mean auto?"),
        ("run:\n  name: 123\n", "5:9", "123 is a number; expected a text", 'Write it in quotes: "123"'),
        ("run:\n  name: a/b\n", "5:9", "run.name: a/b; expected a text without spaces or slashes", ""),
        ("run:\n  timeout_s: 00:30:00\n", "5:14", "'00:30:00' is a string; expected a whole number", "Write 1800"),
        ("evaluate:\n  strict: on\n", "5:11", "'on' is a string; expected true or false", "Write true"),
        (
            "evaluate:\n  - {user: a, contains: b}\n",
            "5:25",
            "'b' is a string; expected a list of texts",
            "Write a list: [b]",
        ),
        ("evaluate:\n  - {user: a, contains: [1]}\n", "5:26", "prompts[1].contains[1]: 1 is a number", '"1"'),
        ("evaluate:\n  - {user: a, language: Chinese}\n", "5:25", "expected zh or en", "Write zh"),
        ("train: 3\n", "4:8", "train is a section with keys of its own, not the value 3", ""),
        ("train:\n  epochs:3\n", "5:3", "train is a section", "space after the colon: `epochs: 3`"),
        ("train: [3]\n", "4:8", "train is a section with keys of its own, not a list", ""),
    ],
)
def test_wrong_values(lines: str, where: str, message: str, fix: str) -> None:
    problem = only(HEAD + lines)
    assert problem.where == f"r.yaml:{where}"
    assert any(part in problem.message for part in message.split("|")), problem.message
    assert fix in problem.hint


@pytest.mark.parametrize(
    ("text", "where", "fix"),
    [
        ("model: {source: a/b, dtype: bfloat16}\nmethod: lora\ndata: d.jsonl\n", "1:29", "Write bf16"),
        ("model: a/b\nmethod: QLoRA\ndata: d.jsonl\n", "2:9", "Write qlora"),
        ("model: a/b\nmethod: {name: lora, targets: q_proj}\ndata: d.jsonl\n", "2:31", ""),
        ("model: a/b\nmethod: {name: lora, targets: [q_proj, 3]}\ndata: d.jsonl\n", "2:40", 'in quotes: "3"'),
        ("model: {source: ''}\nmethod: lora\ndata: d.jsonl\n", "1:17", ""),
        ("model: a/b\nmethod: lora\ndata: []\n", "3:7", "at least one item"),
        ("model: a/b\nmethod: lora\ndata: {files: [{path: d.jsonl, format: openai}]}\n", "3:40", "Write messages"),
    ],
)
def test_wrong_values_in_the_first_sections(text: str, where: str, fix: str) -> None:
    problem = only(text)
    assert problem.where == f"r.yaml:{where}"
    assert fix in problem.hint


@pytest.mark.parametrize(
    ("lines", "where", "message"),
    [
        ("train:\n", "4:1", "train has nothing below it; null is not 'default': remove the line"),
        ("train:\n  epochs:\n", "5:3", "train.epochs has no value; null is not 'default': remove the line"),
        ("train: {epochs: null}\n", "4:9", "train.epochs has no value"),
        ("evaluate:\n  prompts:\n    - a\n    -\n", "7:6", "evaluate.prompts[2]: this list item is empty"),
        ("run:\n  name: ~\n", "5:3", "run.name has no value"),
    ],
)
def test_null_is_not_default(lines: str, where: str, message: str) -> None:
    problem = only(HEAD + lines)
    assert problem.where == f"r.yaml:{where}"
    assert problem.message.startswith(message)


def test_null_where_it_means_not_set() -> None:
    assert (
        problems(f"{HEAD.replace('d.jsonl', '{files: d.jsonl, system: null}')}evaluate: [{{user: a, system: ~}}]\n")
        == []
    )


def test_missing_keys_come_with_an_example() -> None:
    found = problems("train:\n  epochs: 1\n")
    assert [(p.where, p.message) for p in found] == [
        ("r.yaml:1:1", "data is missing"),
        ("r.yaml:1:1", "method is missing"),
        ("r.yaml:1:1", "model is missing"),
    ]
    assert all("Add" in p.hint for p in found)
    problem = only("model:\n  dtype: bf16\nmethod: lora\ndata: d.jsonl\n")
    assert (problem.where, problem.message) == ("r.yaml:1:1", "model.source is missing")


@pytest.mark.parametrize(
    ("lines", "where", "message"),
    [
        (
            "train:\n  epochs: 1\n  max_steps: 5\n",
            "6:3",
            "train.max_steps contradicts train.epochs (r.yaml:5:3): only one can end the training",
        ),
        (
            "train:\n  micro_batch: 2\n  accumulate: 3\n  global_batch: 64\n",
            "7:17",
            "train.global_batch 64 cannot be made of micro_batch 2 x accumulate 3 (r.yaml:5:3, r.yaml:6:3)",
        ),
        ("train:\n  micro_batch: 4\n  global_batch: 2\n", "6:17", "cannot be made of micro_batch 4 (r.yaml:5:3)"),
        (
            "parallel:\n  zero: 2\n  offload: parameters\n",
            "6:12",
            "needs ZeRO stage 3; parallel.zero is 2 (r.yaml:5:9)",
        ),
        ("parallel:\n  zero: 0\n  offload: optimizer\n", "6:12", "parallel.zero is 0 (r.yaml:5:9)"),
        ("evaluate:\n  strict: true\n  prompts: [a]\n", "5:3", "no prompt (r.yaml:6:3) says what its answer must be"),
        ("evaluate:\n  strict: true\n", "5:3", "evaluate.strict has nothing to check"),
        ("evaluate:\n  - {user: a, regex: '(['}\n", "5:22", "evaluate.prompts[1].regex: not a regular expression"),
        ("evaluate:\n  samples_every_steps: 5\n", "5:3", "has no evaluate.prompts to ask"),
        ("evaluate:\n  prompts: [a]\n  num_samples: 1\n", "6:3", "evaluate.num_samples has no effect"),
    ],
)
def test_contradictions_name_both_places(lines: str, where: str, message: str) -> None:
    problem = only(HEAD + lines)
    assert problem.where == f"r.yaml:{where}"
    assert message in problem.message
    assert problem.hint


OWN = "model: a/b\nmethod: lora\ndata:\n  files: d.jsonl\n"
"""The start of a recipe whose data section goes on."""


def test_rows_are_held_out_in_one_way() -> None:
    Path("e.jsonl").write_text('{"text": "b"}\n', encoding="utf-8")
    problem = only(OWN + "  held_out: 0.1\n  held_out_files: e.jsonl\n")
    assert problem.where == "r.yaml:6:3"
    assert problem.message == "data.held_out_files contradicts data.held_out (r.yaml:5:3): rows are held out in one way"
    assert problem.hint == "Remove one of the two."
    assert problems(OWN + "  held_out: 0\n  held_out_files: [e.jsonl]\n") == []
    assert problems(OWN + "  held_out: 0.1\n  held_out_files: []\n") == []


@pytest.mark.parametrize("lines", ["", "  held_out: 0\n", "  held_out_files: []\n"])
def test_a_loss_of_no_rows_has_no_effect(lines: str) -> None:
    problem = only(OWN + lines + "evaluate:\n  loss_every_steps: 50\n")
    assert problem.where == f"r.yaml:{6 + lines.count(chr(10))}:3"
    assert problem.message == "evaluate.loss_every_steps has no effect: no rows are held out"
    assert "held_out: 0.05" in problem.hint


def test_a_loss_of_held_out_rows_may_have_its_steps() -> None:
    Path("e.jsonl").write_text('{"text": "b"}\n', encoding="utf-8")
    for lines in ("  held_out: 0.1\n", "  held_out_files: e.jsonl\n"):
        assert problems(OWN + lines + "evaluate:\n  loss_every_steps: 50\n") == []
        assert problems(OWN + lines + "evaluate:\n  loss_every_steps: 0\n") == []


@pytest.mark.parametrize(
    ("files", "held_out", "where", "other"),
    [
        ("d.jsonl", "d.jsonl", "r.yaml:5:19", "r.yaml:4:10"),
        ("[e.jsonl, d.jsonl]", "[f.jsonl, ./d.jsonl]", "r.yaml:5:29", "r.yaml:4:20"),
        ("[e.jsonl, {path: d.jsonl}]", "{path: ../HERE/d.jsonl}", "r.yaml:5:26", "r.yaml:4:20"),
    ],
)
def test_a_file_is_either_trained_on_or_held_out(
    folder: Path, files: str, held_out: str, where: str, other: str
) -> None:
    for name in ("e.jsonl", "f.jsonl"):
        Path(name).write_text('{"text": "b"}\n', encoding="utf-8")
    held_out = held_out.replace("HERE", folder.name)
    problem = only(f"model: a/b\nmethod: lora\ndata:\n  files: {files}\n  held_out_files: {held_out}\n")
    assert problem.where == where
    assert f"d.jsonl is trained on too ({other})" in problem.message
    assert "held_out: 0.05" in problem.hint


@pytest.mark.parametrize(
    ("lines", "where", "message", "fix"),
    [
        ("  held_out: 1.0\n", "5:13", "data.held_out: 1.0; expected a number, 0 or more and less than 1", ""),
        ("  held_out: -0.1\n", "5:13", "data.held_out: -0.1; expected a number, 0 or more and less than 1", ""),
        ("  held_out: 5%\n", "5:13", "'5%' is a string; expected a number", "Write 0.05"),
        ("  held_out: e.jsonl\n", "5:13", "'e.jsonl' is a string; expected a number", ""),
        ("  held_out: 0.1\nevaluate:\n  loss_every_steps: -1\n", "7:21", "expected a whole number, 0 or more", ""),
        ("  held_out: 2.0\nevaluate:\n  loss_every_steps: 5\n", "5:13", "data.held_out: 2.0; expected a number", ""),
    ],
)
def test_wrong_values_about_held_out_rows(lines: str, where: str, message: str, fix: str) -> None:
    problem = only(OWN + lines)
    assert problem.where == f"r.yaml:{where}"
    assert message in problem.message
    assert fix in problem.hint


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("{name: full, rank: 8}", ["rank"]),
        ("{name: full, alpha: 8, dropout: 0.1, targets: [q]}", ["alpha", "dropout", "targets"]),
        ("{name: lora, double_quant: false}", ["double_quant"]),
        ("{name: qlora, double_quant: false, rank: 8}", []),
    ],
)
def test_method_keys_without_use(method: str, keys: list[str]) -> None:
    found = problems(f"model: a/b\nmethod: {method}\ndata: d.jsonl\n")
    assert [p.message.split(" ")[0] for p in found] == [f"method.{key}" for key in keys]
    assert all("(r.yaml:2:16)" in p.message for p in found)


def test_revision_of_something_that_is_not_on_the_hub() -> None:
    problem = only("model: {source: 'modelscope:a/b', revision: v1}\nmethod: lora\ndata: d.jsonl\n")
    assert problem.where == "r.yaml:1:35"
    assert "modelscope:a/b (r.yaml:1:17) is none" in problem.message


def test_all_mistakes_are_reported_at_once() -> None:
    found = problems(
        "model: Qwen/Qwen2.5-7B\nmethod: {name: full, rank: 8}\ndata: absent.jsonl\nlr: 1\n"
        "train:\n  epochs: 1\n  max_steps: '2'\n  micro_batch: yes\n  epochs: 2\nparallel: {zero: 1, offload: parameters}\n",
        "evaluate.strict=maybe",
        "nowhere",
    )
    assert [p.where for p in found] == [
        "--set evaluate.strict=maybe",
        "--set nowhere",
        "r.yaml:2:22",
        "r.yaml:3:7",
        "r.yaml:4:1",
        "r.yaml:7:14",
        "r.yaml:8:16",
        "r.yaml:9:3",
        "r.yaml:10:30",
    ]


def test_a_sentence_with_a_colon_is_told_to_be_quoted() -> None:
    problem = only(HEAD + "evaluate:\n  - Answer me: who are you?\n")
    assert problem.where == "r.yaml:5:5"
    assert problem.hint == 'A text with a colon needs quotes: "Answer me: ..."'


def test_errors_are_user_errors_with_exit_code_2_and_no_pydantic_in_them() -> None:
    Path("r.yaml").write_text(f"{HEAD}train: {{epochs: x}}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("r.yaml"))
    assert caught.value.exit_code == 2
    assert "pydantic" not in str(caught.value).lower()
    assert "Input should" not in str(caught.value)


def test_absent_recipe_names_the_nearest() -> None:
    Path("mine.yaml").write_text(HEAD, encoding="utf-8")
    with pytest.raises(LaunchError) as caught:
        load_recipe(Path("mien.yaml"))
    assert "Did you mean mine.yaml?" in caught.value.hint


def test_one_bad_prompt_does_not_hide_or_invent_others() -> None:
    found = problems(HEAD + "evaluate:\n  strict: true\n  prompts:\n    - {user: 3}\n    - {user: a, regex: '('}\n")
    assert [p.where for p in found] == ["r.yaml:7:14", "r.yaml:8:24"]


def test_empty_expectations_are_none() -> None:
    assert "nothing to check" in only(HEAD + "evaluate: {strict: true, prompts: [{user: a, contains: []}]}\n").message
