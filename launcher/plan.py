"""recipe + devices -> plan. Pure: the same inputs give the same plan, and nothing is left to decide later.

Every derived number is kept with its reason. Nothing here reads a clock, a GPU or the network.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.inventory import Selection
from cluster.job import JobSpec, RayRequest
from cluster.nodes import Node
from cluster.retry import RetryLimits
from trainer.ds_config import deepspeed_config
from trainer.spec import (
    SPEC_VERSION,
    CheckpointSpec,
    DataSpec,
    EvaluateSpec,
    MethodSpec,
    ModelSpec,
    OptimSpec,
    ParallelSpec,
    PromptSpec,
    SecretSpec,
    StorageSpec,
    TrainSpec,
)

from .combinations import compile_refusals, stored_refusals
from .compiler import install_hint
from .errors import PlanError, Problem
from .known_models import nearest_models
from .layout import Layout, decide_layout, simplest_layout
from .memory import MemoryEstimate, inputs_of
from .model_facts import ModelFacts
from .model_source import SourceRef
from .plan_memory import (
    FreeMemory,
    budget_gb,
    estimate_plan,
    free_memory_warnings,
    has_room_for_a_copy,
    memory_warnings,
)
from .recipe import LoadedRecipe
from .recipe_data import sources_of
from .recipe_schema import Recipe
from .run_dir import RunDir
from .stages import PACKAGE_ROOT, jobs_of
from .where import meeting_of

DEBUG_STEPS = 10


@dataclass(frozen=True)
class Options:
    """What the command line adds to the recipe: facts of this machine and this start."""

    backend: str
    debug: bool
    cache_dir: Path
    host_memory_gb: float
    """Memory of this host, in 2**30 bytes; 0 where it is unknown."""
    command: str
    """The command as typed, for the report."""
    warnings: tuple[str, ...]
    """What is odd about this machine's environment."""
    profile_steps: tuple[int, ...] = ()
    nodes: tuple[Node, ...] = ()
    """The hosts of a run that spans several, in rank order; `plan_run` gets all their devices as one selection."""
    ray: RayRequest | None = None
    """What each job asks of Ray, where that is the backend."""
    placement: tuple[tuple[str, str], ...] = ()
    """(name, reason) of what was decided about where it runs."""
    compiler: str = ""
    """What torch.compile would call on this machine; "" for nothing."""
    free_memory: tuple[FreeMemory, ...] = ()
    """Of the hosts that may carry training, where there are several."""
    stored_as: str = ""
    """How the model's own files are quantised; "" for not, or not known before the download."""


@dataclass(frozen=True)
class Reason:
    """A decided value and why: `global batch = 64 = micro 2 x accumulate 16 x data-parallel 2`."""

    name: str
    text: str


@dataclass(frozen=True)
class Plan:
    """Everything decided, before anything starts. plan.json is its JSON; workers read `spec` from there."""

    spec: TrainSpec
    backend: str
    jobs: tuple[JobSpec, ...]
    devices: tuple[dict[str, Any], ...]
    nodes: tuple[Node, ...]
    """The hosts of a run that spans several, in rank order."""
    reasons: tuple[Reason, ...]
    warnings: tuple[str, ...]
    refusals: tuple[Problem, ...]
    """Why this plan may be looked at but not started."""
    memory: MemoryEstimate | None
    recipe_files: tuple[str, ...]
    command: str
    retry: RetryLimits
    hang_s: int
    """Seconds without a sign of life of any rank that are a hang; 0: hangs are not looked for."""

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "digest": self.spec.digest()}


def plan_run(
    loaded: LoadedRecipe,
    selection: Selection,
    source: SourceRef,
    facts: ModelFacts | None,
    run: RunDir,
    options: Options,
) -> Plan:
    """Decide everything. `facts` is None when the model's sizes are not known here. Raises PlanError with every conflict."""
    recipe = loaded.recipe
    draft = _spec(loaded, selection, source, simplest_layout(selection), run, options)
    needs = inputs_of(draft, facts) if facts else None
    layout = decide_layout(recipe, selection, facts, needs, budget_gb(selection, options.host_memory_gb))
    if layout.problems:
        raise PlanError(loaded.located(layout.problems))
    spec = _spec(loaded, selection, source, layout, run, options)
    spec = dataclasses.replace(spec, deepspeed=deepspeed_config(spec.model, spec.optim, spec.parallel))
    if facts and recipe.checkpoint.async_ == "auto":
        beside = has_room_for_a_copy(inputs_of(spec, facts), selection, options.host_memory_gb)
        spec = dataclasses.replace(spec, checkpoint=dataclasses.replace(spec.checkpoint, asynchronous=beside))
    memory = estimate_plan(spec, facts)
    warnings = [
        *loaded.notes,
        *options.warnings,
        *selection.warnings,
        *layout.warnings,
        *_crossing_warnings(options.nodes, layout.sp),
        *memory_warnings(spec, memory, selection, facts, options.host_memory_gb),
        *free_memory_warnings(memory, selection.kind, options.free_memory),
    ]
    reasons = [
        Reason("model", _model_line(source, facts, recipe)),
        *(Reason(name, text) for name, text in options.placement),
        *_host_reasons(options.nodes),
        *(Reason(name, text) for name, text in layout.reasons),
        *_step_reasons(spec),
        *(Reason("data", line) for line in loaded.sources),
    ]
    hint, compiled = install_hint(selection.kind), spec.optim.compile
    compiling = compile_refusals(compiled, layout.zero_stage, options.compiler, hint, layout.choice)
    refusals = (*stored_refusals(options.stored_as), *layout.refusals, *compiling)
    return Plan(
        spec=spec,
        backend=options.backend,
        jobs=jobs_of(spec, selection, run, 1, options.nodes, meeting_of(recipe), options.ray),
        devices=tuple(dataclasses.asdict(d) for d in selection.devices),
        nodes=options.nodes,
        reasons=tuple(reasons),
        warnings=tuple(warnings),
        refusals=tuple(loaded.located(refusals)),
        memory=memory,
        recipe_files=tuple(str(f) for f in loaded.files),
        command=options.command,
        # In a debug session a person looks on: whatever happens is the result.
        retry=RetryLimits() if options.debug else RetryLimits(**recipe.retry.model_dump()),
        hang_s=0 if options.debug else recipe.run.hang_s,
    )


def _spec(
    loaded: LoadedRecipe, selection: Selection, source: SourceRef, layout: Layout, run: RunDir, options: Options
) -> TrainSpec:
    recipe = loaded.recipe
    return TrainSpec(
        version=SPEC_VERSION,
        run_id=run.run_id,
        recipe_name=recipe.run.name or loaded.files[0].stem,
        package_root=str(PACKAGE_ROOT),
        model=ModelSpec(
            source=recipe.model.source,
            kind=source.kind,
            location=source.location,
            revision=recipe.model.revision,
            dtype=recipe.model.dtype,
            trust_remote_code=recipe.model.trust_remote_code,
            cache_dir=str(options.cache_dir),
        ),
        method=_method(recipe),
        data=DataSpec(
            files=sources_of(recipe.data.files),
            system=recipe.data.system,
            template=recipe.data.template,
            max_length=recipe.data.max_length,
            packing=recipe.data.packing,
            learn=recipe.data.learn,
            too_long=recipe.data.too_long,
            max_cut_off=recipe.data.max_cut_off,
            max_rows=recipe.data.max_rows,
            held_out=recipe.data.held_out,
            held_out_files=sources_of(recipe.data.held_out_files),
            cache_dir=str(options.cache_dir),
        ),
        optim=_optim(recipe, layout, selection.kind, options.debug),
        parallel=ParallelSpec(
            device=selection.kind,
            world_size=layout.world_size,
            dp=layout.dp,
            sp=layout.sp,
            zero_stage=layout.zero_stage,
            offload=recipe.parallel.offload,
            threads_per_process=selection.threads_per_process,
            timeout_s=recipe.run.timeout_s,
        ),
        checkpoint=CheckpointSpec(
            every_steps=recipe.checkpoint.every_steps,
            keep=recipe.checkpoint.keep,
            asynchronous=recipe.checkpoint.async_ is True,
            on_error=recipe.checkpoint.on_error,
        ),
        storage=_storage(recipe.storage.url, run),
        evaluate=_evaluate(recipe),
        paths=run.paths(),
        deepspeed={},
        debug=options.debug,
        profile_steps=options.profile_steps,
        secrets=tuple(SecretSpec(secret.name, secret.path or "") for secret in recipe.secrets),
    )


def _storage(url: str | None, run: RunDir) -> StorageSpec:
    if url is None:
        return StorageSpec("", ())
    return StorageSpec(f"{url.rstrip('/')}/{run.run_id}", tuple(str(path) for path in run.taken_along))


def _method(recipe: Recipe) -> MethodSpec:
    method = recipe.method
    if method.name == "full":
        return MethodSpec("full", rank=0, alpha=0.0, dropout=0.0, targets=(), double_quant=False)
    targets = (method.targets,) if isinstance(method.targets, str) else tuple(method.targets)
    alpha = method.alpha if method.alpha is not None else 2.0 * method.rank
    double_quant = method.double_quant and method.name == "qlora"
    return MethodSpec(method.name, method.rank, alpha, method.dropout, targets, double_quant)


def _optim(recipe: Recipe, layout: Layout, device: str, debug: bool) -> OptimSpec:
    train = recipe.train
    checkpointing = train.gradient_checkpointing
    max_steps = train.max_steps or 0
    return OptimSpec(
        epochs=train.epochs or (0.0 if max_steps else 3.0),
        max_steps=DEBUG_STEPS if debug else max_steps,
        micro_batch=train.micro_batch,
        accumulate=layout.accumulate,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        warmup_ratio=train.warmup_ratio,
        weight_decay=train.weight_decay,
        betas=(train.betas[0], train.betas[1]),
        eps=1e-8,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        gradient_checkpointing=device == "cuda" if checkpointing == "auto" else checkpointing,
        compile=train.compile,
    )


def _evaluate(recipe: Recipe) -> EvaluateSpec:
    evaluate, every = recipe.evaluate, recipe.evaluate.loss_every_steps
    return EvaluateSpec(
        prompts=tuple(
            PromptSpec(p.user, p.system, tuple(p.contains), p.regex or "", p.language or "") for p in evaluate.prompts
        ),
        max_new_tokens=evaluate.max_new_tokens,
        samples_every_steps=evaluate.samples_every_steps,
        num_samples=evaluate.num_samples,
        loss_every_steps=recipe.checkpoint.every_steps if every is None else every,
        strict=evaluate.strict,
    )


def _model_line(source: SourceRef, facts: ModelFacts | None, recipe: Recipe) -> str:
    if facts is None:
        near = nearest_models(source.location, cutoff=0.8) if source.kind in ("hub", "modelscope") else []
        known = f"; known models of nearly this name: {', '.join(near)}" if near else ""
        return f"{source.display}: sizes unknown until it is downloaded, so there is no memory estimate{known}"
    return (
        f"{source.display}: {facts.num_parameters / 1e9:.2f} B parameters, {facts.num_layers} layers, "
        f"{facts.num_heads} heads ({facts.num_kv_heads} kv), {recipe.model.dtype} (from {facts.known_from})"
    )


def _host_reasons(nodes: tuple[Node, ...]) -> list[Reason]:
    if not nodes or not nodes[0].host:  # under Ray, which chooses them
        return []
    parts, first = [], 0
    for node in nodes:
        count = node.selection.num_processes
        ranks = f"rank {first}" if count == 1 else f"ranks {first}-{first + count - 1}"
        devices = ", ".join(f"GPU {d.index} {d.name}" for d in node.selection.devices) or "CPU"
        parts.append(f"{node.host}: {ranks} ({devices})")
        first += count
    return [Reason("hosts", "; ".join(parts) + "; the other stages run on the first one")]


def _crossing_warnings(nodes: tuple[Node, ...], sp: int) -> list[str]:
    crossing = [node.host for node in nodes if node.selection.num_processes % sp]
    if not crossing:
        return []
    names = f" ({', '.join(crossing)})" if all(crossing) else ""
    return [
        f"sequence-parallel groups of {sp} cross hosts{names}: every layer exchanges activations over the network; "
        "use a multiple of parallel.sp devices on each host"
    ]


def _step_reasons(spec: TrainSpec) -> list[Reason]:
    optim = spec.optim
    if optim.max_steps:
        steps = f"{optim.max_steps}" + (" (debug)" if spec.debug else " (train.max_steps)")
    else:
        steps = f"ceil({optim.epochs:g} epochs x packed rows / global batch); `prepare` counts the rows"
    checkpointing = "recomputed in the backward pass" if optim.gradient_checkpointing else "kept"
    reasons = [Reason("steps", steps), Reason("activations", checkpointing)]
    if spec.storage.url:
        reasons.append(
            Reason("storage", f"each checkpoint is copied to {spec.storage.url} and read back, beside training")
        )
    return [*reasons, *_held_out_reasons(spec)]


def _held_out_reasons(spec: TrainSpec) -> list[Reason]:
    data, every = spec.data, spec.evaluate.loss_every_steps
    if not (data.held_out or data.held_out_files):
        return []
    what = f"{data.held_out:.3g} of the rows" if data.held_out else ", ".join(f.path for f in data.held_out_files)
    when = f"every {every} steps, " if every else ""
    return [Reason("held out", f"{what}; their loss is taken {when}before the first step and after the last")]
