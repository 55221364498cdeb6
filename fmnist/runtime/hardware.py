"""What a run computes on: precision, determinism, threads and the device's name."""

import ctypes
import os
import platform
import sys

import torch

from fmnist.runtime.console import counted


def find_device(device: torch.device | str | None) -> torch.device:
    """Return a device that is there.

    Args:
        device: as torch names it; None takes the accelerator where there is one, else the CPU.

    Raises:
        ValueError: one line, for a device that is not there.
    """
    try:
        place = torch.device(device) if device else torch.accelerator.current_accelerator(check_available=True)
        place = place or torch.device("cpu")
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device}: {str(error).splitlines()[0]}") from None
    return place


def resolve_precision(precision: str) -> str:
    """Turn auto into bf16 where the GPU computes in it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which a forward computes in the given dtype, float32 or bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def make_deterministic(device: torch.device) -> None:
    """Let only kernels run whose result depends on nothing but their operands."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        torch.set_num_threads(1)  # how a sum is cut among threads would be part of the result


def use_all_cores(num_processes: int) -> None:
    """Share this node's cores among its processes where a launcher has set one thread each, which both do unasked."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes))


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: it gives back each block above 32 MB, and the kernel clears the next one again.

    Batches at 224 px are such blocks. Seen on two cores: plain torch makes them 2.5 times as fast, and the CNN at 28 px
    trains a tenth faster. Elsewhere (musl, macOS) nothing is done.

    Source: mallopt(3).
    """
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def describe_device(device: torch.device) -> str:
    """Return the device's name as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {counted(torch.get_num_threads(), 'thread')}"


# Dense bf16 matrix products, operations per second, by a part of the name that the driver gives.
# Source: NVIDIA's data sheets.
PEAK_FLOPS = {
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the bf16 operations per second that a GPU's data sheet states; None where it is not known, or for fp32."""
    if precision != "bf16":
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
