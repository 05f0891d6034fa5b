"""What the engine changes of DeepSpeed, as far as it can be seen without a device."""

import pytest
import torch

from trainer.engine import ask_torch_for_free_memory


@pytest.mark.parametrize(
    "visible", ["GPU-8b8055ff-5afd-a2bc-1bae-5f98c205ba00", "MIG-8b8055ff-5afd-a2bc-1bae-5f98c205ba00"]
)
def test_devices_may_be_named_by_uuid(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes CUDA_VISIBLE_DEVICES for numbers, and ended every training on a GPU."""
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (5, 9))
    accelerator = CUDA_Accelerator()
    ask_torch_for_free_memory(accelerator)
    assert accelerator.available_memory() == 5
    assert accelerator.available_memory(0) == 5
