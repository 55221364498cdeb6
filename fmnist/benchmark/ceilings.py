"""What the machine can do at most, measured, and what a pipeline asks of its memory, counted."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmnist.benchmark.pipelines import Pipeline

TABLE_BYTES, INDEX_BYTES = 64, 8  # a sample's row of parameters and its index, as the kernel reads them
# These read as many pixels as they write, wherever those lie: not the whole tensor that they are given.
GATHERS = ("index.Tensor", "index_select.default", "gather.default", "select.int")


def copy_bytes_per_second(device: torch.device) -> float:
    """Measure a large copy within the device's memory: bytes read and written per second, the best of ten."""
    size = 1 << (28 if device.type == "cpu" else 31)  # far larger than any cache
    source = torch.randint(256, (1 << 20,), dtype=torch.uint8, device=device).repeat(size >> 20)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device, 10)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure a large square matrix product of normal numbers: a multiply-add is two operations; the best of ten."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: a @ b, device, 10)


def _fastest(action: Callable[[], Any], device: torch.device, times: int) -> float:
    seconds = []
    for _ in range(times + 3):  # three to warm up
        if device.type == "cpu":
            begun = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - begun)
        else:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            action()
            last.record()
            last.synchronize()
            seconds.append(first.elapsed_time(last) / 1000)
    return min(seconds[3:])


def bytes_per_image(pipeline: Pipeline) -> float | None:
    """Return the bytes of device memory that one image costs, read and written; none where the host makes it.

    By formula for what is fused: the stored pixels and the parameters read once, the result written once, which is
    the least that can be. Else every operation's operands and results are summed, as if no cache held any of them.
    """
    setting = pipeline.setting
    if pipeline.bytes_rule == "none":
        return None
    if pipeline.bytes_rule == "formula":
        stored = setting.split.images[0].numel()
        written = setting.size**2 * setting.dtype.itemsize
        return float(stored + TABLE_BYTES + INDEX_BYTES + written)
    pipeline.start()
    pipeline.next()  # what is made once per epoch is not a batch's
    with ByteCounter(setting.device) as counter:
        images, _ = pipeline.next()
    pipeline.stop()
    return counter.total / len(images)


class ByteCounter(TorchDispatchMode):
    """Count the bytes that operations read and write on a device; views cost nothing.

    Attributes:
        total: bytes so far.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.total = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [item for item in tree_leaves((args, kwargs)) if self._counts(item)]
        written = [item for item in tree_leaves(result) if self._counts(item)]
        storages = {item.untyped_storage().data_ptr() for item in read}
        if not func._schema.is_mutable:
            written = [item for item in written if item.untyped_storage().data_ptr() not in storages]
        if written:
            gathers = any(str(func).endswith(name) for name in GATHERS)
            self.total += sum(_size(item) for item in written)
            self.total += sum(_size(item) for item in (written if gathers else read))
        return result

    def _counts(self, item: Any) -> bool:
        return isinstance(item, Tensor) and item.device.type == self.device.type


def _size(tensor: Tensor) -> int:
    # An expanded tensor has more elements than bytes.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
