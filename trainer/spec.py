"""What a worker is told: every setting resolved, nothing left to decide.

The launcher writes a `TrainSpec` into plan.json and the worker reads it back. Standard library only, so that the
launcher may import it without torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPEC_VERSION = 7

EXIT_OK = 0
EXIT_USER = 2
EXIT_BUG = 70
EXIT_RETRY = 75
EXIT_INTERRUPTED = 130


class TrainError(Exception):
    """A failure that the user can fix: what happened, and what to do about it.

    `exit_code` is 2 (change something and start again) or 75 (the same command may work later).
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = EXIT_USER) -> None:
        super().__init__(message, hint, exit_code)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


@dataclass(frozen=True)
class ModelSpec:
    source: str
    """As written in the recipe."""
    kind: str
    """hub | modelscope | folder | gguf | random: where `location` points."""
    location: str
    """Hub id, or the absolute path of the folder or GGUF file; for `random` the absolute path of a folder with config.json and tokenizer."""
    revision: str
    """Hub revision (branch, tag or commit); "main" where it does not apply."""
    dtype: str
    """bf16 | fp16 | fp32: the dtype of the forward and backward pass."""
    trust_remote_code: bool
    cache_dir: str
    """Absolute folder for converted models."""


@dataclass(frozen=True)
class MethodSpec:
    name: str
    """full | lora | qlora."""
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    """Module name suffixes, or ("all-linear",). Empty for full."""
    double_quant: bool


@dataclass(frozen=True)
class RowNames:
    """What rows call their parts, where that is not what their format says; "" where it is.

    The words are those of LLaMA-Factory's dataset_info.json: `columns`, then `tags`.
    """

    prompt: str = ""
    query: str = ""
    response: str = ""
    history: str = ""
    messages: str = ""
    system: str = ""
    tools: str = ""
    role_tag: str = ""
    content_tag: str = ""
    user_tag: str = ""
    assistant_tag: str = ""
    observation_tag: str = ""
    function_tag: str = ""
    system_tag: str = ""

    @property
    def columns(self) -> dict[str, str]:
        """The keys of a row that are named."""
        names = ("prompt", "query", "response", "history", "messages", "system", "tools")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


@dataclass(frozen=True)
class DataFile:
    """One source of rows: a file, or several that are read as one."""

    path: str
    """Absolute path of a file or folder, or absolute pattern; for a hub the dataset's id."""
    format: str
    """auto | conversation | alpaca | messages | sharegpt | pair | text | ids."""
    kind: str = "path"
    """path | hub | modelscope."""
    subset: str = ""
    """Of a dataset of a hub; "" for its own default."""
    split: str = "train"
    """Of a dataset of a hub, or of a folder of save_to_disk."""
    weight: float = 1.0
    """How many times each of its rows is trained on in one epoch."""
    max_rows: int = 0
    """Rows read of this source; 0 means all."""
    names: RowNames = RowNames()
    map: str = ""
    """"/folder/my_rows.py:function", which makes rows of ours of its rows; "" for nothing."""


@dataclass(frozen=True)
class DataSpec:
    files: tuple[DataFile, ...]
    system: str | None
    """System prompt for rows that bring none; None leaves it to the chat template."""
    template: str
    """"model" (the tokenizer's own), tool/name of a turn template, or the absolute path of a Jinja file."""
    max_length: int
    """Tokens of one packed row, and the longest document."""
    packing: bool
    learn: str
    """answers | last | all: which tokens are learnt."""
    too_long: str
    """drop | truncate | split-turns: what happens to a document of more than `max_length` tokens."""
    max_cut_off: float
    """Share of the rows that may have nothing left to learn once they are cut."""
    max_rows: int
    """Rows read over all files; 0 means all."""
    held_out: float
    """Share of the documents that are not trained on; 0 means none."""
    held_out_files: tuple[DataFile, ...]
    """Files whose rows are not trained on, in place of a share."""
    cache_dir: str
    """Absolute folder of the token cache."""


@dataclass(frozen=True)
class OptimSpec:
    epochs: float
    max_steps: int
    """Optimizer steps; 0 means that `epochs` decides."""
    micro_batch: int
    """Rows of one forward pass on one data-parallel rank."""
    accumulate: int
    """Micro batches of one optimizer step on one data-parallel rank."""
    learning_rate: float
    schedule: str
    """cosine | linear | constant, after the warm-up."""
    warmup_ratio: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float
    """0 means no clipping."""
    seed: int
    gradient_checkpointing: bool
    compile: bool
    """Run each decoder layer through torch.compile."""


@dataclass(frozen=True)
class ParallelSpec:
    device: str
    """cpu | cuda."""
    world_size: int
    dp: int
    sp: int
    zero_stage: int
    offload: str
    """none | optimizer | parameters."""
    threads_per_process: int
    timeout_s: int
    """Limit of every collective wait."""


@dataclass(frozen=True)
class CheckpointSpec:
    every_steps: int
    """0 means only at the end."""
    keep: int
    asynchronous: bool
    """Written by a thread, from a copy, while training goes on."""
    on_error: str
    """stop | continue."""


@dataclass(frozen=True)
class PromptSpec:
    user: str
    system: str | None
    """None: the run's own system prompt (`DataSpec.system`)."""
    contains: tuple[str, ...]
    """The answer must contain each of these (case-insensitive)."""
    regex: str
    """The answer must match (re.search); "" means no such rule."""
    language: str
    """zh | en | "" : the script that the answer must mostly be written in."""

    @property
    def has_expectation(self) -> bool:
        return bool(self.contains or self.regex or self.language)


@dataclass(frozen=True)
class EvaluateSpec:
    prompts: tuple[PromptSpec, ...]
    max_new_tokens: int
    samples_every_steps: int
    """Answers to the first prompts are written every N optimizer steps; 0 means never."""
    num_samples: int
    loss_every_steps: int
    """The loss of held-out rows is taken every N optimizer steps, and before the first and after the last; 0: only there."""
    strict: bool


@dataclass(frozen=True)
class SecretSpec:
    """A secret by name. Its value is never in a plan: each worker reads it where it runs."""

    name: str
    """Environment variable under which libraries look for it."""
    path: str
    """File on the worker's machine that holds the value (~ is the home folder there); "": the variable is set already."""


@dataclass(frozen=True)
class StorageSpec:
    """Where checkpoints are copied to; see trainer/storage.py."""

    url: str
    """Of this run's folder there: s3://bucket/prefix/RUN_ID; "" for nowhere."""
    beside: tuple[str, ...]
    """Absolute paths of files that go along, from which a run folder can be made again."""


@dataclass(frozen=True)
class PathsSpec:
    """Absolute paths inside the run folder. The launcher decides them; the trainer never joins its own."""

    run_dir: str
    prepared: str
    """prepared.json: what `prepare` found out (see `Prepared`)."""
    metrics: str
    events: str
    samples: str
    checkpoints_dir: str
    adapter_dir: str
    merged_dir: str
    report_dir: str
    profile_dir: str
    """Where the profiler's trace and summary go."""
    bad_batches_dir: str
    """Where the rows and tokens of a step go whose loss or gradient is not finite."""
    stop_request: str
    """When this file exists, training saves a checkpoint after the current step and stops with exit code 130."""


@dataclass(frozen=True)
class TrainSpec:
    version: int
    run_id: str
    recipe_name: str
    package_root: str
    """Folder that holds OUR launcher/, cluster/ and trainer/; the worker checks that it imported them from there."""
    model: ModelSpec
    method: MethodSpec
    data: DataSpec
    optim: OptimSpec
    parallel: ParallelSpec
    checkpoint: CheckpointSpec
    storage: StorageSpec
    evaluate: EvaluateSpec
    paths: PathsSpec
    deepspeed: dict[str, Any]
    debug: bool
    profile_steps: tuple[int, ...]
    """1-based optimizer steps that the profiler records; empty: none."""
    secrets: tuple[SecretSpec, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainSpec:
        """Exact inverse of `to_dict`. Raises TrainError when the plan was written by another version."""
        if data.get("version") != SPEC_VERSION:
            raise TrainError(
                f"plan version {data.get('version')} is not {SPEC_VERSION}",
                "Write the plan again with this version: launch plan RECIPE",
            )
        return _build(cls, data)

    def digest(self) -> str:
        """First 16 hex digits of the sha256 over the canonical JSON; every worker logs it."""
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Prepared:
    """prepared.json: the answer of the `prepare` stage to every later one."""

    model_dir: str
    """Absolute HF model folder (config.json, *.safetensors, tokenizer files)."""
    data_dir: str
    """Absolute folder of the token cache entry (see trainer/data.py)."""
    num_documents: int
    num_rows: int
    """Packed rows (or documents, when packing is off)."""
    num_tokens: int
    num_supervised_tokens: int
    num_held_out_rows: int
    """Rows that are not trained on; all the numbers above are without them."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, path: str) -> Prepared:
        """Raises TrainError when the prepare stage has not run."""
        if not Path(path).is_file():
            raise TrainError(f"{path} is missing", "Run the prepare stage first: launch RECIPE")
        return _build(cls, json.loads(Path(path).read_text(encoding="utf-8")))


def read_plan(path: str) -> TrainSpec:
    """The worker's part of plan.json."""
    return TrainSpec.from_dict(json.loads(Path(path).read_text(encoding="utf-8"))["spec"])


def _build(kind: Any, value: Any) -> Any:
    """JSON value -> dataclass / tuple / scalar of type `kind`. Keys must match exactly: a plan is machine-written."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        names = {f.name for f in dataclasses.fields(kind)}
        if set(value) != names:
            raise TrainError(f"{kind.__name__}: keys differ by {sorted(set(value) ^ names)}", "Write the plan again.")
        return kind(**{name: _build(hints[name], value[name]) for name in names})
    origin = typing.get_origin(kind)
    if origin is tuple:
        args = typing.get_args(kind)
        if args[-1] is Ellipsis:
            return tuple(_build(args[0], item) for item in value)
        return tuple(_build(a, item) for a, item in zip(args, value, strict=True))
    if origin in (typing.Union, types.UnionType):
        return value
    if kind is float and isinstance(value, int):
        return float(value)
    return value
