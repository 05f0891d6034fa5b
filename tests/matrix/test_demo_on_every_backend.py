"""The demo recipe, a real model in fp32, on every backend: losses side by side, and all stages over two hosts and two Ray nodes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from support.commands import FP32, LAUNCH, LAUNCH_TRAINING, ROOT, losses
from support.ray_nodes import ray_nodes
from support.short_run import RELATIVE, loss_table
from support.ssh_hosts import ssh_cluster

RECIPE = "smollm2_identity.yaml"
STEPS = 8
SETS = (
    *FP32,
    "--set",
    f"train.max_steps={STEPS}",
    "--set",
    "train.global_batch=4",
    "--set",
    "checkpoint.every_steps=4",
)
LIMIT_S = 1200


def test_the_demo_learns_the_same_on_every_backend(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = ROOT / "recipes"

    def flags(name: str) -> tuple[str, ...]:
        return (*SETS, "--run-dir", str(tmp_path / name))

    one = ("--cpu", "1", "--backend", "debug", *flags("debug"))
    for argv in ([str(LAUNCH), RECIPE, *one], [*LAUNCH_TRAINING, RECIPE, "--cpu", "2", *flags("torchrun")]):
        done = subprocess.run(
            argv, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "hosts").mkdir()
    with ssh_cluster(tmp_path / "hosts", 2) as cluster:
        hosts = ("--hosts", "alpha", "--hosts", "beta", "--cpu", "1")
        done = cluster.launch(RECIPE, *hosts, *flags("ssh"), cwd=folder, env=environment, timeout_s=LIMIT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        (tmp_path / "nodes").mkdir()
        with ray_nodes(tmp_path / "nodes", [member.host for member in cluster.hosts]) as nodes:
            args = (RECIPE, "--cpu", "1", "--nodes", "2", *flags("ray"))
            process = nodes.launch(cluster.hosts[0].host, args, folder, environment)
            output, _ = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, output
    runs = {"debug x1": "debug", "torchrun x2": "torchrun", "ssh 2x1": "ssh", "Ray 2x1": "ray"}
    table, apart = loss_table({title: tmp_path / name for title, name in runs.items()})
    print(f"\n{table}")
    steps = losses(tmp_path / "debug")
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert steps[STEPS] < steps[1] - 1, "nothing was learnt, so there was nothing to compare"
    assert apart <= RELATIVE
    for name in ("ssh", "ray"):
        report = json.loads((tmp_path / name / "report" / "report.json").read_text(encoding="utf-8"))
        assert report, "the stages after training ran too"
        assert (tmp_path / name / "merged" / "config.json").is_file()
