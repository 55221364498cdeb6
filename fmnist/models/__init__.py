"""Models by name: our own, one line each in REGISTRY, and every classifier of timm."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from fmnist.models.cnn import Cnn
from fmnist.models.hybrid import Hybrid
from fmnist.models.mlp import Mlp
from fmnist.models.pretrained import build_timm
from fmnist.models.stem import FASHION_MNIST, Normalization, modules_that_see_the_image

__all__ = ["REGISTRY", "Normalization", "build_model", "model_names"]

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "cnn": Cnn,
    "hybrid": Hybrid,
}
# What build_model itself gives to a model of the registry; the other parameters are model.options.
GIVEN = {"num_classes", "drop_rate", "image_size"}


def model_names() -> list[str]:
    """Return all names that model.name takes: ours, then timm's (each also with a .tag of its weights)."""
    return [*REGISTRY, *timm.list_models()]


def build_model(
    cfg: Any,
    *,
    num_classes: int,
    image_size: int,
    image_sizes: tuple[int, ...] = (),
    load_weights: bool = True,
) -> tuple[nn.Module, Normalization]:
    """Build the model of a config, on the CPU, and say how its images are to be normalised.

    Args:
        cfg: a ModelConfig.
        num_classes: logits per image.
        image_size: height and width of the images at the end of training and in evaluation, in pixels.
        image_sizes: further sizes that training passes through (progressive resolution).
        load_weights: false builds the same structure without any pretrained file, for a checkpoint to fill.

    Returns:
        The model, in training mode, from images [B, C, H, W] to logits [B, num_classes], and its
        normalization, one mean and std per channel C (1 or 3).

    Raises:
        ValueError: one line naming the key: an unknown name or option, a setting without effect, an image
            size the model cannot take, or weights that are missing, damaged or do not fit.
    """
    sizes = list(dict.fromkeys((image_size, *image_sizes)))
    if cfg.name not in REGISTRY:
        if not timm.is_model(cfg.name):
            near = difflib.get_close_matches(cfg.name, model_names(), n=3, cutoff=0.4)
            raise ValueError(f"model.name: unknown model {cfg.name!r}; nearest: {', '.join(near) or 'none'}")
        return build_timm(cfg, num_classes, sizes, load_weights)

    constructor = REGISTRY[cfg.name]
    parameters = set(inspect.signature(constructor).parameters)
    legal = sorted(parameters - GIVEN)
    if unknown := sorted(set(cfg.options) - set(legal)):
        raise ValueError(f"model.options: {cfg.name} has no {', '.join(unknown)}; legal: {', '.join(legal)}")
    if cfg.pretrained or cfg.weights:
        key = "weights" if cfg.weights else "pretrained"
        raise ValueError(f"model.{key}: {cfg.name} has no pretrained weights; only timm models do")
    if cfg.drop_path_rate > 0:
        raise ValueError(f"model.drop_path_rate: {cfg.name} takes none; leave it at 0")
    given = {"num_classes": num_classes, "drop_rate": cfg.drop_rate, "image_size": image_size}
    given = {key: value for key, value in given.items() if key in parameters}
    try:
        model = constructor(**given, **cfg.options)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"model.options: {cfg.name} refuses {cfg.options}: {error}") from error
    modules_that_see_the_image(model, 1, sizes)  # an image size it cannot take is an error now, not later
    return model, FASHION_MNIST
