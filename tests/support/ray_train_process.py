"""A Ray Train run that is not ours: two workers on DeepSpeed, which report what DeepSpeed saved as their checkpoint.

Arguments: the folder for Ray's results, the method (full | lora), the ZeRO stage.
"""

from __future__ import annotations

import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any


def train(config: dict[str, Any]) -> None:
    sys.path[:0] = config["path"]
    import ray.train

    from support.foreign_process import by_deepspeed
    from trainer.engine import start_deepspeed

    start_deepspeed(timedelta(seconds=120))
    with tempfile.TemporaryDirectory() as folder:
        # Ray's checkpoint of transformers' Trainer (RayTrainReportCallback) lies one folder deeper, by this name.
        by_deepspeed(Path(folder, "checkpoint"), config["method"], config["zero"])
        ray.train.report({"loss": 1.0}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def main() -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True)
    result = TorchTrainer(
        train,
        train_loop_config={"path": sys.path[:3], "method": sys.argv[2], "zero": int(sys.argv[3])},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="run", storage_path=sys.argv[1]),
    ).fit()
    print(result.checkpoint.path, flush=True)
    ray.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    main()
