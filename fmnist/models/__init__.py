"""Models by name: our own, one line each in REGISTRY, and every timm classifier."""

import difflib
import inspect
import logging
from collections.abc import Callable, Collection
from typing import Any

import timm
from torch import nn

from fmnist.config.schema import ModelConfig
from fmnist.models.cnn import Cnn
from fmnist.models.hybrid import Hybrid
from fmnist.models.mlp import Mlp
from fmnist.models.pretrained import build_timm
from fmnist.models.stem import Normalization
from fmnist.models.trial import try_model
from fmnist.models.wide_resnet import WideResNet

__all__ = ["REGISTRY", "Normalization", "build_model", "model_names"]

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "cnn": Cnn,
    "hybrid": Hybrid,
    "wide_resnet": WideResNet,
}
RATES = {"drop_rate": "dropout", "drop_path_rate": "stochastic depth"}
# Parameters that build_model passes to a model of the registry; the others are model.options.
GIVEN = {"num_classes", "image_size", "in_channels", *RATES}
logger = logging.getLogger("fmnist")


def model_names() -> list[str]:
    """Return all names that model.name takes: ours, then timm's (each also with the .tag of its weights)."""
    return [*REGISTRY, *timm.list_models()]


def build_model(
    cfg: ModelConfig,
    *,
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image_size: int,
    image_sizes: tuple[int, ...] = (),
    load_weights: bool = True,
) -> tuple[nn.Module, Normalization]:
    """Build a model on the CPU and return it with the normalization of its images.

    Args:
        cfg: name, options and weights.
        num_classes: logits per image.
        mean, std: of the training images per channel (1 or 3), in [0, 1]; pretrained weights bring their own.
        image_size: height and width of the images at the end of training and in evaluation, in pixels.
        image_sizes: other sizes used during training (progressive resolution).
        load_weights: false builds the same structure without reading pretrained weights, for a checkpoint to fill; a
            dropout that the model does not have is then said, for the run was trained without it.

    Returns:
        The model, in training mode, from images [B, C, H, W] to logits [B, num_classes], and its
        normalization, one mean and std per channel C (1 or 3).

    Raises:
        ValueError: one line naming the key: an unknown name or option, a setting without effect, an image size or
            a head that the model cannot be trained or used with, or weights that are missing, damaged or do not fit.
    """
    sizes = list(dict.fromkeys((image_size, *image_sizes)))
    if cfg.name not in REGISTRY:
        if not timm.is_model(cfg.name):
            near = difflib.get_close_matches(cfg.name, model_names(), n=3, cutoff=0.4)
            raise ValueError(f"model.name: unknown model {cfg.name!r}; nearest: {', '.join(near) or 'none'}")
        model, normalization = build_timm(cfg, num_classes, Normalization(mean, std), sizes, load_weights)
        if not any(getattr(module, "drop_prob", 0) for module in model.modules()):  # as with one block: its rate is 0
            _check_unused(cfg, {"drop_path_rate"}, refuse=load_weights)
        return model, normalization

    constructor = REGISTRY[cfg.name]
    parameters = set(inspect.signature(constructor).parameters)
    valid = sorted(parameters - GIVEN)
    if unknown := sorted(set(cfg.options) - set(valid)):
        raise ValueError(f"model.options: {cfg.name} has no {', '.join(unknown)}; valid: {', '.join(valid)}")
    if cfg.has_pretrained_input:
        key = "pretrained" if cfg.pretrained else "weights"
        raise ValueError(
            f"model.{key}: {cfg.name} has no pretrained weights; only timm models have. It can start from a run or a "
            "checkpoint: model.weights DIRECTORY"
        )
    _check_unused(cfg, RATES.keys() - parameters, refuse=load_weights)
    given: dict[str, Any] = {"num_classes": num_classes, "image_size": image_size, "in_channels": len(mean)}
    given |= {key: getattr(cfg, key) for key in RATES}
    given = {key: value for key, value in given.items() if key in parameters}
    try:
        model = constructor(**given, **cfg.options)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"model.options: {cfg.name} cannot be built with {cfg.options}: {error}") from error
    try_model(model, cfg.name, len(mean), sizes)
    return model, Normalization(mean, std)


def _check_unused(cfg: ModelConfig, unused: Collection[str], *, refuse: bool) -> None:
    """Refuse rates that the model has no use for, or say so."""
    for key in RATES.keys() & unused:
        if rate := getattr(cfg, key):
            line = f"model.{key} {rate} has no effect: {cfg.name} has no {RATES[key]}"
            if refuse:
                raise ValueError(f"{line}; valid: 0")
            logger.warning("%s", line)
