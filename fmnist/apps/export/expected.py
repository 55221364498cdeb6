"""What an export has to agree with: the run in float32 on the CPU, on real test images."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fmnist.data.fashion_mnist import load_split
from fmnist.network import open_trained
from fmnist.trained import Predictor

NUM_IMAGES = 1000


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A run and its answers.

    Attributes:
        predictor: the run in float32 on the CPU.
        images: uint8 [NUM_IMAGES, H, W], the first test images.
        logits: float32 [NUM_IMAGES, num_classes], without flip averaging.
    """

    predictor: Predictor
    images: Tensor
    logits: Tensor


def open_reference(path: Path, root: str | None = None) -> Reference:
    """Open a run and run it over the images.

    Args:
        path: a run directory or a checkpoint.
        root: folder with the IDX files; none is the run's.

    Raises:
        ValueError: one line, for a path that is neither, weights that do not fit, or test images that cannot be had.
    """
    trained = open_trained(path)
    # However it was trained, what is written is float32 in torch's usual memory format.
    plain = replace(trained.cfg.model, precision="fp32", channels_last=False, compile=False)
    trained = replace(trained, cfg=replace(trained.cfg, model=plain))
    model, augment = trained.load(torch.device("cpu"))
    predictor = Predictor(trained=trained, model=model, augment=augment, device=torch.device("cpu"))
    images, _ = load_split("test", root or trained.cfg.data.root, trained.cfg.data.val_size)
    logits, _ = predictor(images[:NUM_IMAGES])
    return Reference(predictor=predictor, images=images[:NUM_IMAGES], logits=logits)
