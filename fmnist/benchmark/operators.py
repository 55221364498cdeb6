"""Where a step's time goes: torch.profiler's operators and kernels, sorted into classes."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fmnist.benchmark.pipelines import Pipeline

WARM_UP, STEPS = 2, 3
DATA = "fmnist data"  # what happens within is the loader's
# By class, in the order in which they are tried: parts of names, in lower case.
CLASSES = {
    "data": (DATA, "_augment_kernel"),  # that is launched by no operator of torch
    "optimizer": ("optimizer.step", "optimizer.zero_grad"),
    "compiled": ("triton_", "compiledfunction", "graph_0_cpp_fused"),  # named after all that the compiler fused
    "convolution": ("conv", "dgrad", "wgrad", "cudnn"),
    "matrix product": ("gemm", "cutlass", "nvjet", "aten::mm", "addmm", "bmm", "linear", "matmul"),
    "norm, elementwise": ("aten::", "at::native", "memcpy", "memset"),
}
WHOLE = ("data", "optimizer")  # decide for all that they call


def class_of(names: Iterable[str]) -> str:
    """Return the class of an operator or kernel.

    Args:
        names: its own, then those of the operators that called it, from the inside out.
    """
    found = [
        next((kind for kind, parts in CLASSES.items() if any(p in name.lower() for p in parts)), "") for name in names
    ]
    return next((kind for kind in WHOLE if kind in found), "") or next(filter(None, found), "other")


def time_by_class(
    step: Callable[[Pipeline], int], pipeline: Pipeline, device: torch.device, row: dict[str, Any]
) -> None:
    """Profile some steps with a loader, after untimed ones.

    Args:
        step: does one with a loader's next batch.
        pipeline: the loader.
        device: of the training.
        row: gets `profile`: `ms_per_step` by class, of kernels on a GPU and of operators on a CPU; and `idle_share` of
            the time from the first kernel to the last, None on a CPU, which has no timeline of its own.
    """
    on_cpu, following = device.type == "cpu", pipeline.next

    def marked() -> Any:
        with record_function(DATA):
            return following()

    pipeline.start()
    try:
        for _ in range(WARM_UP):
            step(pipeline)
        pipeline.next = marked  # type: ignore[method-assign]
        activities = [ProfilerActivity.CPU, *([] if on_cpu else [ProfilerActivity.CUDA])]
        with profile(activities=activities) as trace:
            for _ in range(STEPS):
                step(pipeline)
            if not on_cpu:
                torch.cuda.synchronize(device)
    finally:
        pipeline.next = following  # type: ignore[method-assign]
        pipeline.stop()
    row["profile"] = sorted_by_class(trace.events(), on_cpu=on_cpu)


def sorted_by_class(events: Iterable[Any], *, on_cpu: bool) -> dict[str, Any]:
    """Return what `time_by_class` writes, from the profiler's events of all steps."""
    events = list(events)
    timeline = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    # what the host annotates has a span on the device too, from its first kernel to its last: nothing runs by itself
    spans = {event.name for event in timeline if event.is_user_annotation}
    ran = [(event.name, event.time_range) for event in timeline if not event.is_user_annotation]
    unclaimed = Counter((name, time.end - time.start) for name, time in ran)
    spent = Counter[str]()
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        callers = _names(event)
        if on_cpu:
            spent[class_of(callers)] += event.self_cpu_time_total
        for kernel in event.kernels:
            if kernel.name not in spans:
                unclaimed[kernel.name, kernel.duration] -= 1
                spent[class_of([kernel.name, *callers])] += kernel.duration
    for (name, duration), count in (+unclaimed).items():  # launched by no operator: its name alone decides
        spent[class_of([name])] += count * duration
    in_order = sorted(spent, key=lambda kind: -spent[kind])
    return {
        "ms_per_step": {kind: round(spent[kind] / STEPS / 1000, 4) for kind in in_order},
        "idle_share": None if on_cpu else idle_share((time.start, time.end) for _, time in ran),
    }


def _names(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def idle_share(busy: Iterable[tuple[float, float]]) -> float | None:
    """Return the share of the time from the first start to the last end that no interval covers; None without any."""
    intervals = sorted(busy)
    if not intervals:
        return None
    covered, until = 0.0, intervals[0][0]
    for start, end in intervals:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - covered / (until - intervals[0][0])
