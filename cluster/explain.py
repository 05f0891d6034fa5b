"""Known error texts, what causes them, and what to do. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """What a known error means: one sentence each."""

    cause: str
    fix: str
    kind: str
    """user (change something), retry (may work later) or bug."""

    @property
    def hint(self) -> str:
        """Cause and fix, for `Failure.hint`."""
        return f"{self.cause} {self.fix}"


# The first pattern that is found decides, so special cases stand before general ones.
_TABLE: tuple[tuple[str, Explanation], ...] = (
    (
        r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        Explanation(
            "The device's memory is full.",
            "Lower train.micro_batch or data.max_length, set train.gradient_checkpointing: true, raise parallel.zero, "
            "or use method: qlora.",
            "user",
        ),
    ),
    (
        r"DefaultCPUAllocator|Cannot allocate memory|^MemoryError",
        Explanation(
            "The host's memory is full.",
            "Use fewer processes, a smaller train.micro_batch or data.max_length, or parallel.offload: none.",
            "user",
        ),
    ),
    (
        r"No space left on device|Disk quota exceeded",
        Explanation(
            "A disk is full (or /dev/shm, in a container).",
            "Check df -h . /tmp /dev/shm; free some space, set run.dir to another disk, or lower checkpoint.keep.",
            "user",
        ),
    ),
    (
        r"Too many open files",
        Explanation("The limit of open files is too low.", "Raise it before starting: ulimit -n 65536", "user"),
    ),
    (
        r"Duplicate GPU detected",
        Explanation(
            "Two processes were given the same card, which NCCL refuses.",
            "Give every process a card of its own (--gpus 0,1). MIG instances of one card cannot work together.",
            "user",
        ),
    ),
    (
        r"Weights only load failed|UnpicklingError.*weights_only|weights_only.*UnpicklingError",
        Explanation(
            "The checkpoint holds Python objects beside tensors; loading them would run code from the file.",
            "Only tensors and a few known types are loaded. Convert the file where you trust it, or take another checkpoint.",
            "user",
        ),
    ),
    (
        r"No module named 'triton\.ops'",
        Explanation(
            "An old bitsandbytes asks for a part of triton that newer versions no longer have.",
            "Install the tested versions: pip install -c constraints.txt bitsandbytes triton",
            "user",
        ),
    ),
    (
        r"flash_attn.*undefined symbol|undefined symbol.*flash|flash_attn.*(DLL load failed|cannot import)",
        Explanation(
            "flash-attn was built for another version of torch.",
            "Remove it (pip uninstall flash-attn; another kernel is used), or install the build for this torch and CUDA.",
            "user",
        ),
    ),
    (
        r"undefined symbol",
        Explanation(
            "A compiled package was built for another version of torch or CUDA.",
            "Install the tested versions: pip install -c constraints.txt PACKAGE",
            "user",
        ),
    ),
    (
        r"mkl-service|MKL_THREADING_LAYER|libgomp.*incompatible",
        Explanation(
            "MKL and OpenMP of different origin were loaded into one process.",
            "Set MKL_THREADING_LAYER=GNU, or use an environment that is not mixed from conda and pip.",
            "user",
        ),
    ),
    (
        r"No module named '?(launcher|trainer|cluster)\b|Error while finding module specification for '(launcher|trainer|cluster)\b",
        Explanation(
            "This Python does not have tunelaunch installed.",
            "Install it into the environment that starts it: pip install -e . (in a checkout), or pip install tunelaunch",
            "user",
        ),
    ),
    (
        r"No module named",
        Explanation(
            "A package is missing.", "Install the tested versions: pip install -c constraints.txt PACKAGE", "user"
        ),
    ),
    (
        r"CUDA driver version is insufficient|driver on your system is too old|forward compatibility was attempted",
        Explanation(
            "The NVIDIA driver is older than this torch needs.",
            "Update the driver, or install a torch for an older CUDA. nvidia-smi prints the newest CUDA it supports.",
            "user",
        ),
    ),
    (
        r"no kernel image is available",
        Explanation(
            "This torch has no code for this card's generation.",
            "Install a torch that supports the card: launch doctor",
            "user",
        ),
    ),
    (
        r"uncorrectable ECC|CUDA error: unspecified launch failure|fallen off the bus|GPU is lost|Xid",
        Explanation(
            "The card reports a hardware error.", "See dmesg -T | grep -i xid; use another card, or reset it.", "retry"
        ),
    ),
    (
        r"CUDA error: an illegal memory access|(CUDNN|CUBLAS)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)",
        Explanation(
            "A kernel failed on the card: a fault of the card or driver, or of the kernel.",
            "If it comes again at the same step, run with CUDA_LAUNCH_BLOCKING=1 to see the line; else look at dmesg -T | grep -i xid.",
            "retry",
        ),
    ),
    (
        r"device-side assert triggered",
        Explanation(
            "A kernel got an index out of range, usually a token id beyond the vocabulary.",
            "Run again with CUDA_LAUNCH_BLOCKING=1 to see the line; check that tokenizer and model belong together.",
            "bug",
        ),
    ),
    (
        r"Watchdog caught collective operation timeout|NCCL.*timeout|Timed out waiting \d+ms|wait timeout after",
        Explanation(
            "A rank waited for the others until the limit: one of them hangs, is far slower, or has gone.",
            "Read the log of the rank that did NOT report a timeout. If all were busy, raise run.timeout_s.",
            "retry",
        ),
    ),
    (
        r"ncclSystemError|ncclUnhandledCudaError|ncclInternalError|NCCL error",
        Explanation(
            "NCCL could not connect or use the devices.",
            "Run again with NCCL_DEBUG=INFO and read the lines with WARN; in containers, check --ipc=host and /dev/shm.",
            "retry",
        ),
    ),
    (
        r"[Ff]ailed to connect to GCS|GCS may have been killed",
        Explanation(
            "The head node of the Ray cluster does not answer.",
            "Look at it: ray status. What was saved is whole: launch runs resume RUN",
            "retry",
        ),
    ),
    (
        r"Address already in use",
        Explanation("A network port is taken by another process.", "Start it again: ports are chosen anew.", "retry"),
    ),
)


def explain(text: str) -> Explanation | None:
    """The explanation of the first known signature in `text`; None when there is none."""
    return next((e for pattern, e in _TABLE if re.search(pattern, text, re.IGNORECASE | re.MULTILINE)), None)
