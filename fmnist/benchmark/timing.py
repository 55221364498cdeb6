"""Images/s of loaders in interleaved rounds, A B C ... A B C ..., and what the device would allow at most."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmnist.benchmark.failures import LoaderFailed, failure_of
from fmnist.benchmark.pipelines import Pipeline
from fmnist.runtime.compute import Compute

TABLE_BYTES, INDEX_BYTES = 64, 8  # a sample's row of parameters and its index, as the kernel reads them
# These read as many bytes as they write, not the whole tensor that they are given.
GATHERS = ("index.Tensor", "index_select.default", "gather.default", "select.int")
MIN_STEPS, MAX_WARMUP = 3, 20
Sample = dict[str, Any]  # one timed round
Step = Callable[[Pipeline], int]  # do one step, and return the images that this process delivered or trained


def seconds_of(action: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the seconds that an action takes: by device events on a GPU, and by the wall clock."""
    if device.type == "cpu":
        begun = time.perf_counter()
        action()
        return (wall := time.perf_counter() - begun), wall
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    first.record()
    action()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000, time.perf_counter() - begun


def run_round(
    pipeline: Pipeline, step: Step, warmup: int, steps: int, compute: Compute, fatal: tuple[type[Exception], ...] = ()
) -> Sample:
    """Do untimed steps, then timed ones.

    Returns:
        Over all processes: `images`, and `seconds` (by device events on a GPU) and `wall_seconds` of the slowest one;
        `steps`; `recompilations`, the graphs that torch.compile made while the clock ran; `peak_memory_bytes` of the
        device on this process, None on a CPU.

    Raises:
        LoaderFailed: on all processes, where the loader failed on one of them.
    """
    device, counts, timed, on_gpu = compute.device, list[int](), list[float](), compute.device.type != "cpu"
    graphs = Counter[str]()

    def warm_up() -> None:
        pipeline.start()
        for _ in range(round_up(warmup, pipeline.multiple)):
            step(pipeline)
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)

    def measure() -> None:
        graphs.subtract(counters["stats"])
        timed.extend(seconds_of(lambda: counts.extend(step(pipeline) for _ in range(steps)), device))
        graphs.update(counters["stats"])

    failure = failure_of(warm_up, fatal)
    compute.join()
    failure = failure or failure_of(measure, fatal)
    unstopped = failure_of(pipeline.stop, fatal)  # of no interest where it had not even started
    said = failure or unstopped
    found: list[dict[str, Any]] = compute.gather(
        {"said": said, "images": sum(counts), "recompilations": graphs["unique_graphs"], "times": timed}
    )
    if reason := next(filter(None, (process["said"] for process in found)), ""):
        raise LoaderFailed(reason)
    measured: Sample = {key: sum(process[key] for process in found) for key in ("images", "recompilations")}
    seconds, wall_seconds = zip(*(process["times"] for process in found), strict=True)
    measured |= {"seconds": max(seconds), "wall_seconds": max(wall_seconds), "steps": steps}
    return measured | {"peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None}


def round_up(steps: int, multiple: int) -> int:
    """Return the least multiple that is not below steps."""
    return multiple * math.ceil(steps / multiple)


def race(
    pipelines: Sequence[Pipeline],
    step: Step,
    rounds: int,
    seconds: float,
    compute: Compute,
    fatal: tuple[type[Exception], ...] = (),
) -> dict[str, list[Sample] | str]:
    """Time the step with each loader in turn, `rounds` times, for about `seconds` each.

    Untimed rounds come first: they compile what has to be compiled, and find how many steps take that long.

    Returns:
        By loader, its rounds, or why it failed: from then on it takes no part.
    """
    steps: dict[str, int] = {}
    results: dict[str, list[Sample] | str] = {pipeline.name: [] for pipeline in pipelines}

    def pace(pipeline: Pipeline) -> None:
        count = round_up(MIN_STEPS, pipeline.multiple)
        while (sample := run_round(pipeline, step, count, count, compute, fatal))["seconds"] < seconds / 4:
            count *= 4
        fitting = math.ceil(seconds * count / sample["seconds"])  # the same on all processes
        steps[pipeline.name] = round_up(max(MIN_STEPS, fitting), pipeline.multiple)

    for number in range(rounds + 1):
        for pipeline in pipelines:
            result = results[pipeline.name]
            if isinstance(result, str):
                continue
            try:
                if number == 0:
                    pace(pipeline)
                    continue
                count = steps[pipeline.name]
                warmup = min(MAX_WARMUP, max(2, count // 3))
                result.append(run_round(pipeline, step, warmup, count, compute, fatal))
            except LoaderFailed as failure:
                results[pipeline.name] = str(failure)
    return results


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return median, extremes and spread of a loader's rounds in images/s, with every round's own numbers."""
    rates = [sample["images"] / sample["seconds"] for sample in samples]
    median, wall_rates = statistics.median(rates), [sample["images"] / sample["wall_seconds"] for sample in samples]
    spread = {"min": min(rates), "max": max(rates), "spread": (max(rates) - min(rates)) / median}
    return {
        "images_per_second": {"median": median, "wall_median": statistics.median(wall_rates)} | spread,
        "images": sum(sample["images"] for sample in samples),
        "peak_memory_bytes": max(sample["peak_memory_bytes"] or 0 for sample in samples) or None,
        "rounds": [s | {"images_per_second": rate} for s, rate in zip(samples, rates, strict=True)],
    }


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the rates of a large copy, in bytes/s read and written, and of a large matrix product, in FLOP/s."""
    size, side = (1 << 28, 2048) if device.type == "cpu" else (1 << 31, 8192)  # bytes far beyond any cache
    source = torch.randint(256, (1 << 20,), dtype=torch.uint8, device=device).repeat(size >> 20)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def best(action: Callable[[], object]) -> float:
        return min([seconds_of(action, device)[0] for _ in range(13)][3:])  # three to warm up

    return 2 * size / best(lambda: target.copy_(source)), 2 * side**3 / best(lambda: a @ b)


def bytes_per_image(pipeline: Pipeline) -> float | None:
    """Return the bytes of device memory that an image costs, read and written; None where the host makes it.

    A fused loader by formula: stored pixels and parameters read once, the result written once, which is the least
    possible. The others by summing every operation's operands and results, as if no cache held any of them.
    """
    setting = pipeline.setting
    if pipeline.bytes_rule == "none":
        return None
    if pipeline.bytes_rule == "formula":
        pixels = setting.split.images.shape[-1] ** 2 + setting.size**2 * setting.dtype.itemsize
        return float(setting.channels * pixels + (TABLE_BYTES if setting.channels == 1 else 116) + INDEX_BYTES)
    pipeline.start()
    pipeline.next()  # what is made once per epoch belongs to no batch
    with ByteCounter(setting.device) as counter:
        pipeline.next()
    pipeline.stop()
    return counter.total / setting.batch_size


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that operations read and write on a device (`total`); views cost nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.total = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, written = self._tensors((args, kwargs)), self._tensors(result)
        if not func._schema.is_mutable:
            storages = {tensor.untyped_storage().data_ptr() for tensor in read}
            written = [tensor for tensor in written if tensor.untyped_storage().data_ptr() not in storages]
        for tensor in written + (written if str(func).endswith(GATHERS) else read) if written else ():
            # an expanded tensor has more elements than bytes
            self.total += min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        return result

    def _tensors(self, tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == self.device.type]
