"""Distillation: targets that take a share from the probabilities of trained runs."""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fmnist.checkpoint.fingerprint import TEACHER, class_changes, of_several
from fmnist.config.schema import OptimConfig
from fmnist.data.split import Split
from fmnist.metrics import predict
from fmnist.run import Run
from fmnist.trained import Trained, open_together

logger = logging.getLogger("fmnist")


def taught_targets(cfg: OptimConfig, split: Split, run: Run) -> Tensor:
    """Return what training aims at: the labels, and the mean probability that the teachers give to each class.

    The teachers see each image once, without augmentation and at their own size; the processes share the images, and
    each has the same bits on any process count. Fixed targets cost a step nothing.

    Args:
        cfg: teachers and their share.
        split: the training images, all of them in reach of each process.
        run: this process's view of the run, whose fingerprint names the teachers' weights.

    Returns:
        float32 [N, num_classes] on the device of the labels, each row adding up to 1.

    Raises:
        ValueError: a teacher of other classes or channels, or replaced meanwhile; images that are spread; one line.

    Source:
        Hinton, Vinyals and Dean 2015, arXiv:1503.02531, at temperature 1 and with targets that do not change.
    """
    if split.rows is not None:
        raise ValueError(f"{TEACHER} reads all training images, which are spread; valid: data.where device or host")
    labels = F.one_hot(split.labels, len(split.class_names)).float()
    mean, digests = torch.zeros_like(labels), []
    for name in cfg.teachers:
        teacher = open_together(Path(name), run)
        _check(name, teacher, split)
        logits = predict(teacher.model, split, teacher.augment, teacher.cfg.evaluation, run)
        mean += logits.softmax(1) / len(cfg.teachers)
        digests.append(teacher.digest)
        right = 100 * float((logits.argmax(1) == split.labels).double().mean())
        run.on_main(logger.info, "teacher %s: right on %.2f %% of the training images", name, right)
    if of_several(digests) != run.fingerprint[TEACHER]:
        raise ValueError(f"{TEACHER}: a run's weights were replaced while they were read; start again")
    return labels * (1 - cfg.distill_weight) + mean * cfg.distill_weight


def _check(name: str, teacher: Trained, split: Split) -> None:
    """Refuse a teacher whose answers are about something else."""
    own, others = split.class_names, teacher.class_names
    if own != others:
        raise ValueError(f"{TEACHER}: {name} knows other classes: {class_changes(own, others)}")
    channels, read = split.info.shape[0], teacher.info.shape[0]
    if channels != read:
        raise ValueError(f"{TEACHER}: {name} reads images of {read} channels, here are {channels}")
