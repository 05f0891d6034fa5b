"""The environment of workers, and warnings about the inherited one."""

import os

import pytest

from cluster.environment import environment_warnings, job_env, travelling
from cluster.job import JobSpec


def job(num_processes=1, devices=(), **env):
    return JobSpec("train", "trainer.worker", (), num_processes, devices, env, "/logs", "/", "run-1")


def test_rank_variables_of_an_outer_job_are_dropped_and_others_stay():
    outer = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "29500",
        "LOCAL_RANK": "3",
        "PET_NNODES": "2",
        "TORCHELASTIC_RUN_ID": "x",
        "PYTHON_EXEC": "/bin/false",
        "HOME": "/home/小薇",
        "NCCL_DEBUG": "INFO",
    }
    env = job_env(job(num_processes=2, devices=("GPU-a", "GPU-b"), OMP_NUM_THREADS="4"), outer)
    assert env == {
        "HOME": "/home/小薇",
        "NCCL_DEBUG": "INFO",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "OMP_NUM_THREADS": "4",
    }


def test_a_single_process_is_a_group_of_one_on_the_cpu():
    env = job_env(job(), {"RANK": "5", "CUDA_VISIBLE_DEVICES": "0"})
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("0", "0", "1", "1")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", "0")
    assert (env["CUDA_VISIBLE_DEVICES"], env["DS_ACCELERATOR"]) == ("", "cpu")


def test_the_jobs_own_variables_win():
    assert job_env(job(HF_HOME="/b", PYTHONUTF8="0"), {"HF_HOME": "/a"})["HF_HOME"] == "/b"


@pytest.mark.parametrize(
    ("inherited", "kept"),
    [(".", None), ("", None), (f"/a{os.pathsep}.{os.pathsep}{os.pathsep}/b c", f"/a{os.pathsep}/b c")],
)
def test_entries_of_pythonpath_that_mean_the_current_folder_are_dropped(inherited, kept):
    assert job_env(job(), {"PYTHONPATH": inherited}).get("PYTHONPATH") == kept


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CUDA_VISABLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        ("CUDA_VISIBLE_DEVICE", "CUDA_VISIBLE_DEVICES"),
        ("CUDA_VISIBLES_DEVICES", "CUDA_VISIBLE_DEVICES"),
        ("cuda_visible_devices", "CUDA_VISIBLE_DEVICES"),
        ("CUDA_VISIBLE_DEVISES", "CUDA_VISIBLE_DEVICES"),
        ("HF_HOEM", "HF_HOME"),
        ("HF_ENDPIONT", "HF_ENDPOINT"),
        ("HF_HUB_OFLINE", "HF_HUB_OFFLINE"),
        ("OMP_NUM_THREAD", "OMP_NUM_THREADS"),
    ],
)
def test_near_misses_are_named(name, meant):
    (warning,) = environment_warnings({name: "1"})
    assert warning == f"{name} is set but nothing reads it; did you mean {meant}?"


REAL_NAMES = (
    "PATH HOME LANG PWD SHELL TERM USER CUDA_HOME CUDA_PATH CUDA_VERSION NVIDIA_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES HF_HOME "
    "HF_TOKEN HF_HUB_CACHE HF_HUB_ENABLE_HF_TRANSFER HF_DATASETS_CACHE HF_HUB_DISABLE_XET TRANSFORMERS_CACHE MKL_NUM_THREADS "
    "MASTER OPENBLAS_NUM_THREADS HIP_VISIBLE_DEVICES TORCH_HOME PYTORCH_ALLOC_CONF CUDA_MODULE_LOADING CUDA_CACHE_PATH HF_ASSETS_CACHE"
)


@pytest.mark.parametrize("name", REAL_NAMES.split())
def test_real_names_are_left_in_peace(name):
    assert environment_warnings({name: "1"}) == []


def test_an_outer_job_and_nccl_settings_are_mentioned():
    warnings = environment_warnings({"WORLD_SIZE": "4", "RANK": "1", "NCCL_IB_DISABLE": "1", "NCCL_SHM_DISABLE": "1"})
    assert warnings == [
        "RANK=1, WORLD_SIZE=4: from an outer job; not passed on to our workers",
        "NCCL_IB_DISABLE=1, NCCL_SHM_DISABLE=1: passed on to the workers; unset what is left over",
    ]


def test_settings_go_along_to_other_hosts_and_secrets_do_not():
    here = {
        "HF_HOME": "/data/hf",
        "NCCL_DEBUG": "INFO",
        "TUNELAUNCH_CACHE": "/data/缓存",
        "HF_ENDPOINT": "https://mirror.lab",
    }
    kept_back = {
        "HF_TOKEN": "hf_canary",
        "WANDB_API_KEY": "canary",
        "PATH": "/bin",
        "RANK": "3",
        "AWS_SECRET_ACCESS_KEY": "c",
    }
    assert travelling({**here, **kept_back}) == here
    assert travelling({"HF_ENDPOINT": "https://me:canary@mirror.lab"}) == {}
