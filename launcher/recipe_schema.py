"""The recipe: every setting, defined once, with a sentence and a unit. Schema, reference page and errors come from here.

Sections stand in the order in which data flows. Importing this module costs pydantic: never do it for `launch --help`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FILE_NAME, VARIABLE, FULL_PATH = r"^[^/\\\s]+$", r"^[A-Z][A-Z0-9_]*$", r"^(/|~/).+$"
STORAGE_URL = r"^((s3|gs|az|abfs|oss)://[^/@:\s]+(/[^:\s]*)?|file:///[^:]+)$"
PATTERNS = {
    FILE_NAME: "a text without spaces or slashes",
    VARIABLE: "the name of an environment variable, in capitals",
    FULL_PATH: "a path that starts with / or ~/",
    STORAGE_URL: "a URL: s3://BUCKET/FOLDER, gs://..., az://..., abfs://..., oss://... or file:///FOLDER",
}
"""What each pattern of a text means, for errors and the reference."""
Positive = Annotated[int, Field(gt=0)]
Dtype = Literal["bf16", "fp16", "fp32"]
Format = Literal["auto", "conversation", "alpaca", "messages", "sharegpt", "text"]


class Section(BaseModel):
    """Unknown keys are errors, and nothing is coerced: "3" is not 3."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Model(Section):
    """The base model. Short form: `model: Qwen/Qwen2.5-7B-Instruct`."""

    source: str = Field(min_length=1)
    """Hub id, `modelscope:ID`, local folder, GGUF file, `package:NAME/FILE` (a file inside an installed Python package), or `random:FOLDER` (random weights for a config.json)."""
    revision: str = "main"
    """Hub branch, tag or commit."""
    dtype: Dtype = "bf16"
    """Number format of the forward and backward pass; optimizer states and master weights are always fp32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""


class Method(Section):
    """What is trained. Short form: `method: qlora`."""

    name: Literal["full", "lora", "qlora"]
    """full: every weight; lora: low-rank adapters; qlora: adapters on a base held in 4 bits (NF4)."""
    rank: Positive = 16
    """LoRA rank r."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha; the update is scaled by alpha / rank. Default: 2 x rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """LoRA dropout."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter: all-linear, or a list of name endings such as [q_proj, v_proj]."""
    double_quant: bool = True
    """Quantise the quantisation constants too (qlora)."""


class DataFile(Section):
    """One data file. Short form: its path."""

    path: str = Field(min_length=1)
    """json or jsonl, UTF-8; relative to the recipe file."""
    format: Format = "auto"
    """Row format; auto looks at the keys of the rows."""


class Data(Section):
    """What it learns from. Short form: `data: my.jsonl` or a list of files."""

    files: list[DataFile] = Field(min_length=1)
    """Data files, read in this order."""
    system: str | None = Field(default=None)
    """System prompt for rows that bring none. Default: the chat template's own behaviour."""
    template: str = "model"
    """Chat template: model (the tokenizer's own), a Jinja file, or one of XTuner's or LLaMA-Factory's by name, such as xtuner/qwen_chat."""
    max_length: Positive = 2048
    """Longest document, and length of a packed row, in tokens."""
    packing: bool = True
    """Put several documents into one row; they never attend to each other."""
    too_long: Literal["drop", "truncate"] = "truncate"
    """What to do with a document over max_length: leave it out, or cut its end. Both are counted."""
    max_rows: int = Field(default=0, ge=0)
    """Read only the first N rows; 0 reads all."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows that is not trained on, and whose loss is taken while training goes on; equal rows stay together."""
    held_out_files: list[DataFile] = []
    """Files whose rows are not trained on, in place of a share."""


class Train(Section):
    """How it learns."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data. Default: 3, unless max_steps is given."""
    max_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; contradicts epochs."""
    micro_batch: Positive = 1
    """Rows of one forward pass on one device."""
    global_batch: Positive | None = None
    """Rows of one optimizer step over all devices = micro_batch x accumulate x data-parallel size."""
    accumulate: Positive | None = None
    """Micro batches of one optimizer step on one device. Default: derived from global_batch, else 1."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay; not applied to biases and norms."""
    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """AdamW betas."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the gradient to this norm; 0 turns clipping off."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. auto: on for CUDA, off for CPU."""
    compile: bool = False
    """Compile each decoder layer with torch.compile: about a tenth less time a step, some seconds more for the first; needs a compiler."""
    seed: int = 42
    """Seed of the adapters' initial weights, dropout and the data order."""


class Parallel(Section):
    """How it is spread over devices. Which devices: the --gpus or --cpu flag."""

    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage: 0 shards nothing, 1 optimizer states, 2 gradients too, 3 weights too. auto: 2, or 3 where only that fits."""
    sp: Positive | Literal["auto"] = 1
    """Sequence parallelism (Ulysses): this many devices share one row. auto: the smallest whose memory estimate fits max_length."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep optimizer states (ZeRO 1, 2 or 3), or parameters too (ZeRO 3), in CPU memory."""


class Checkpoint(Section):
    """How training survives a crash."""

    every_steps: int = Field(default=200, ge=0)
    """Save a checkpoint every N optimizer steps, and at the end; 0 saves only at the end."""
    keep: Positive = 2
    """Keep this many newest checkpoints; an older one goes when the new one is written, read back and published."""
    async_: bool | Literal["auto"] = Field(default="auto", alias="async")
    """Write while training goes on, from a copy of the trained weights and their optimizer state (12 bytes a parameter) in CPU memory; auto: where there is room for it."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (disk full, read-only, failing): stop, or go on and try again at the next one; the last one of a run always stops."""


class Storage(Section):
    """Where checkpoints are copied to as well. Short form: `storage: s3://bucket/folder`."""

    url: str | None = Field(default=None, pattern=STORAGE_URL)
    """Each run has a folder of its own below it, with its newest checkpoints (checkpoint.keep), copied whole beside training and read back; `launch runs fetch` brings a run back from there. null: nowhere."""


class Prompt(Section):
    """One question for the before/after table. Short form: the question."""

    user: str = Field(min_length=1)
    """The question."""
    system: str | None = Field(default=None)
    """System prompt of this question. Default: data.system."""
    contains: list[str] = []
    """The answer must contain each of these, in any case."""
    regex: str | None = Field(default=None)
    """The answer must match this regular expression."""
    language: Literal["zh", "en"] | None = Field(default=None)
    """The answer must be written mostly in this language's script."""


class Evaluate(Section):
    """The same questions to the base and to the tuned model. Short form: a list of prompts."""

    prompts: list[Prompt] = []
    """Questions, with or without expectations."""
    max_new_tokens: Positive = 128
    """Longest answer, in tokens."""
    samples_every_steps: int = Field(default=0, ge=0)
    """Write answers to the first prompts into the run folder every N optimizer steps; 0 never does."""
    num_samples: Positive = 2
    """How many prompts are sampled during training."""
    loss_every_steps: int | None = Field(default=None, ge=0)
    """Take the loss of the held-out rows every N optimizer steps, and before the first and after the last; 0: only there. Default: checkpoint.every_steps."""
    strict: bool = False
    """Exit with an error when an expectation is not met by the tuned model."""


class Retry(Section):
    """When a run goes on by itself after a failure, from its newest checkpoint. Mistakes and bugs are never tried again, nor what fails twice at the same step."""

    crashes: int = Field(default=3, ge=0)
    """Further attempts after a worker was killed or met an error that may pass (CUDA, NCCL, network); 0: none. One card that fails now and then is survived, one that is broken is not tried for ever."""
    node_losses: int = Field(default=5, ge=0)
    """Further attempts after a host went away; 0: none. With the doubled waits between them there is time to start it again."""
    preemptions: int = Field(default=20, ge=0)
    """Further attempts after a scheduler ended the workers; 0: none. They say nothing about the run, so there are many."""
    hangs: int = Field(default=2, ge=0)
    """Further attempts after a hang (run.hang_s); 0: none. Each has cost run.hang_s already."""
    per_steps: Positive = 1000
    """A failure no longer counts once training has gone this many optimizer steps beyond it: a long run gets as many chances as a short one."""
    wait_s: float = Field(default=5.0, ge=0)
    """Seconds before the first further attempt; twice as long before each that follows, at most 300."""


class Run(Section):
    """Where results go, and how long to wait."""

    name: str | None = Field(default=None, pattern=FILE_NAME)
    """Name at the start of the run folder. Default: the recipe file's name."""
    dir: str = "runs"
    """Folder of run folders, relative to the current directory."""
    timeout_s: Positive = 1800
    """Limit of every wait between processes, in seconds."""
    hang_s: int = Field(default=600, ge=0)
    """Training is hung when no rank has gone on for this many seconds; all stacks are then written, and retry.hangs decides; 0: never. Starting, the first step and saving have until run.timeout_s."""


class Cluster(Section):
    """How several hosts work together. Which hosts: the --hosts flag."""

    wait_s: Positive = 120
    """How long hosts, or a cluster without room, may take until all processes of a job have started, in seconds."""
    silence_s: Positive = 60
    """A host that is not heard for this long counts as lost, and ends its own processes, in seconds."""
    port: int = Field(default=0, ge=0, le=65535)
    """TCP port of the first host at which the processes meet; 0 takes a free one."""


class Secret(Section):
    """A secret that workers need, by name: its value is read where they run, and written nowhere. Short form: the name."""

    name: str = Field(pattern=VARIABLE)
    """Environment variable under which libraries look for it, such as HF_TOKEN."""
    path: str | None = Field(default=None, pattern=FULL_PATH)
    """File on the workers' machines that holds the value (/... or ~/...). Default: the variable is set there."""


class Recipe(Section):
    """A fine-tuning run, as a person writes it."""

    model: Model
    method: Method
    data: Data
    train: Train = Train()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    storage: Storage = Storage()
    evaluate: Evaluate = Evaluate()
    retry: Retry = Retry()
    run: Run = Run()
    cluster: Cluster = Cluster()
    secrets: list[Secret] = []
    """Secrets that workers need, by name."""


# Short forms: section -> the key that a bare scalar or list stands for.
SHORT_FORMS: dict[str, str] = {
    "model": "source",
    "method": "name",
    "data": "files",
    "storage": "url",
    "evaluate": "prompts",
}
# Lists whose items may be bare scalars: dotted path -> the key that a scalar item stands for.
ITEM_SHORT_FORMS: dict[str, str] = {
    "data.files": "path",
    "data.held_out_files": "path",
    "evaluate.prompts": "user",
    "secrets": "name",
}
# Keys that may be written as null, meaning "not set"; null anywhere else is an error, because it is not "default".
NULLABLE = frozenset({"data.system", "storage.url", "evaluate.prompts.*.system"})
