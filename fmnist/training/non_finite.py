"""NaN and infinity: at which step it began, on which process, and what the model was looking at."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.runtime.processes import Processes

logger = logging.getLogger("fmnist")
MAX_WINDOW, MAX_IMAGES = 10_000, 256


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
        began = "" if first == step else f", begun at step {first}"
        picture = self.directory / f"non_finite_step_{first:08d}.png"
        self.processes.on_main(write_batch, picture, self.loader, self.augment, first)
        raise FloatingPointError(
            f"{message} at step {step}{began}{where}; the batch is drawn in {picture}; the last checkpoint is older"
        )


def write_batch(path: Path, loader: Loader, augment: Augment, step: int) -> None:
    """Draw the global batch of one step as the model saw it, with its labels; pixels that are not finite are red.

    Args:
        path: the PNG.
        loader: of any process: the batch is made again whole.
        augment: makes the images.
        step: the optimizer update, counted from 1, that took this batch.
    """
    from fmnist.report.grid import draw_grid  # seconds of libraries, needed only here

    whole = Loader(
        loader.split,
        global_batch_size=loader.global_batch_size,
        micro_batch_size=loader.micro_batch_size,
        seed=loader.seed,
    )
    images: list[Tensor] = []
    titles: list[str] = []
    for batch in whole.micro_batches(step - 1):
        pixels, targets = augment(batch)
        room = MAX_IMAGES - len(images)
        broken = ~pixels.isfinite().flatten(1).all(1)
        shown = torch.argsort(broken.int(), descending=True, stable=True)[:room]  # broken ones first
        images += list(visible(pixels[shown], augment).cpu())
        titles += [title(target, loader.split.class_names) for target in targets[shown].cpu()]
    try:
        draw_grid(path, torch.stack(images).clamp(0, 1), titles, f"step {step}: {len(images)} images of the batch")
    except OSError as error:  # the picture must not hide what it is about
        logger.warning("%s cannot be written: %s", path, error)


def visible(pixels: Tensor, augment: Augment) -> Tensor:
    """Undo the normalisation: float32 [B, C, S, S] to [B, S, S, 3] in about [0, 1], red where it is not finite."""
    means, stds = (torch.tensor(part, device=pixels.device)[:, None, None] for part in (augment.mean, augment.std))
    finite = pixels.isfinite().all(1)
    grey = (pixels * stds + means).mean(1).nan_to_num(0.0, 0.0, 0.0)
    return torch.stack([torch.where(finite, grey, 1.0), grey * finite, grey * finite], -1)


def title(target: Tensor, class_names: Sequence[str]) -> str:
    """Name a label, or the two classes of a mixed target with their shares."""
    if target.dim() == 0:
        return class_names[int(target)]
    shares = [(share, name) for share, name in zip(target.tolist(), class_names, strict=True) if not share <= 0.005]
    if len(shares) == 1:
        return shares[0][1]
    return "\n".join(f"{name} {share:.2f}" for share, name in sorted(shares, reverse=True)[:2])
