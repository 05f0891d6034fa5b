"""What --gpus means: every form, and every refusal."""

import json
from dataclasses import replace

import pytest

from cluster.environment import device_env
from cluster.inventory import Device, DeviceProcess, Inventory, cpu_selection, host_inventory, select
from cluster.job import ClusterError


def card(index, name="NVIDIA A100-SXM4-40GB", used_gb=0.5, processes=(), **changes):
    device = Device(
        index=str(index),
        name=name,
        uuid=f"GPU-{index}a{index}b-1111",
        memory_total_gb=40.0,
        memory_free_gb=40.0 - used_gb,
        is_mig=False,
        mig_mode=False,
        parent_uuid="",
        processes=tuple(DeviceProcess(pid, gb) for pid, gb in processes),
    )
    return replace(device, **changes)


def instance(index, uuid, parent, free_gb=4.5):
    return Device(index, "NVIDIA A100 MIG 1g.5gb", uuid, 5.0, free_gb, True, False, parent.uuid)


def host(*devices, cores=16):
    return Inventory("cuda", devices, cores, 64.0)


FOUR = host(card(0), card(1), card(2), card(3))
SPLIT_CARD = card(0, mig_mode=True)
MIG = host(
    SPLIT_CARD,
    instance("0:0", "MIG-aaaa-1", SPLIT_CARD),
    instance("0:1", "MIG-bbbb-2", SPLIT_CARD, free_gb=4.9),
    card(1),
)
MIG_ONLY = host(*MIG.devices[:3])
BUSY = host(
    card(0, processes=[(4711, 12.0), (4712, 3.5)]), card(1), card(2, processes=[(99, 0.4)]), card(3, used_gb=3.0)
)


def indices(inventory, selector, env=None, **options):
    return [d.index for d in select(inventory, selector, env or {}, **options).devices]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("0,2", ["0", "2"]),
        (" 2 , 0 ", ["2", "0"]),
        ("0，2", ["0", "2"]),
        ("0-3", ["0", "1", "2", "3"]),
        ("0,2-3", ["0", "2", "3"]),
        ("03", ["3"]),
        ("GPU-1a1b-1111", ["1"]),
        ("GPU-1a", ["1"]),
        ("gpu-1A", ["1"]),
        ("GPU-1a,3", ["1", "3"]),
        ("all", ["0", "1", "2", "3"]),
        ("free:2", ["0", "1"]),
        (None, ["0", "1", "2", "3"]),
    ],
)
def test_selectors(selector, expected):
    assert indices(FOUR, selector) == expected


def test_a_selection_has_one_process_per_device_and_shares_the_cores():
    selection = select(FOUR, "1,2,3", {})
    assert (selection.kind, selection.num_processes, selection.threads_per_process) == ("cuda", 3, 5)
    assert selection.uuids == ("GPU-1a1b-1111", "GPU-2a2b-1111", "GPU-3a3b-1111")
    assert device_env(selection) == {
        "CUDA_VISIBLE_DEVICES": "GPU-1a1b-1111,GPU-2a2b-1111,GPU-3a3b-1111",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "OMP_NUM_THREADS": "5",
    }


def test_free_takes_cards_without_processes_and_least_used_memory_in_index_order():
    inventory = host(card(0, used_gb=3), card(1, processes=[(5, 0.1)]), card(2, used_gb=1), card(3, used_gb=2))
    assert indices(inventory, "free:1") == ["2"]
    assert indices(inventory, "free:2") == ["2", "3"]
    assert indices(inventory, "free:3") == ["0", "2", "3"]


def test_the_default_leaves_busy_cards_alone():
    assert indices(BUSY, None) == ["1", "2", "3"]


@pytest.mark.parametrize("selector", ["0:1", "MIG-bbbb-2", "MIG-bb", "mig-BBBB-2"])
def test_one_mig_instance_is_one_process(selector):
    selection = select(MIG, selector, {})
    assert (selection.uuids, selection.num_processes) == (("MIG-bbbb-2",), 1)


def test_mig_instances_are_defaults_only_where_no_card_is_whole():
    assert indices(MIG, None) == ["1"]
    selection = select(MIG_ONLY, None, {})
    assert [d.index for d in selection.devices] == ["0:1"]  # the one with more free memory
    assert "one MIG instance (0:1" in selection.warnings[0]
    assert indices(MIG_ONLY, "free:1") == ["0:1"]


@pytest.mark.parametrize(
    ("inventory", "selector", "message"),
    [
        (FOUR, "7", "--gpus 7: this host has no device 7"),
        (FOUR, "0-4", "this host has no device 4"),
        (FOUR, "0:1", "this host has no device 0:1"),
        (FOUR, "GPU-ffff", "this host has no device GPU-ffff"),
        (FOUR, "MIG-aaaa", "this host has no device MIG-aaaa"),
        (FOUR, "GPU-", "GPU- fits 4 devices"),
        (FOUR, "0,0", "--gpus 0,0: 0 repeats 0"),
        (FOUR, "0-2,1", "1 repeats 1"),
        (FOUR, "1,GPU-1a1b-1111", "GPU-1a1b-1111 repeats 1"),
        (FOUR, "", "is empty"),
        (FOUR, "0,", "is empty"),
        (FOUR, "3-1", "runs backwards"),
        (FOUR, "zero", '"zero" is not a device'),
        (FOUR, "-1", '"-1" is not a device'),
        (FOUR, "显卡", '"显卡" is not a device'),
        (FOUR, "all,1", '"all" is not a device'),
        (FOUR, "free:0", "free needs a positive number"),
        (FOUR, "free:x", "free needs a positive number"),
        (FOUR, "free:5", "4 device(s) without other processes, 5 wanted"),
        (BUSY, "0", "in use: device 0 by pid 4711 (12.0 GB), pid 4712 (3.5 GB)"),
        (BUSY, "all", "in use: device 0"),
        (host(card(0, used_gb=30, processes=[(7, None)])), "0", "in use: device 0 by pid 7 (memory unknown)"),
        (host(card(0, processes=[(7, 30.0)])), None, "no device is free"),
        (MIG, "0", "device 0 (NVIDIA A100-SXM4-40GB) is split into 2 MIG instance(s)"),
        (host(SPLIT_CARD), "0", "MIG is on for device 0 (NVIDIA A100-SXM4-40GB), but it has no instance"),
        (host(SPLIT_CARD), "all", "no usable device is left"),
        (MIG, "0:0,0:1", "a MIG instance must be the only device of a run, and 2 devices are chosen"),
        (MIG, "MIG-aaaa-1,1", "a MIG instance must be the only device"),
        (MIG_ONLY, "all", "a MIG instance must be the only device"),
    ],
)
def test_refusals_list_what_exists(inventory, selector, message):
    with pytest.raises(ClusterError) as e:
        select(inventory, selector, {})
    assert message in e.value.message
    assert e.value.exit_code == 2
    assert e.value.hint
    for device in inventory.devices:
        assert device.uuid in e.value.message
        assert device.name in e.value.message


def test_the_mig_refusals_say_why_and_what_to_type():
    with pytest.raises(ClusterError, match=r"nccl#1716"):
        select(MIG, "0:0,0:1", {})
    with pytest.raises(ClusterError) as e:
        select(MIG, "0", {})
    assert "--gpus MIG-aaaa-1" in e.value.hint


def test_busy_devices_can_be_allowed():
    assert indices(BUSY, "0", allow_busy=True) == ["0"]


def test_little_memory_of_others_is_not_busy():
    assert indices(BUSY, "2") == ["2"]


def test_without_a_driver_gpus_are_refused_and_the_default_is_the_cpu():
    inventory = Inventory("cpu", (), 8, 16.0, "no NVIDIA driver found: NVML Shared Library Not Found")
    with pytest.raises(ClusterError) as e:
        select(inventory, "0", {})
    assert e.value.message == "--gpus 0: no NVIDIA driver found: NVML Shared Library Not Found"
    assert "--cpu" in e.value.hint
    selection = select(inventory, None, {})
    assert (selection.kind, selection.num_processes, selection.threads_per_process) == ("cpu", 1, 8)
    assert "CUDA_VISIBLE_DEVICES=0" in select(inventory, None, {"CUDA_VISIBLE_DEVICES": "0"}).warnings[0]


@pytest.mark.parametrize(
    ("visible", "selector", "expected"),
    [
        ("1,3", None, ["1", "3"]),
        ("1,3", "3", ["3"]),
        ("1,3", "all", ["1", "3"]),
        ("1,3", "free:1", ["1"]),
        ("GPU-2a2b-1111", None, ["2"]),
        ("GPU-2a", "2", ["2"]),
    ],
)
def test_cuda_visible_devices_limits_the_choice(visible, selector, expected):
    assert indices(FOUR, selector, {"CUDA_VISIBLE_DEVICES": visible}) == expected


@pytest.mark.parametrize(
    ("visible", "selector", "parts"),
    [
        (
            "0,1",
            "2",
            ["--gpus 2 means device 2 (GPU-2a2b-1111)", 'CUDA_VISIBLE_DEVICES="0,1"', "allows 0 (GPU-0a0b-1111), 1"],
        ),
        ("0,1", "1,2", ["means device 2 (", "allows 0"]),
        ("", "0", ['CUDA_VISIBLE_DEVICES="" allows no device']),
        ("-1", "0", ["allows no device"]),
        ("7", None, ['CUDA_VISIBLE_DEVICES=7: "7" names no device of this host']),
        ("0,abc", "0", ['"abc" names no device of this host']),
        ("GPU-", "0", ['"GPU-" fits several devices']),
        ("", "all", ["no usable device is left"]),
    ],
)
def test_a_contradiction_with_cuda_visible_devices_shows_both(visible, selector, parts):
    with pytest.raises(ClusterError) as e:
        select(FOUR, selector, {"CUDA_VISIBLE_DEVICES": visible})
    for part in parts:
        assert part in e.value.message


def test_hidden_gpus_mean_cpu_by_default_and_say_so():
    selection = select(FOUR, None, {"CUDA_VISIBLE_DEVICES": ""})
    assert selection.kind == "cpu"
    assert "CUDA_VISIBLE_DEVICES" in selection.warnings[0]


def test_a_split_card_in_cuda_visible_devices_allows_its_instances():
    assert indices(MIG, "0:0", {"CUDA_VISIBLE_DEVICES": "0"}) == ["0:0"]
    assert indices(MIG, None, {"CUDA_VISIBLE_DEVICES": "MIG-aaaa-1"}) == ["0:0"]


def test_numbers_in_cuda_visible_devices_are_doubted_only_where_cards_differ():
    mixed = host(card(0, name="NVIDIA T4"), card(1))
    env = {"CUDA_VISIBLE_DEVICES": "1"}
    assert "CUDA_DEVICE_ORDER" in select(mixed, None, env).warnings[0]
    assert select(mixed, None, {**env, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).warnings == ()
    assert select(mixed, None, {"CUDA_VISIBLE_DEVICES": "GPU-1a"}).warnings == ()
    assert select(FOUR, None, env).warnings == ()


def test_memory_that_nobody_owns_and_unequal_cards_are_mentioned():
    warnings = select(
        host(card(0, used_gb=10), card(1, name="NVIDIA T4", memory_total_gb=16.0, memory_free_gb=15.5)), "all", {}
    ).warnings
    assert "device 0: 10.0 of 40.0 GB are used by processes that cannot be seen" in warnings[0]
    assert "the devices differ" in warnings[1]


def test_cpu_processes_share_the_cores():
    inventory = Inventory("cpu", (), 8, 16.0)
    assert cpu_selection(3, inventory).threads_per_process == 2
    many = cpu_selection(9, inventory)
    assert (many.threads_per_process, len(many.warnings)) == (1, 1)
    assert device_env(cpu_selection(2, inventory)) == {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "4",
        "GOMP_SPINCOUNT": "10000",
        "THP_MEM_ALLOC_ENABLE": "1",
        "MALLOC_MMAP_THRESHOLD_": "33554432",
        "MALLOC_TRIM_THRESHOLD_": "1099511627776",
    }
    with pytest.raises(ClusterError, match="--cpu 0"):
        cpu_selection(0, inventory)


def test_an_inventory_survives_json():
    inventory = replace(BUSY, problem="GPU 4 cannot be used: GPU is lost")
    assert Inventory.from_dict(json.loads(json.dumps(inventory.to_dict()))) == inventory


def test_the_host_is_measured():
    inventory = host_inventory(())
    assert inventory.kind == "cpu"
    assert inventory.cpu_count >= 1
    assert inventory.memory_gb > 0.1
    assert host_inventory(FOUR.devices).kind == "cuda"
