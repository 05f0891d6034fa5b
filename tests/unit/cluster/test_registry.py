"""Backends by name."""

import subprocess
import sys

import pytest

from cluster.job import ClusterError
from cluster.registry import BACKENDS, load


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_knows_its_name(name):
    assert load(name).name == name


def test_an_unknown_backend_lists_those_that_exist():
    with pytest.raises(ClusterError, match='no backend "slurm"') as e:
        load("slurm")
    assert e.value.hint == f"Choose one of: {', '.join(BACKENDS)}"


def test_loading_backends_and_reading_devices_imports_nothing_heavy():
    code = (
        "import sys, cluster.registry as r, cluster.nvml as n\n"
        "[r.load(name) for name in r.BACKENDS]; n.read_inventory()\n"
        "print(*sorted({'torch', 'ray', 'numpy', 'deepspeed', 'trainer', 'launcher'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
