"""NaN and infinity: at which step it began, on which process, and what the model was looking at."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from fmnist.checkpoint.store import Checkpoints
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.runtime.processes import Processes
from fmnist.training.batch_pictures import write_batch

MAX_WINDOW = 10_000


class NonFiniteWatch:
    """Keep the metrics of the last steps on the device, so that a NaN noticed late is traced to its step.

    Args:
        processes: agree on where it began.
        loader: makes the batch of that step again.
        augment: makes its images.
        directory: where the batch is drawn.
        every_steps: steps between two looks at the metrics.
    """

    def __init__(
        self, processes: Processes, loader: Loader, augment: Augment, directory: Path, every_steps: int
    ) -> None:
        self.processes, self.loader, self.augment, self.directory = processes, loader, augment, directory
        self.window = torch.zeros(min(every_steps, MAX_WINDOW), 2, device=loader.split.labels.device)

    def note(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """Keep the loss and gradient norm of one step; nothing here waits for the device."""
        self.window[step % len(self.window)] = torch.stack((metrics["loss"], metrics["grad_norm"]))

    def first(self, step: int) -> tuple[int, bool] | None:
        """Return the first of the last steps whose metrics are not finite here, and whether its loss is not."""
        finite = self.window.isfinite().tolist()
        for past in range(max(1, step - len(finite) + 1), step + 1):
            loss_is, norm_is = finite[past % len(finite)]
            if not (loss_is and norm_is):
                return past, not loss_is
        return None

    def check(self, scalars: Mapping[str, float], step: int) -> None:
        """Stop if a mean over processes, the same on each of them, is a NaN or an infinity.

        Raises:
            FloatingPointError: see `stop`.
        """
        if bad := [f"{name} is {value}" for name, value in scalars.items() if not math.isfinite(value)]:
            self.stop(", ".join(bad), step)

    def stop(self, message: str, step: int) -> NoReturn:
        """Draw the batch of the first step that was not finite, and end all processes with one line.

        Args:
            message: what is not finite.
            step: completed updates when it was noticed.

        Raises:
            FloatingPointError: always.
        """
        firsts = self.processes.gather(self.first(step))
        first = min((found[0] for found in firsts if found), default=step)
        ranks = [rank for rank, found in enumerate(firsts) if found == (first, True)]
        where = f" (the loss of rank {', '.join(map(str, ranks))})" if 0 < len(ranks) < len(firsts) else ""
        began = "" if first == step else f", first at step {first}"
        picture = self.directory / f"non_finite_step_{first:08d}.png"
        batches = self.loader.for_main(first - 1)
        self.processes.on_main(write_batch, picture, batches, self.augment, first)
        saved = Checkpoints(self.directory / "checkpoints", 1, {}).steps()
        raise FloatingPointError(
            f"{message} at step {step}{began}{where}; the batch is drawn in {picture}; "
            f"{'the last checkpoint is from before' if saved else 'no checkpoint was saved yet'}"
        )
