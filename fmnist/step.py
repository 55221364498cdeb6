"""One optimizer step: the only forward, backward and update in the project. The benchmark times this function."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from fmnist.config.schema import OptimConfig
from fmnist.data.augment import Augment
from fmnist.data.batches import MicroBatch
from fmnist.runtime.gradients import Gradients
from fmnist.runtime.hardware import seed_generators


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    augment: Augment,
    gradients: Gradients,
    cfg: OptimConfig,
    ema: ModelEmaV3 | None = None,
) -> dict[str, Tensor]:
    """Update the weights once from this process's micro-batches; nothing here waits for the device.

    Args:
        model: wrapped, as `Compute.prepare` returned it.
        optimizer: over the same parameters.
        micro_batches: this process's share of the global batch, by reference.
        augment: makes images and targets of one.
        gradients: sums over micro-batches and processes, from `Compute.prepare` too.
        cfg: label smoothing and gradient clipping.
        ema: the weights' moving average, if there is one.

    Returns:
        float32 scalars on the device: `loss`, this process's mean (with `--exact` the global batch's), and
        `grad_norm`, the L2 norm before clipping.
    """
    # forward and backward: gradients add up over the micro-batches
    for batch in gradients.over(model, micro_batches):
        images, targets = augment(batch)  # uint8 on the device -> [B, C, S, S]; int64 [B], or [B, K] where mixed
        seed_generators(batch.seed, images.device)  # dropout depends on the batch, not on what ran before
        loss = mean_loss(model(images), targets, batch, cfg)
        gradients.backward(loss)  # scaled so that the sum is the mean over the global batch
    loss = gradients.total()

    # update: clip, step, and move the average of the weights
    grad_norm = clip(optimizer, cfg.grad_clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ema is not None:
        ema.update(gradients.model, step=batch.step)
    return {"loss": loss, "grad_norm": grad_norm}


def mean_loss(logits: Tensor, targets: Tensor, batch: MicroBatch, cfg: OptimConfig) -> Tensor:
    """Return the micro-batch's mean cross-entropy, nats, float32 [].

    With class weights it is a weighted mean over the *global* batch: the sum over its images and classes of
    weight * target * -log p, divided by the weights of its labels (as they are before mixing). Divided by those of the
    micro-batch alone, as torch does by itself, the loss would depend on how the batch is cut.

    Args:
        logits: float32 [B, K].
        targets: int64 [B], or float32 [B, K] where mixed.
        batch: its class weights.
        cfg: label smoothing.
    """
    if batch.class_weights is None or batch.total_weight is None:
        return F.cross_entropy(logits, targets, label_smoothing=cfg.label_smoothing)
    summed = F.cross_entropy(
        logits, targets, weight=batch.class_weights, label_smoothing=cfg.label_smoothing, reduction="sum"
    )
    return summed / batch.total_weight


def clip(optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """Return the L2 norm of all gradients, float32 [], and scale them down where it exceeds `max_norm`; None: never."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if max_norm is None:  # torch's clipping would multiply all gradients by one
        return get_total_norm([p.grad for p in parameters if p.grad is not None])
    return clip_grad_norm_(parameters, max_norm)
