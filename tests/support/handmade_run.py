"""A run folder as training leaves it, written by hand."""

import dataclasses
import json
from pathlib import Path

from trainer.spec import (
    SPEC_VERSION,
    CheckpointSpec,
    DataFile,
    DataSpec,
    EvaluateSpec,
    MethodSpec,
    ModelSpec,
    OptimSpec,
    ParallelSpec,
    PathsSpec,
    Prepared,
    PromptSpec,
    StorageSpec,
    TrainSpec,
)

NAMES = (
    "prepared",
    "metrics",
    "events",
    "samples",
    "checkpoints_dir",
    "adapter_dir",
    "merged_dir",
    "report_dir",
    "profile_dir",
    "bad_batches_dir",
    "stop_request",
)


def make_spec(run_dir: Path, prompts: tuple[PromptSpec, ...] = (), strict: bool = False) -> TrainSpec:
    paths = PathsSpec(run_dir=str(run_dir), **{name: str(run_dir / name.removesuffix("_dir")) for name in NAMES})
    return TrainSpec(
        version=SPEC_VERSION,
        run_id="identity-20250102-030405-abcd",
        recipe_name="identity <1> & 小薇",
        package_root="/package",
        model=ModelSpec("org/model", "hub", "org/model", "main", "fp32", False, "/cache"),
        method=MethodSpec("lora", 16, 32.0, 0.0, ("all-linear",), True),
        data=DataSpec(
            (DataFile("/d.jsonl", "auto"),),
            "你是小薇。",
            "model",
            512,
            True,
            "answers",
            "truncate",
            0.1,
            0,
            0.0,
            (),
            "/cache",
        ),
        optim=OptimSpec(3.0, 0, 2, 4, 2e-4, "cosine", 0.03, 0.0, (0.9, 0.999), 1e-8, 1.0, 42, False, False),
        parallel=ParallelSpec("cpu", 2, 2, 1, 2, "none", 1, 1800),
        checkpoint=CheckpointSpec(50, 2, False, "stop"),
        storage=StorageSpec("", ()),
        evaluate=EvaluateSpec(prompts, 12, 0, 2, 50, strict),
        paths=paths,
        deepspeed={},
        debug=False,
        profile_steps=(),
    )


def make_prepared(model_dir: str = "/cache/model") -> Prepared:
    return Prepared(model_dir, "/cache/data", 104, 37, 18234, 6021, 0)


def write_run(run_dir: Path, spec: TrainSpec, prepared: Prepared) -> Path:
    """plan.json, prepared.json and the metrics of 6 steps, of which a second attempt repeated the last 3."""
    steps = [(step, 1, 3.0 - step / 2) for step in (1, 2, 3, 4, 5)] + [(step, 2, 1.0 / step) for step in (4, 5, 6)]
    with open(spec.paths.metrics, "w", encoding="utf-8") as f:
        for step, attempt, loss in steps:
            row = {"step": step, "attempt": attempt, "loss": loss, "learning_rate": 2e-4 / step, "grad_norm": 1.0}
            row |= {"tokens": 1000, "supervised_tokens": 400, "seconds": 10.0, "tokens_per_second": 100.0}
            f.write(json.dumps(row | {"memory_gb": 1.5 if attempt == 2 else 1.25}) + "\n")
        f.write('{"step": 7, "lo')
    Path(spec.paths.prepared).write_text(json.dumps(dataclasses.asdict(prepared)), encoding="utf-8")
    plan = {
        "spec": spec.to_dict(),
        "command": "launch recipes/identity.yaml --cpu 2",
        "devices": [{"index": 0, "name": "CPU"}],
    }
    path = run_dir / "plan.json"
    path.write_text(json.dumps(plan, ensure_ascii=False), encoding="utf-8")
    return path
