"""What a run computes on: precision, determinism, threads and the device's name."""

import ctypes
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping

import psutil
import torch
from torch import Tensor

from fmnist.runtime.console import counted
from fmnist.runtime.environment import ENVIRONMENT, integer, is_true, set_default
from fmnist.runtime.launcher import launcher_environment

NO_FLOAT64 = ("mps",)
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # of the CPU, CUDA and its libraries


def find_device(device: torch.device | str | None) -> torch.device:
    """Return a device that is there.

    Args:
        device: as torch names it; None takes the accelerator where there is one, else the CPU.

    Raises:
        ValueError: one line, for a device that is not there.
    """
    device = device or ("cpu" if is_true("ACCELERATE_USE_CPU") else None)
    try:
        place = torch.device(device) if device else torch.accelerator.current_accelerator(check_available=True)
        place = place or torch.device("cpu")
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device}: {str(error).splitlines()[0]}") from None
    return place


def open_device(device: torch.device | str | None) -> torch.device:
    """Return a device as `find_device` does, for a program of one process; on a CPU limit the threads as a run does.

    Raises:
        ValueError: one line, for a device that is not there.
    """
    place = find_device(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means it, for convolutions as for matrix products
    if place.type == "cpu":
        set_threads(None, 1)
    return place


def resolve_precision(precision: str, device: torch.device) -> str:
    """Turn auto into bf16 where a GPU computes in it, else fp32.

    Args:
        precision: `model.precision`.
        device: that computes, which on a machine with a GPU may be the CPU.
    """
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which a forward computes in the given dtype, float32 or bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def has_triton(device: torch.device) -> bool:
    """Say whether our Triton kernels run on a device: a CUDA one, or any where Triton's interpreter is asked for."""
    runs = device.type == "cuda" or ENVIRONMENT.get("TRITON_INTERPRET") == "1"
    return runs and importlib.util.find_spec("triton") is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error of torch means that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)


def free_memory(device: torch.device) -> None:
    """Give memory that torch holds in reserve back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what draws on the host and on one device.

    `torch.manual_seed` seeds every kind of accelerator, and formats the stack for each that is not there: that takes
    longer than launching a small model's step. Nothing is seeded while a CUDA graph is recorded: a replay draws from
    where the generator stands then.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def in_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64; on the host where its device has none (Apple's MPS)."""
    return (tensor.cpu() if tensor.device.type in NO_FLOAT64 else tensor).double()


def make_deterministic(device: torch.device) -> None:
    """Let only kernels run whose result depends on nothing but their operands."""
    set_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # nothing here reads what it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        torch.set_num_threads(1)  # how a sum is cut among threads would be part of the result


def available_cores() -> int:
    """Return the cores that this process may run on, and no more than SLURM gave its task."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    given = ENVIRONMENT.get("SLURM_CPUS_PER_TASK") or ENVIRONMENT.get("SLURM_CPUS_ON_NODE") or ""
    return min(cores, int(given)) if given.isdigit() and int(given) else cores


def set_threads(threads: int | None, num_processes: int) -> None:
    """Compute with the threads asked for, else with those of OMP_NUM_THREADS, else with this process' share of cores.

    Args:
        threads: of each process; None decides by the above.
        num_processes: of the run.
    """
    own = launcher_environment()
    launched = own is not None or "ACCELERATE_MIXED_PRECISION" in ENVIRONMENT or "TORCHELASTIC_RUN_ID" in ENVIRONMENT
    if threads is None and _user_chose_threads(own, launched=launched):
        return
    cores = available_cores()
    if launched:
        here = integer("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in ENVIRONMENT else num_processes
        cores = max(1, cores // here)
    if threads or launched or cores < torch.get_num_threads():
        torch.set_num_threads(threads or cores)


def _user_chose_threads(own: Mapping[str, str] | None, *, launched: bool) -> bool:
    """Tell the user's OMP_NUM_THREADS from a launcher's, which sets it unasked: to 1, or to all cores."""
    asked = ENVIRONMENT.get("OMP_NUM_THREADS")
    if own is not None:
        return bool(own.get("OMP_NUM_THREADS"))
    return bool(asked) and not (launched and asked == "1")


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
    if device.type != "cpu":
        return f"{device.type} ({platform.machine()})"
    return f"CPU ({platform.machine()}), {counted(torch.get_num_threads(), 'thread')}"


# Dense bf16 matrix products, operations per second, by a part of the name that the driver gives.
# Source: NVIDIA's data sheets.
PEAK_FLOPS = {
    "H200 NVL": 835e12,
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
    if precision != "bf16" or "MIG" in device_name or "Laptop" in device_name:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


FREE_SHARE = 0.9  # of the free memory that images may take; the rest is little for a large model: see --dry_run


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the device, for one of the processes that compute on this machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_bytes()


def host_bytes() -> int:
    """Return the free memory of the host, for one of the processes that this run has on it."""
    return psutil.virtual_memory().available // max(1, integer("LOCAL_WORLD_SIZE", 1))


def too_large(num_bytes: int, where: str = "device") -> str:
    """Say why so many bytes of images have no room where this process computes; an empty text where they have.

    Args:
        num_bytes: of all images.
        where: `data.where`; all but `device` may also use the host's memory, and the devices of other processes.
    """
    free, place = psutil.virtual_memory().available, "in memory"
    if torch.cuda.is_available():
        on_gpu = torch.cuda.mem_get_info()[0]
        if where == "device":
            free, place = on_gpu, "on the GPU"
        else:
            free, place = max(free, on_gpu * integer("WORLD_SIZE", 1)), "in memory and on the GPUs"
    elif where in ("auto", "spread"):
        free *= integer("WORLD_SIZE", 1) // max(1, integer("LOCAL_WORLD_SIZE", 1)) or 1  # other machines' too
    if num_bytes <= FREE_SHARE * free:
        return ""
    return f"{num_bytes / 2**30:.2f} GiB of images, {free / 2**30:.2f} GiB are free {place}"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor without making the host wait for the device's queue."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
