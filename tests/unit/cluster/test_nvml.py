"""Reading GPUs, over a stand-in for NVIDIA's library."""

import importlib.util
import sys
from pathlib import Path

import pytest

from cluster import nvml

GB = 2**30
FAKE = Path(__file__).parents[2] / "fakes" / "pynvml.py"


@pytest.fixture
def fake(monkeypatch):
    """A fresh fake library without cards."""
    spec = importlib.util.spec_from_file_location("pynvml", FAKE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    spec.loader.exec_module(module)
    return module


def test_the_fake_has_the_names_of_the_real_library(fake):
    real = next(path for entry in sys.path if (path := Path(entry) / "pynvml.py").is_file())
    text = real.read_text(encoding="utf-8")
    for name in dir(fake):
        if name.startswith("nvml"):
            assert f"def {name}(" in text, name
        elif name.startswith("NVMLError_"):
            constant = "".join(f"_{c}" if c.isupper() else c for c in name.removeprefix("NVMLError_")).upper()
            assert f"NVML_ERROR{constant}" in text, name


def test_four_cards_come_in_pci_order_with_memory_and_processes(fake):
    for bus in (0xC1, 0x41, 0x81, 0x01):
        fake.cards.append(fake.FakeDevice("NVIDIA A100", f"GPU-{bus:02x}", total=40 * GB, used=10 * GB, bus=bus))
    fake.cards[3].processes = [(4711, 9 * GB), (4712, None)]
    reading = nvml.read_devices()
    assert [(d.index, d.uuid) for d in reading.devices] == [
        ("0", "GPU-01"),
        ("1", "GPU-41"),
        ("2", "GPU-81"),
        ("3", "GPU-c1"),
    ]
    first = reading.devices[0]
    assert (first.memory_total_gb, first.memory_free_gb, first.is_mig, first.mig_mode) == (40, 30, False, False)
    assert [(p.pid, p.used_gb) for p in first.processes] == [(4711, 9.0), (4712, None)]
    assert reading.problem == ""
    assert fake.initialised == 0


def test_mig_instances_follow_their_card_and_empty_slots_are_skipped(fake):
    instances = [fake.FakeDevice(f"NVIDIA A100 MIG {i}g.5gb", f"MIG-{i}", total=5 * GB, used=GB) for i in (1, 2)]
    fake.cards.append(
        fake.FakeDevice(
            "NVIDIA A100", "GPU-a", total=40 * GB, mig=1, slots=[None, instances[0], None, instances[1], None]
        )
    )
    fake.cards.append(fake.FakeDevice("NVIDIA A100", "GPU-b", total=40 * GB, mig=0, bus=1))
    devices = nvml.read_devices().devices
    assert [d.index for d in devices] == ["0", "0:0", "0:1", "1"]
    assert [d.mig_mode for d in devices] == [True, False, False, False]
    assert [d.is_mig for d in devices] == [False, True, True, False]
    assert devices[1].parent_uuid == "GPU-a"
    assert devices[1].memory_free_gb == 4


def test_without_library_or_driver_the_reason_is_kept(fake):
    fake.init_error = fake.NVMLError_LibraryNotFound()
    reading = nvml.read_devices()
    assert reading.devices == ()
    assert reading.problem == "no NVIDIA driver found: NVML Shared Library Not Found"
    inventory = nvml.read_inventory()
    assert (inventory.kind, inventory.problem) == ("cpu", reading.problem)


def test_without_the_python_package_the_reason_is_kept(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in nvml.read_devices().problem


def test_a_driver_without_cards_says_so(fake):
    assert "lists no GPU" in nvml.read_devices().problem


def test_a_lost_card_does_not_hide_the_others(fake):
    fake.cards.append(fake.FakeDevice("NVIDIA A100", "GPU-a", total=40 * GB, error=fake.NVMLError_GpuIsLost()))
    fake.cards.append(fake.FakeDevice("NVIDIA A100", "GPU-b", total=40 * GB, bus=1))
    reading = nvml.read_devices()
    assert [d.uuid for d in reading.devices] == ["GPU-b"]
    assert reading.problem == "GPU 0 cannot be used: GPU is lost"


def test_old_drivers_and_cards_that_share_host_memory_are_read(fake):
    fake.cards.append(
        fake.FakeDevice("NVIDIA GB10", "GPU-a", total=0, memory_unknown=True, old_driver=True, processes=[(1, GB)])
    )
    (device,) = nvml.read_devices().devices
    assert (device.memory_total_gb, device.memory_free_gb) == (0.0, 0.0)
    assert device.processes[0].pid == 1


def test_a_driver_that_fails_while_listing_gives_a_reason(fake, monkeypatch):
    def fail():
        raise fake.NVMLError_DriverNotLoaded

    monkeypatch.setattr(fake, "nvmlDeviceGetCount", fail)
    assert nvml.read_devices().problem == "the NVIDIA driver does not list its devices: Driver Not Loaded"
    assert fake.initialised == 0
