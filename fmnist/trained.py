"""A trained run as a function of images: what predict, search, monitor and export open."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fmnist.data.augment import Augment
from fmnist.network import Trained, open_trained
from fmnist.runtime.hardware import resolve_precision


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Trained weights, ready for images.

    Attributes:
        trained: the run, its config and its name.
        model: in evaluation mode, on the device.
        augment: resizes and normalises as the run did.
        device: where the model lives.
    """

    trained: Trained
    model: nn.Module
    augment: Augment
    device: torch.device

    @property
    def size(self) -> int:
        """Pixels per side that the model sees."""
        return self.trained.cfg.evaluation.size or self.augment.final_size

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Run the model over images.

        Args:
            images: uint8 [N, H, W], 0 to 255, as Fashion-MNIST: light on black.
            batch_size: images of one forward; none is the run's.

        Returns:
            float32 [N, num_classes] logits and float32 [N, D] penultimate features, what the classifier takes, on
            the CPU.
        """
        logits, features = [], []
        bf16 = resolve_precision(self.trained.cfg.model.precision) == "bf16"
        hook = classifier(self.model).register_forward_pre_hook(lambda _, taken: features.append(taken[0].float()))
        try:
            for part in images.split(batch_size or self.trained.cfg.evaluation.batch_size):
                prepared = self.augment.evaluation(part.to(self.device), self.size)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    logits.append(self.model(prepared).float())
        finally:
            hook.remove()
        empty = torch.zeros(0, self.augment.num_classes)
        if not logits:
            return empty, torch.zeros(0, classifier(self.model).in_features)
        return torch.cat(logits).cpu(), torch.cat(features).cpu()


def classifier(model: nn.Module) -> nn.Linear:
    """Return the layer that makes the logits."""
    get_classifier = getattr(model, "get_classifier", None)  # timm's, whose models call the layer head, fc, ...
    layer: object = get_classifier() if callable(get_classifier) else model.head
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"the classifier of {type(model).__name__} is a {type(layer).__name__}, not a linear layer")
    return layer


def open_predictor(path: Path, device: str | None = None) -> Predictor:
    """Open a run directory or a checkpoint for prediction.

    Args:
        path: what train.py wrote.
        device: as torch names it; none is the accelerator where there is one, else the CPU.

    Raises:
        ValueError: one line, for a path that is neither, weights that do not fit, or a device that is not there.
    """
    trained = open_trained(path)
    try:
        place = torch.device(device) if device else torch.accelerator.current_accelerator(check_available=True)
        place = place or torch.device("cpu")
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device}: {str(error).splitlines()[0]}") from None
    return load_predictor(trained, place)


def load_predictor(trained: Trained, device: torch.device) -> Predictor:
    """Load the weights of a run or checkpoint that is open.

    Raises:
        ValueError: the weights do not fit the config's model, or hold a non-finite value.
    """
    model, augment = trained.load(device)
    return Predictor(trained=trained, model=model, augment=augment, device=device)
