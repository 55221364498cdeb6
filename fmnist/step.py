"""One optimizer step: the only forward, backward and update in the project. The benchmark times this function."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from fmnist.config.schema import OptimConfig
from fmnist.data.augment import Augment
from fmnist.data.batches import MicroBatch, mix_key
from fmnist.optim import trainable
from fmnist.run import Run


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    augment: Augment,
    cfg: OptimConfig,
    run: Run,
    ema: ModelEmaV3 | None = None,
) -> dict[str, Tensor]:
    """Update the weights once from this process's micro-batches; nothing here waits for the device.

    Returns float32 scalars on the device: `loss`, this process's mean, and `grad_norm`, the L2 norm before clipping.
    """
    loss_sum = torch.zeros((), device=run.device)
    for i, batch in enumerate(micro_batches):
        images, targets = augment(batch)
        torch.manual_seed(mix_key(*batch.key))  # dropout and drop path depend on the batch, not on what ran before
        with run.gradient_sync(model, enabled=i + 1 == len(micro_batches)):
            logits = model(images)
            loss = F.cross_entropy(logits, targets, label_smoothing=cfg.label_smoothing)
            run.backward(loss := loss / run.loss_divisor(len(micro_batches)))
        loss_sum += loss.detach()
    loss_sum = run.sum_shards(loss_sum)
    grad_norm = clip_grad_norm_(trainable(optimizer), cfg.grad_clip_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ema is not None:
        ema.update(run.unwrap(model), step=micro_batches[0].key[1])
    return {"loss": loss_sum, "grad_norm": grad_norm}
