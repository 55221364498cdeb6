"""Images per second: of training alone, of all time since the first step, and as a share of the hardware's peak."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Images per second of training alone, and the time that validations and saves take from it.

    Attributes:
        rates: images/s of each window between two logged lines.
        started, processor_before: when the first step began, by time.monotonic, and the processor seconds before it.

    Args:
        global_batch_size: images of one step.
        total_seconds: what earlier starts of the run have trained.
        least_seconds: tells how long the step just done would take at the peak of the hardware; None where that is not
            known.
        waited: tells the seconds that steps have waited for images so far; None where these lie on the device.
        synchronize: waits until the device has done all steps that it was given.
    """

    def __init__(
        self,
        global_batch_size: int,
        total_seconds: float = 0.0,
        least_seconds: Callable[[], float] | None = None,
        waited: Callable[[], float] | None = None,
        synchronize: Callable[[], object] = lambda: None,
    ) -> None:
        self._synchronize = synchronize
        self._waited, self._waited_before = waited, 0.0
        self.global_batch_size, self.total_seconds = global_batch_size, total_seconds
        self._least_seconds = least_seconds
        self._window_seconds, self._window_least, self._steps = 0.0, 0.0, 0
        self.rates: list[float] = []
        self.start()
        self._before, self._all_steps = total_seconds, 0
        self._save_seconds = self._window_save_seconds = 0.0

    def start(self) -> None:
        """Begin to count: what came before the loop is not training."""
        self.started, self.processor_before = time.monotonic(), time.process_time()
        self._since = self._began = time.perf_counter()

    def tick(self) -> None:
        """Count one step."""
        self._steps += 1
        self._all_steps += 1
        if self._least_seconds is not None:
            self._window_least += self._least_seconds()

    def read(self) -> dict[str, float]:
        """Return the speed since the last read; right after a device sync, so that all counted work is done.

        Returns:
            `images_per_second`, `step_time_s` and `save_seconds` since the last read; `images_per_second_overall` and
            `share_outside_steps` (0 to 1) since the start; `mfu` (0 to 1) and `data_wait_ms` where they are known.
            Empty before a step.
        """
        self._bank()
        seconds, steps = self._window_seconds / max(1, self._steps), self._steps
        least, self._window_seconds, self._window_least, self._steps = self._window_least, 0.0, 0.0, 0
        if steps == 0:
            return {}
        rate = self.global_batch_size / seconds
        self.rates.append(rate)
        mfu = {} if self._least_seconds is None else {"mfu": least / steps / seconds}
        waits = {}
        if self._waited is not None:
            waits["data_wait_ms"] = 1000 * (self._waited() - self._waited_before) / steps
            self._waited_before = self._waited()
        saved, self._window_save_seconds = self._window_save_seconds, 0.0
        return {
            "images_per_second": rate,
            "step_time_s": seconds,
            **mfu,
            "save_seconds": saved,
            **waits,
            **self._overall(),
        }

    def _overall(self) -> dict[str, float]:
        """Of all time from the first step of this start to now."""
        wall = self._since - self._began
        share = 1 - (self.total_seconds - self._before) / wall if wall else 0.0
        rate = self.global_batch_size * self._all_steps / wall if wall else 0.0
        return {"images_per_second_overall": rate, "share_outside_steps": share}

    def summary(self) -> dict[str, float | None]:
        """Return the speed of this start, for summary.json; None where nothing was timed."""
        numbers = {"save_seconds": round(self._save_seconds, 3)} | {k: round(v, 4) for k, v in self._overall().items()}
        return {"images_per_second": self.median_rate(), **(numbers if self._all_steps else dict.fromkeys(numbers))}

    def median_rate(self) -> float | None:
        """Return the median images/s over the windows, the first (warm-up, compilation) apart where there are more.

        None where nothing was timed: a run that is resumed after its last step.
        """
        rates = self.rates[1:] or self.rates
        return round(statistics.median(rates), 1) if rates else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside: evaluations and checkpoints, which would wait for the steps as well."""
        self._synchronize()
        self._bank()
        yield
        self._since = time.perf_counter()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count what happens inside as time that a save takes from the steps; within `paused`, or after the loop."""
        began = time.perf_counter()
        yield
        self._since = time.perf_counter()
        self._save_seconds += self._since - began
        self._window_save_seconds += self._since - began

    def _bank(self) -> None:
        now = time.perf_counter()
        self._window_seconds += now - self._since
        self.total_seconds += now - self._since
        self._since = now
