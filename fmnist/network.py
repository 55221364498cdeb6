"""A network on the device, with what feeds it."""

from dataclasses import replace

import torch
from torch import nn

from fmnist.config.conflicts import sizes_by_epoch
from fmnist.config.schema import Config
from fmnist.data.augment import Augment
from fmnist.data.info import DataInfo
from fmnist.models import build_model
from fmnist.models.fast_layers import use_fast_layers
from fmnist.models.residual import use_lean_residual
from fmnist.runtime.hardware import resolve_precision


def build_network(
    cfg: Config, info: DataInfo, device: torch.device, *, load_weights: bool
) -> tuple[nn.Module, Augment]:
    """Build the model on the device, and the augmentation that gives it the channels and statistics it expects.

    Args:
        cfg: the run's config.
        info: its data set.
        device: where the parameters live.
        load_weights: read pretrained weights; false where a checkpoint will fill the model.

    Returns:
        The model, in training mode, and the augmentation.

    Raises:
        ValueError: an unknown model, an option or size it does not take, or weights that do not fit.
    """
    by_epoch = sizes_by_epoch(cfg, info.num_train)
    sizes = tuple(by_epoch.values())
    final = cfg.evaluation.size or sizes[-1]
    model, normalization = build_model(
        cfg.model,
        num_classes=len(info.class_names),
        mean=info.mean,
        std=info.std,
        image_size=final,
        image_sizes=sizes,
        load_weights=load_weights,
    )
    memory_format = torch.channels_last if cfg.model.channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=memory_format)
    use_fast_layers(model, cfg.model.depthwise, device)
    bf16 = resolve_precision(cfg.model.precision, device) == "bf16"
    if bf16:  # in float32 it costs 0 to 4 % (experiments/results/depthwise_speed_amd.json)
        use_lean_residual(model)
    augment = Augment(
        replace(cfg.augment, size=by_epoch),
        num_classes=len(info.class_names),
        mean=normalization.mean,
        std=normalization.std,
        fill=info.mean,
        channels_last=cfg.model.channels_last,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        device=device,
    )
    return model, augment
