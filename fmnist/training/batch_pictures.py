"""Pictures of what a model is trained on: a batch that broke it, and the first batches of every run."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fmnist.data.augment import Augment
from fmnist.data.batches import Loader, MicroBatch
from fmnist.optim import Schedule
from fmnist.runtime.processes import Processes

logger = logging.getLogger("fmnist")
MAX_IMAGES = 256
TRAIN_BATCH, SHOWN = "train_batch.png", 16


def write_batch(path: Path, batches: Sequence[MicroBatch], augment: Augment, step: int) -> None:
    """Draw the global batch of one step as the model saw it, with its labels; pixels that are not finite are red.

    Args:
        path: the PNG.
        batches: of that step over all processes, from `Loader.for_main`.
        augment: makes the images.
        step: the optimizer update, counted from 1, that took this batch.
    """
    from fmnist.report.grid import draw_grid  # seconds of libraries, needed only here

    images: list[Tensor] = []
    titles: list[str] = []
    for batch in batches:
        pixels, targets = augment(batch)
        room = MAX_IMAGES - len(images)
        broken = ~pixels.isfinite().flatten(1).all(1)
        shown = torch.argsort(broken.int(), descending=True, stable=True)[:room]  # broken ones first
        images += list(visible(pixels[shown], augment).cpu())
        titles += [title(target, batch.split.class_names) for target in targets[shown].cpu()]
    try:
        draw_grid(path, torch.stack(images).clamp(0, 1), titles, f"step {step}: {len(images)} images of the batch")
    except OSError as error:  # the picture must not hide what it is about
        logger.warning("%s cannot be written: %s", path, error)


def write_train_batch(
    directory: Path, loader: Loader, augment: Augment, schedule: Schedule, processes: Processes
) -> None:
    """Draw sixteen images of the first step, and of the last where that has another size, with their targets.

    They are made in plain PyTorch, whatever makes those of the training: to rounding the same, and nothing is compiled
    for them. A failure is one warning.

    Args:
        directory: the run directory, for train_batch.png; an old one stays.
        loader: of this process.
        augment: makes the images.
        schedule: of the run.
        processes: all of them call this, the main one draws.
    """
    steps = {0} if augment.size(0) == augment.final_size else {0, schedule.total_steps - 1}
    batches = [loader.for_main(step, most=SHOWN)[0] for step in sorted(steps)]
    processes.on_main(_draw_train_batch, directory / TRAIN_BATCH, batches, augment)


def _draw_train_batch(path: Path, batches: Sequence[MicroBatch], augment: Augment) -> None:
    try:
        if path.exists():
            return
        from fmnist.report.grid import draw_grid  # half a second of libraries

        plain = Augment(
            replace(augment.cfg, backend="eager"),
            num_classes=augment.num_classes,
            mean=augment.mean,
            std=augment.std,
            fill=augment.fill,
            device=batches[0].indices.device,
        )
        images, titles, said = [], [], []
        for batch in batches:
            pixels, targets = plain(batch)
            shown = visible(pixels, plain).cpu().clamp(0, 1).movedim(-1, 1)
            images.append(F.interpolate(shown, plain.final_size, mode="nearest").movedim(1, -1))
            titles += [title(target, batch.split.class_names) for target in targets.cpu()]
            said.append(f"step {batch.step + 1:,} at {pixels.shape[-1]} px")
        draw_grid(path, torch.cat(images), titles, f"what the model trains on: {', then '.join(said)}", columns=8)
    except Exception as error:  # a picture must not end a training
        logger.warning("%s is not drawn: %s", path, error)


def visible(pixels: Tensor, augment: Augment) -> Tensor:
    """Undo the normalisation: float32 [B, 1 or 3, S, S] to [B, S, S, 3] in about [0, 1], red where it is not finite."""
    means, stds = (torch.tensor(part, device=pixels.device)[:, None, None] for part in (augment.mean, augment.std))
    finite = pixels.isfinite().all(1)
    red, green, blue = (pixels * stds + means).nan_to_num(0.0, 0.0, 0.0).expand(-1, 3, -1, -1).unbind(1)
    return torch.stack([torch.where(finite, red, 1.0), green * finite, blue * finite], -1)


def title(target: Tensor, class_names: Sequence[str]) -> str:
    """Name a label, or the two classes of a mixed target with their shares."""
    if target.dim() == 0:
        return class_names[int(target)]
    shares = [(share, name) for share, name in zip(target.tolist(), class_names, strict=True) if not share <= 0.005]
    if len(shares) == 1:
        return shares[0][1]
    return "\n".join(f"{name} {share:.2f}" for share, name in sorted(shares, reverse=True)[:2])
