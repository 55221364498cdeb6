"""What an export has to agree with: the run in float32 on the CPU, on real test images."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fmnist.data.fashion_mnist import load_split
from fmnist.trained import Trained, open_trained

NUM_IMAGES = 1000


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A run and its answers.

    Attributes:
        trained: the run in float32 on the CPU.
        images: uint8 [NUM_IMAGES, H, W], the first test images.
        logits: float32 [NUM_IMAGES, num_classes], without flip averaging.
    """

    trained: Trained
    images: Tensor
    logits: Tensor


def open_expected(path: Path, root: str | None = None, batch_size: int | None = None) -> Expected:
    """Open a run and run it over the images.

    Args:
        path: a run directory or a checkpoint.
        root: folder of the data set; None takes the run's.
        batch_size: images of one forward; None takes the run's.

    Raises:
        ValueError: one line, for a path that is neither, weights that do not fit, or test images that cannot be had.
    """
    trained = open_trained(path, "cpu", batch_size)
    # However it was trained, what is written is float32 in torch's usual memory format.
    plain = replace(trained.cfg.model, precision="fp32", channels_last=False, compile=False)
    trained = replace(trained, cfg=replace(trained.cfg, model=plain))
    images, _ = load_split("test", root or trained.cfg.data.root, trained.cfg.data.val_size)
    logits, _ = trained(images[:NUM_IMAGES])
    return Expected(trained=trained, images=images[:NUM_IMAGES], logits=logits)
