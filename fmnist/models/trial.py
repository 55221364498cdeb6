"""One image through a new model: a model that could not be trained or used afterwards is refused before training."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fmnist.models.head import feature_width, head_parameters, lacks_head, logits_and_features


def try_model(model: nn.Module, name: str, num_channels: int, sizes: Sequence[int]) -> set[nn.Module]:
    """Run one image of each size through the model, and check its classifier head.

    Args:
        model: left unchanged: parameters, buffers and training mode.
        name: for errors, `model.name`.
        num_channels: channels of the image.
        sizes: heights (and widths) to try, in pixels.

    Returns:
        The leaf modules that read the image itself, unchanged, at every size.

    Raises:
        ValueError: an image size that the model cannot take, a head without logits, parameters or features, or values
            that are not finite.
    """
    if missing := lacks_head(model):
        raise ValueError(f"model.name: {name} needs {missing}")
    infinite = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if infinite:  # no checkpoint could be saved
        raise ValueError(
            f"model.name: {name} cannot be trained: it begins with values that are not finite in {infinite[0]}"
        )
    seen: list[set[nn.Module]] = []
    image = torch.empty(0)
    dtype = next(model.parameters()).dtype

    def note(module: nn.Module, operands: tuple[object, ...]) -> None:
        if operands and isinstance(operands[0], Tensor) and torch.equal(operands[0], image):
            seen[-1].add(module)

    leaves = [m for m in model.modules() if not any(m.children()) and not isinstance(m, nn.Identity)]
    hooks = [leaf.register_forward_pre_hook(note) for leaf in leaves]
    modes = {module: module.training for module in model.modules()}
    model.eval()  # or BatchNorm would count this image
    try:
        for size in sizes:
            # Fixed numbers: drawing them would move the global random state that the run depends on.
            image = torch.linspace(0, 1, num_channels * size * size, dtype=dtype)
            image = image.view(1, num_channels, size, size)
            seen.append(set())
            with torch.no_grad():
                logits = model(image)
    except Exception as error:  # timm's layers raise anything on a map that has become too small
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(f"augment.size: {name} cannot take images of {size} px: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
    try:
        _check_head(model, name, image, logits)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return set.intersection(*seen)


@torch.no_grad()
def layer_inputs(
    model: nn.Module, kind: type[nn.Module], channels: int, sizes: Iterable[int]
) -> list[tuple[nn.Module, Tensor]]:
    """Return the layers of a kind, each with what it reads of one image of each size; nothing runs where there is none.

    Args:
        model: left as it is; all of it in training mode, or in evaluation mode.
        kind: of the layers.
        channels: of its images.
        sizes: of its images, in pixels.
    """
    found: list[tuple[nn.Module, Tensor]] = []
    layers = [layer for layer in model.modules() if isinstance(layer, kind)]
    hooks = [layer.register_forward_pre_hook(lambda layer, x: found.append((layer, x[0]))) for layer in layers]
    training, weight = model.training, next(model.parameters())
    model.eval()  # which keeps BatchNorm's statistics and draws nothing
    try:
        for size in sizes if hooks else ():
            model(torch.zeros(1, channels, size, size, device=weight.device, dtype=weight.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return found


@torch.no_grad()
def _check_head(model: nn.Module, name: str, image: Tensor, logits: object) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model.name: {name} cannot be trained: it returns {found}, not logits [B, num_classes]")
    try:
        again, features = logits_and_features(model, image)
        # Not equality to the bit: a rounding must not refuse a run.
        sound = torch.allclose(again, logits.float(), rtol=1e-3, atol=1e-5, equal_nan=True)
        sound = sound and tuple(features.shape) == (1, feature_width(model)) and len(head_parameters(model)) > 0
    except Exception as error:  # whatever timm's code does with a head that it does not expect
        raise ValueError(f"model.name: {name} cannot be used: its classifier is not found ({error!r})") from error
    if not sound:
        raise ValueError(f"model.name: {name} cannot be used: its features do not lead to its logits")
