"""Temperature scaling: one number, fitted on validation images, that makes confidences mean what they say."""

import math
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from fmnist.evaluation.numbers import calibration_error
from fmnist.runtime.console import counted
from fmnist.trained import HIGHEST, LOWEST

# A temperature's standard error is its share c / sqrt(N), c being 1.3 to 1.5 for our models on Fashion-MNIST (from the
# Fisher information, and seen): about 10 % with 200 images. Of 60 random parts of 5,000, with 200 images none made the
# ECE of the test images worse than no scaling, with 100 one in 15 to 20, with 8 three in four. Below, none is applied.
ENOUGH_IMAGES = 200


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the temperature T for which the mean cross-entropy of logits / T is least.

    Args:
        logits: float [N, C], CPU, finite, N >= 1.
        labels: int64 [N], CPU.

    Returns:
        T in 0.05 to 20; above 1 where the model is too sure of itself.

    Source:
        Guo et al. 2017, On Calibration of Modern Neural Networks.
    """
    wide = logits.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(wide / math.exp(log_temperature), labels))

    # Convex in 1 / T, so with a single minimum in log T, where equal steps are equal ratios.
    bounds = math.log(LOWEST), math.log(HIGHEST)
    return math.exp(float(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))


def few_images(num_images: int) -> str:
    """Return the line that says why so few validation images give no temperature; empty where enough."""
    if num_images >= ENOUGH_IMAGES:
        return ""
    worse = f"with fewer than {ENOUGH_IMAGES} a temperature may make them worse"
    return f"confidences are not calibrated on {counted(num_images, 'validation image')}: {worse}"


def usable_temperature(logits: Tensor, labels: Tensor) -> tuple[float, str]:
    """Fit a temperature on validation images; return it, or 1 and the line that says why it stays 1.

    Args:
        logits, labels: see `fit_temperature`.
    """
    if few := few_images(len(labels)):
        return 1.0, few
    temperature, wide = fit_temperature(logits, labels), logits.double()
    for bound in (LOWEST, HIGHEST):
        # No worse at the bound: the least loss lies there or beyond. Where all are right it may round to 0 before.
        if F.cross_entropy(wide / bound, labels) <= F.cross_entropy(wide / temperature, labels):
            return 1.0, f"confidences are not calibrated: the temperature ends at {bound:g}, a limit of its search"
    return temperature, ""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a temperature does to an evaluation.

    Attributes:
        temperature: fitted on validation images; 1 where that is no use.
        why_not: the line that says why; empty where it was fitted.
        num_images: how many validation images there are.
        same_images: they are also those that are evaluated, so that ece_after is too good.
        ece_before, ece_after: top-label calibration error in 15 bins.
        loss_before, loss_after: mean cross-entropy in nats.
    """

    temperature: float
    why_not: str
    num_images: int
    same_images: bool
    ece_before: float
    ece_after: float
    loss_before: float
    loss_after: float


def calibrate(logits: Tensor, labels: Tensor, validation: tuple[Tensor, Tensor], *, same_images: bool) -> Calibration:
    """Fit a temperature on validation images and say what it does to others.

    Args:
        logits: float32 [N, C], CPU, of the images that are evaluated.
        labels: int64 [N], CPU.
        validation: logits and labels of the validation images.
        same_images: both are the same images.
    """
    temperature, why_not = usable_temperature(*validation)
    pairs = [logits.double(), logits.double() / temperature]
    ece = [calibration_error(pair.softmax(dim=1), labels) for pair in pairs]
    loss = [float(F.cross_entropy(pair, labels)) for pair in pairs]
    return Calibration(
        temperature=temperature,
        why_not=why_not,
        num_images=len(validation[1]),
        same_images=same_images,
        ece_before=ece[0],
        ece_after=ece[1],
        loss_before=loss[0],
        loss_after=loss[1],
    )


def average_probabilities(logits: list[Tensor]) -> Tensor:
    """Average the probabilities of several models; return their logarithm, which softmax turns back into them.

    Args:
        logits: float32 [N, C] each.
    """
    stacked = torch.stack([part.double().log_softmax(dim=1) for part in logits])
    return (stacked.logsumexp(dim=0) - math.log(len(logits))).float()
