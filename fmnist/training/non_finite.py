"""NaN and infinity: at which step it began, on which process, and what the model was looking at."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fmnist.data.augment import Augment
from fmnist.data.batches import Loader

logger = logging.getLogger("fmnist")
MAX_WINDOW, MAX_IMAGES = 10_000, 256


class Watch:
    """Keep the metrics of the last steps on the device, so that a NaN noticed late is traced to its step.

    Args:
        every_steps: steps between two looks at the metrics.
        device: where the metrics are.
    """

    def __init__(self, every_steps: int, device: torch.device) -> None:
        self.window = torch.zeros(min(every_steps, MAX_WINDOW), 2, device=device)

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


def write_batch(path: Path, loader: Loader, augment: Augment, step: int, class_names: Sequence[str]) -> None:
    """Draw the global batch of one step as the model saw it, with its labels; pixels that are not finite are red.

    Args:
        path: the PNG.
        loader: of any process: the batch is made again whole.
        augment: what made the images from it.
        step: the optimizer update, counted from 1, that took this batch.
        class_names: in label order.
    """
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
        titles += [title(target, class_names) for target in targets[shown].cpu()]
    try:
        draw(path, torch.stack(images).clamp(0, 1), titles, f"step {step}: {len(images)} images of the batch")
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


def draw(path: Path, images: Tensor, titles: Sequence[str], heading: str) -> None:
    """Write a grid of images [N, S, S, 3] in [0, 1], each under its title."""
    from matplotlib.figure import Figure  # seconds of libraries, needed only here

    from fmnist.report.figures import write_file

    count, size = len(images), images.shape[1]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    pitch = size + max(1, size // 3)  # a strip above each image for its title
    canvas = torch.ones(rows * pitch, columns * (size + 1), 3)
    figure = Figure(
        figsize=(max(4.0, 0.75 * columns), max(3.0, 0.75 * rows * pitch / size) + 0.4), layout="constrained"
    )
    axes = figure.add_subplot()
    for i, (image, text) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(i, columns)
        top, left = row * pitch + pitch - size, column * (size + 1)
        canvas[top : top + size, left : left + size] = image
        axes.text(left, top - 1, text, fontsize=5, va="bottom", linespacing=0.9)
    axes.imshow(canvas.numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(heading, fontsize=9)
    write_file(path, figure)
