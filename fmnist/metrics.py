"""Exact metrics: every image counted once, whatever the process count."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmnist.config.schema import EvaluationConfig
from fmnist.data.augment import Augment
from fmnist.data.split import Split
from fmnist.runtime.hardware import autocast, in_float64
from fmnist.runtime.processes import Processes

TOP5_FROM = 20  # classes


@torch.inference_mode()
def predict(model: nn.Module, split: Split, augment: Augment, cfg: EvaluationConfig, processes: Processes) -> Tensor:
    """Run the model over a split; each process does its share and the shares are summed into one tensor.

    Args:
        model: not wrapped for distributed training; its mode is put back afterwards.
        split: N images; those of this process's share of the batches are held here.
        augment: gives size, normalisation and the dtype of the arithmetic; nothing random is applied.
        cfg: batch size, image size and test-time augmentation.
        processes: share the work.

    Returns:
        float32 [N, num_classes] logits on the device, the same on every process (with `tta: flip`, the logarithm of
        the mean probability of the image and its mirror).
    """
    was_training = model.training
    model.eval()
    processes.broadcast(model.buffers())  # BatchNorm's running statistics differ between processes
    size = cfg.size or augment.final_size
    device = split.labels.device
    logits = torch.zeros(len(split), augment.num_classes, device=device)
    # Whole batches are shared out: an image meets the same neighbours, and gets the same bits, on any process count.
    starts = range(0, len(split), cfg.batch_size)
    for start in processes.share(starts):
        part = slice(start, start + cfg.batch_size)
        images = augment.evaluation(split.between(part.start, part.stop), size)
        with autocast(device, augment.dtype):
            logits[part] = model(images).float()
            if cfg.tta == "flip":
                mirrored = model(images.flip(-1)).float()
                # In logarithms: a class of probability 1e-1000 has one, and no infinity.
                both = logits[part].log_softmax(-1), mirrored.log_softmax(-1)
                logits[part] = torch.logaddexp(*both) - math.log(2)
    model.train(was_training)
    return processes.sum(logits)  # the other processes' rows are exact zeros


def score(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Score logits by counts over all images; float64 scalars, on the host where the device has no float64.

    Args:
        logits: float32 [N, num_classes].
        labels: int64 [N].

    Returns:
        `top1` (fraction), `macro_f1` and `balanced_accuracy` (means of F1 and recall over the classes that have
        images), `top5` (fraction) from 20 classes on, and `loss` (mean cross-entropy, nats, no class weights).
    """
    predictions = logits.argmax(-1)

    def by_class(chosen: Tensor) -> Tensor:
        return in_float64(torch.bincount(chosen, minlength=logits.shape[-1]))

    support, predicted, hits = by_class(labels), by_class(predictions), by_class(labels[predictions == labels])
    present = support > 0  # a class without images has no recall to average
    scores = {
        "top1": in_float64(predictions == labels).mean(),
        "macro_f1": (2 * hits / (support + predicted))[present].mean(),
        "balanced_accuracy": (hits / support)[present].mean(),
    }
    if logits.shape[-1] >= TOP5_FROM:
        scores["top5"] = in_float64((logits.topk(5).indices == labels[:, None]).any(-1)).mean()
    wide = in_float64(logits)
    return scores | {"loss": F.cross_entropy(wide, labels.to(wide.device))}


def validate(
    model: nn.Module, split: Split, augment: Augment, cfg: EvaluationConfig, processes: Processes
) -> dict[str, float]:
    """Evaluate a split as `predict` and `score` do; empty where the split is.

    Returns:
        What `score` does, as numbers; and `size`, in pixels, where that is not the last of training.
    """
    if not len(split):
        return {}
    logits = predict(model, split, augment, cfg, processes)
    other_size = {} if cfg.size in (None, augment.final_size) else {"size": float(cfg.size)}
    numbers = score(logits, split.labels)
    stacked = in_float64(torch.stack(list(numbers.values())))
    processes.broadcast([stacked])  # all have them; a mean of equal numbers would differ in the last bit for three
    return dict(zip(numbers, stacked.tolist(), strict=True)) | other_size
