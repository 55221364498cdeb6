"""Time entrants in interleaved rounds, A B C ... A B C ...: what slows the machine for a while slows them all."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from fmnist.runtime.compute import Compute

PROBE_STEPS = 3


class Entrant(Protocol):
    """What is raced.

    Attributes:
        name: unique in the race.
        multiple: timed steps are a multiple of it.
    """

    name: str
    multiple: int

    def start(self) -> None:
        """Get ready for a round; not timed."""

    def stop(self) -> None:
        """Leave nothing running in the background; not timed."""

    def step(self) -> int:
        """Do one step, and return the number of images delivered or trained by this process."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long to measure.

    Attributes:
        rounds: interleaved rounds.
        steps: timed steps of one round, at most.
        warmup: untimed steps before them, at most.
        seconds: aim of one round's timed part; slow entrants take fewer steps, but at least MIN_STEPS.
    """

    rounds: int
    steps: int
    warmup: int
    seconds: float


MIN_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One entrant's part of one round, over all processes.

    Attributes:
        images: delivered or trained, nothing padded, nothing dropped counted.
        seconds: by device events on a GPU, else by the wall clock; of the slowest process.
        wall_seconds: by the wall clock.
        steps: how many of them.
        peak_memory_bytes: of the device, on this process; none on a CPU.
    """

    images: int
    seconds: float
    wall_seconds: float
    steps: int
    peak_memory_bytes: int | None

    @property
    def images_per_second(self) -> float:
        """The round's figure."""
        return self.images / self.seconds


class Stopwatch:
    """Time steps on a device, over all processes.

    Args:
        compute: the device and the other processes.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute, self.on_cpu = compute, compute.device.type == "cpu"

    def over_processes(self, values: Sequence[float]) -> list[list[float]]:
        """Return every process's values, in the order of the ranks."""
        table = torch.zeros(self.compute.world_size, len(values), dtype=torch.float64, device=self.compute.device)
        table[self.compute.rank] = torch.tensor(values, dtype=torch.float64)
        return self.compute.sum(table).tolist()

    def synchronize(self) -> None:
        """Wait for the device and for the other processes."""
        if not self.on_cpu:
            torch.cuda.synchronize(self.compute.device)
        if self.compute.world_size > 1:
            self.compute.join()

    def measure(self, entrant: Entrant, steps: int) -> Sample:
        """Time this many steps; the device's queue is empty before and after."""
        self.synchronize()
        if not self.on_cpu:
            torch.cuda.reset_peak_memory_stats(self.compute.device)
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
        images, begun = 0, time.perf_counter()
        for _ in range(steps):
            images += entrant.step()
        if not self.on_cpu:
            last.record()
            last.synchronize()
        wall = time.perf_counter() - begun
        seconds = wall if self.on_cpu else first.elapsed_time(last) / 1000
        rows = self.over_processes([images, seconds, wall])
        return Sample(
            images=int(sum(row[0] for row in rows)),
            seconds=max(row[1] for row in rows),
            wall_seconds=max(row[2] for row in rows),
            steps=steps,
            peak_memory_bytes=None if self.on_cpu else torch.cuda.max_memory_allocated(self.compute.device),
        )


def race(entrants: Sequence[Entrant], pace: Pace, compute: Compute) -> dict[str, list[Sample]]:
    """Time all entrants in turn, `pace.rounds` times over.

    One more round goes before: it compiles what is to be compiled, and finds how many steps take `pace.seconds`.

    Returns:
        One sample per round for each entrant.
    """
    watch = Stopwatch(compute)
    steps = {entrant.name: _probe(entrant, pace, watch) for entrant in entrants}
    samples: dict[str, list[Sample]] = {entrant.name: [] for entrant in entrants}
    for _ in range(pace.rounds):
        for entrant in entrants:
            entrant.start()
            try:
                for _ in range(warmup_steps(pace, steps[entrant.name], entrant.multiple)):
                    entrant.step()
                samples[entrant.name].append(watch.measure(entrant, steps[entrant.name]))
            finally:
                entrant.stop()
    return samples


def warmup_steps(pace: Pace, steps: int, multiple: int) -> int:
    """Return the untimed steps of a round: a third of the timed ones at most, whole bursts."""
    return round_up(min(pace.warmup, max(2, steps // 3)), multiple)


def round_up(steps: int, multiple: int) -> int:
    """Return the least multiple that is not below steps."""
    return multiple * math.ceil(steps / multiple)


def _probe(entrant: Entrant, pace: Pace, watch: Stopwatch) -> int:
    entrant.start()
    try:
        probe = round_up(PROBE_STEPS, entrant.multiple)
        for _ in range(probe):
            entrant.step()
        sample = watch.measure(entrant, probe)
    finally:
        entrant.stop()
    fitting = math.ceil(pace.seconds / (sample.seconds / probe))  # the same on all processes
    return round_up(min(pace.steps, max(MIN_STEPS, fitting)), entrant.multiple)


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return median, extremes and spread of a race's rounds in images/s, with every round's own numbers."""
    rates = [sample.images_per_second for sample in samples]
    median = statistics.median(rates)
    memory = [sample.peak_memory_bytes for sample in samples if sample.peak_memory_bytes is not None]
    return {
        "images_per_second": {
            "median": median,
            "min": min(rates),
            "max": max(rates),
            "spread": (max(rates) - min(rates)) / median,
            "wall_median": statistics.median(sample.images / sample.wall_seconds for sample in samples),
        },
        "images": sum(sample.images for sample in samples),
        "peak_memory_bytes": max(memory, default=None),
        "rounds": [asdict(sample) | {"images_per_second": sample.images_per_second} for sample in samples],
    }
