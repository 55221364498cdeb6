"""Exact metrics: every image counted once, whatever the process count."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmnist.config.schema import EvaluationConfig
from fmnist.data.augment import Augment
from fmnist.data.batches import Split, rank_slice
from fmnist.run import Run


@torch.inference_mode()
def predict(model: nn.Module, split: Split, augment: Augment, cfg: EvaluationConfig, run: Run) -> Tensor:
    """Run the model over a split; each process does its share and the shares are summed into one tensor.

    Args:
        model: not wrapped for distributed training; its mode is put back afterwards.
        split: N images on the device.
        augment: gives the size and the normalisation; nothing random is applied.
        cfg: batch size, image size and test-time augmentation.
        run: the process group and precision.

    Returns:
        float32 [N, num_classes] logits on the device, the same on every process (with `tta: flip`, the logarithm of
        the mean probability of the image and its mirror).
    """
    was_training = model.training
    model.eval()
    run.broadcast(model.buffers())  # BatchNorm's running statistics differ between processes
    size = cfg.size or augment.final_size
    logits = torch.zeros(len(split), augment.num_classes, device=run.device)
    # Whole batches are shared out: an image meets the same neighbours, and gets the same bits, on any process count.
    starts = range(0, len(split), cfg.batch_size)
    for start in starts[rank_slice(len(starts), run.rank, run.world_size)]:
        part = slice(start, start + cfg.batch_size)
        images = augment.evaluation(split.images[part], size)
        with run.autocast():
            logits[part] = model(images).float()
            if cfg.tta == "flip":
                mirrored = model(images.flip(-1)).float()
                logits[part] = ((logits[part].softmax(-1) + mirrored.softmax(-1)) / 2).log()
    model.train(was_training)
    return run.sum(logits)  # the other processes' rows are exact zeros


def score(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return `top1` (fraction) and `loss` (mean cross-entropy, nats) as float64 scalars on the device.

    Args:
        logits: float32 [N, num_classes].
        labels: int64 [N].
    """
    return {
        "top1": (logits.argmax(-1) == labels).double().mean(),
        "loss": F.cross_entropy(logits.double(), labels),
    }
