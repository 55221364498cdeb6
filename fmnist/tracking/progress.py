"""What a person sees of a training: a bar on a terminal, and a line an epoch everywhere."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

from tqdm import tqdm

logger = logging.getLogger("fmnist")
WORDS = {"top1": "top1", "macro_f1": "macro F1", "loss": "loss"}
SILENCE_S = 60.0  # without a line for so long, the next logged step says where the run stands


class Progress:
    """Say where a run stands; no method reads a device tensor.

    Args:
        step: returns the completed optimizer updates.
        validates: says whether the validation images are evaluated after so many updates.
        total_steps, steps_per_epoch: of the run.
        best: returns the best validation number so far; None where there is none.
        by: its name, see `evaluation.best`.
    """

    def __init__(
        self,
        step: Callable[[], int],
        validates: Callable[[int], bool],
        *,
        total_steps: int,
        steps_per_epoch: int,
        best: Callable[[], float | None] = lambda: None,
        by: Literal["top1", "macro_f1", "loss"] = "top1",
    ) -> None:
        self.step, self.validates = step, validates
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.best, self.by = best, by
        self._losses: list[float] = []
        self._rate: float | None = None
        self._overall: float | None = None
        self._told_at, self._told_step = time.monotonic(), step()
        self._bar: tqdm | None = None
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to count time and, on a terminal, draw the bar; called on the main process alone."""
        self._told_at = time.monotonic()
        if has_width():
            self._bar = tqdm(
                initial=self.step(), total=self.total_steps, unit="step", dynamic_ncols=True, smoothing=0.1
            )
            self._thread = threading.Thread(target=self._move, daemon=True)
            self._thread.start()

    def _move(self) -> None:
        """Redraw the bar every second, in long steps and validations too."""
        while self._bar is not None and not self._closed.wait(1.0):
            self._bar.n = self.step()
            self._bar.refresh()

    def log(self, prefix: str, scalars: Mapping[str, float], step: int) -> None:
        """Take logged scalars; write a line after each validation, after an epoch without one, and after a minute.

        Args:
            prefix: train or val; others are ignored.
            scalars: names without the prefix; none where no validation images are held out.
            step: completed optimizer updates.
        """
        if prefix == "train":
            self._losses.append(scalars["loss"])
            self._rate = scalars.get("images_per_second", self._rate)
            self._overall = scalars.get("images_per_second_overall", self._overall)
            new_epoch = step // self.steps_per_epoch > self._told_step // self.steps_per_epoch
            silent = time.monotonic() - self._told_at > SILENCE_S
            if (new_epoch or silent) and not self.validates(step):  # else the next call writes it
                self._say(step, {})
        elif prefix == "val":
            self._say(step, scalars)

    def _say(self, step: int, val: Mapping[str, float]) -> None:
        now = time.monotonic()
        epoch, epochs = step / self.steps_per_epoch, self.total_steps / self.steps_per_epoch
        parts = [f"epoch {epoch:.3g}/{epochs:.3g}", f"step {step:,}"]
        if self._losses:
            parts.append(f"train loss {sum(self._losses) / len(self._losses):.4f}")
        if val:
            number, best = val[self.by], self.best()
            best = number if best is None else best  # a NaN is never kept as the best
            parts += [f"val top1 {100 * val['top1']:.2f} %"] if self.by != "top1" else []
            parts.append(f"val {WORDS[self.by]} {_shown(self.by, number)} (best {_shown(self.by, best)})")
            parts += [f"at {val['size']:g} px"] if "size" in val else []
        if self._rate is not None:
            overall = "" if self._overall is None else f" ({self._overall:,.0f} overall)"
            parts.append(f"{self._rate:,.0f} images/s{overall}")
        if step > self._told_step:
            # the pace since the last line, validation and saves included: it follows a change of image size
            pace = (now - self._told_at) / (step - self._told_step)
            parts.append(f"{duration(pace * (self.total_steps - step))} left")
        logger.info("%s", "  ".join(parts))
        self._losses.clear()
        self._told_at, self._told_step = now, step

    def close(self) -> None:
        """Leave the bar as it stands; a second call does nothing."""
        self._closed.set()
        if self._bar is not None:
            self._thread.join()
            self._bar.n = self.step()
            self._bar.close()
            self._bar = None


def _shown(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.2f} %"


def has_width() -> bool:
    """Say whether stderr is a terminal that tells its width; without one tqdm draws nothing."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):  # no stderr at all, or one without a file
        return False


def duration(seconds: float) -> str:
    """Return seconds as 0:42, 12:05 or 3:07:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
