"""What a model costs to use: parameters, operations, and the time of a forward on this device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles
from typing import Literal

import torch
from torch import Tensor

from fmnist.models.flops import flops_per_image
from fmnist.runtime.hardware import autocast
from fmnist.trained import Trained

BATCH_SIZES = (1, 256)
WARM_UP, SECONDS, MIN_REPEATS, MAX_REPEATS = 3, 1.0, 10, 1000


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The time of one forward of a batch, from uint8 images on the device to logits.

    Attributes:
        batch_size: images.
        repeats: forwards timed, each to its end on the device.
        median_ms, low_ms, high_ms: milliseconds: the median, and what a tenth of the forwards were below and above.
        images_per_second: batch_size over the median.
    """

    batch_size: int
    repeats: int
    median_ms: float
    low_ms: float
    high_ms: float
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: how many numbers.
        flops_per_image: floating-point operations of one answer; a multiply-add is two.
        timings: one per batch size.
        device, precision, torch: what they were measured on.
        image_size: pixels per side.
        measured: false for an ensemble, whose costs are the sums of its members'.
    """

    parameters: int
    flops_per_image: int
    timings: tuple[Timing, ...]
    device: str
    precision: str
    torch: str
    image_size: int | None
    measured: bool = True


def time_batches(forward: Callable[[], object], batch_size: int, synchronize: Callable[[], object]) -> Timing:
    """Time a forward: a few to warm up, then at least 10, for about a second.

    Args:
        forward: computes one batch.
        batch_size: its images.
        synchronize: waits for the device.
    """
    for _ in range(WARM_UP):
        forward()
    synchronize()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < MIN_REPEATS or (time.perf_counter() - begun < SECONDS and len(times) < MAX_REPEATS):
        start = time.perf_counter()
        forward()
        synchronize()
        times.append(1000 * (time.perf_counter() - start))
    tenths = quantiles(times, n=10)
    median = tenths[4]
    return Timing(
        batch_size=batch_size,
        repeats=len(times),
        median_ms=median,
        low_ms=tenths[0],
        high_ms=tenths[-1],
        images_per_second=1000 * batch_size / median,
    )


def measure_cost(trained: Trained, images: Tensor, device_name: str, tta: Literal["none", "flip"] = "none") -> Cost:
    """Measure what a model costs on its device; timings are of one process alone.

    Args:
        trained: the run.
        images: uint8 [N, H, W] or [N, 3, H, W] on the device.
        device_name: as people know it.
        tta: flip: each image and its mirror image, two forwards.
    """
    model, augment, device = trained.model, trained.augment, trained.device

    def timing(batch_size: int) -> Timing:
        batch = images[torch.arange(batch_size, device=images.device) % len(images)]

        @torch.inference_mode()
        def forward() -> None:
            with autocast(device, augment.dtype):
                prepared = augment.evaluation(batch, trained.size)
                for view in (prepared,) if tta == "none" else (prepared, prepared.flip(-1)):
                    model(view)

        def synchronize() -> None:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)  # which need not be the current one

        return time_batches(forward, batch_size, synchronize)

    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        flops_per_image=flops_per_image(model, len(augment.mean), trained.size)[0] * (1 if tta == "none" else 2),
        timings=tuple(timing(batch_size) for batch_size in BATCH_SIZES),
        device=device_name,
        precision="bf16" if augment.dtype == torch.bfloat16 else "fp32",
        torch=torch.__version__,
        image_size=trained.size,
    )


def sum_of_costs(costs: list[Cost]) -> Cost:
    """Return the cost of running several models one after the other."""
    timings = []
    for parts in zip(*(cost.timings for cost in costs), strict=True):
        median, low, high = (sum(getattr(part, key) for part in parts) for key in ("median_ms", "low_ms", "high_ms"))
        timings.append(
            Timing(
                batch_size=parts[0].batch_size,
                repeats=min(part.repeats for part in parts),
                median_ms=median,
                low_ms=low,
                high_ms=high,
                images_per_second=1000 * parts[0].batch_size / median,
            )
        )
    first = costs[0]
    return Cost(
        parameters=sum(cost.parameters for cost in costs),
        flops_per_image=sum(cost.flops_per_image for cost in costs),
        timings=tuple(timings),
        device=first.device,
        precision=", ".join(dict.fromkeys(cost.precision for cost in costs)),
        torch=first.torch,
        image_size=None,
        measured=False,
    )
