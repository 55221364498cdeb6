"""The classifier head of any model: its parameters, and the features it reads.

A model of ours names its last layer `head`, an nn.Linear; that is all. timm's models split their forward instead:
`forward_features`, then `forward_head`, which stops before the classifier if asked for `pre_logits`; their head may be
one linear layer, a convolution, or several layers whose logits are averaged or summed (distilled models, CrossViT).
"""

from typing import Any

from torch import Tensor, nn

TIMM = ("forward_features", "forward_head", "get_classifier", "head_hidden_size")


def is_timm(model: nn.Module) -> bool:
    """Say whether a model splits its forward as timm's do."""
    return all(hasattr(model, name) for name in TIMM)


def lacks_head(model: nn.Module) -> str | None:
    """Return what a model needs to be a classifier here; None where it has it."""
    if is_timm(model) or isinstance(getattr(model, "head", None), nn.Linear):
        return None
    return f"`head`, an nn.Linear that makes the logits, or timm's {', '.join(TIMM)}"


def logits_and_features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model once and return what its classifier returned and what it read.

    Args:
        model: in evaluation mode, not wrapped for distributed training.
        images: float [B, C, H, W], normalized.

    Returns:
        float32 logits [B, num_classes], equal to `model(images)`, and float32 penultimate features [B, D].
    """
    network: Any = model  # timm's methods, which torch's class does not know
    if is_timm(model):
        body = network.forward_features(images)
        logits = network.forward_head(body)
        features = network.forward_head(body, pre_logits=True)  # repeats pooling and norm, nothing expensive
        return logits.float(), features.float()
    read: list[Tensor] = []
    hook = network.head.register_forward_pre_hook(lambda _, operands: read.append(operands[0]))
    try:
        logits = model(images)
    finally:
        hook.remove()
    features = read[-1] if read else logits.new_zeros(len(logits), 0)  # `head` is not used: the trial refuses it
    return logits.float(), features.float()


def feature_width(model: nn.Module) -> int:
    """Return D, the number of penultimate features of an image."""
    network: Any = model
    return network.head_hidden_size if is_timm(model) else network.head.in_features


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the layer or layers that turn features into logits."""
    network: Any = model
    found = network.get_classifier() if is_timm(model) else network.head
    layers = [found] if isinstance(found, nn.Module) else found  # timm returns a tuple for two heads
    return [parameter for layer in layers if layer is not None for parameter in layer.parameters()]
