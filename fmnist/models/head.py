"""The classifier head of any model, ours or timm's: its parameters, and the features it reads.

All models split their forward as timm's do: `forward_features`, then `forward_head`, which stops before the
classifier if asked for `pre_logits`. A head may be one linear layer, a convolution, or several layers whose logits
are averaged or summed (distilled models, CrossViT).
"""

from typing import Any

from torch import Tensor, nn


def logits_and_features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model once and return what its classifier returned and what it read.

    Args:
        model: in evaluation mode, not wrapped for distributed training.
        images: float [B, C, H, W], normalized.

    Returns:
        float32 logits [B, num_classes], equal to `model(images)`, and float32 penultimate features [B, D].
    """
    network: Any = model  # timm's methods, which torch's class does not know
    body = network.forward_features(images)
    logits = network.forward_head(body)
    features = network.forward_head(body, pre_logits=True)  # repeats pooling and norm, nothing expensive
    return logits.float(), features.float()


def feature_width(model: nn.Module) -> int:
    """Return D, the number of penultimate features of an image."""
    network: Any = model
    return network.head_hidden_size


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the layer or layers that turn features into logits."""
    network: Any = model
    found = network.get_classifier()
    layers = [found] if isinstance(found, nn.Module) else found  # timm returns a tuple for two heads
    return [parameter for layer in layers if layer is not None for parameter in layer.parameters()]
