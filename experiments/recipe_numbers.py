"""The numbers behind docs/recipes.md, from the JSON results of the queue: what is not measured is left out."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from experiments.queue_entries import Entry
from experiments.queue_results import numbers, read_results

# Model -> entry of its final runs.
FINAL = {
    "MLP by AdamW": "final_mlp",
    "MLP": "mlp_muon",
    "CNN, 11 epochs": "cnn_11_epochs",
    "CNN (the default)": "cnn_10_epochs",
    "small ConvNeXt by AdamW": "final_convnext",
    "small ConvNeXt": "convnext_muon",
    "ViT": "final_vit",
    "hybrid": "final_hybrid",
    "CNN, long": "final_cnn_long",
    "EfficientNet-Lite0, ImageNet weights": "final_lite0",
    "EfficientNet-Lite0, ImageNet weights, to 224 px": "final_lite0_224px",
}
# Recipes that others took the place of; the figures leave them out. Two were timed on another processor.
REPLACED = ("MLP by AdamW", "CNN, 11 epochs", "small ConvNeXt by AdamW")
AMOUNTS = (100, 1_000, 5_000, 20_000)  # training images, of ten classes
ALL_IMAGES = 55_000
# Model -> group of its amounts, and the entry of all images; None where there is no such run.
AMOUNT: dict[str, tuple[str, str | None]] = {
    "MLP by AdamW": ("amount_mlp", "final_mlp"),
    "CNN": ("amount_cnn", "cnn_10_epochs"),
    "small ConvNeXt": ("amount_convnext", "convnext_muon"),
    "small ConvNeXt, from its own pretraining": ("amount_convnext_rotations", None),
    "EfficientNet-Lite0, ImageNet weights": ("amount_lite0_pretrained", "final_lite0"),
    "EfficientNet-Lite0, from scratch": ("amount_lite0_scratch", "final_lite0_scratch"),
}
ABLATED = {"CNN": "ablation_cnn", "small ConvNeXt": "ablation_convnext"}


@dataclass(frozen=True)
class Queued:
    """The entries of a queue and the folder of its results."""

    entries: Sequence[Entry]
    results: Path

    def of(self, name: str) -> list[dict[str, Any]]:
        """Return the results of an entry that are there."""
        return [result for entry in self.entries if entry.name == name for result in read_results(entry, self.results)]

    def members(self, group: str) -> list[Entry]:
        """Return the entries of a group, those of its grids too."""
        return [entry for entry in self.entries if entry.group == group]


@dataclass(frozen=True)
class Effect:
    """What one thing changes, in points of validation top1; `half` of its 95 % interval, None with one seed alone."""

    points: float
    half: float | None
    seeds: int


def effects(queued: Queued, group: str, taken: bool) -> dict[str, Effect]:
    """Return the effect of having each factor, by label: variants against `none` of their group, last epoch.

    The spread of the seeds is pooled over the group, which has as many of each variant; its interval is Student's. It
    says what other seeds may give, not what other images would.

    Args:
        queued: the queue.
        group: its variants, with `none`.
        taken: the variants lack their factor, and `none` of them lacks anything.
    """
    top1 = {
        entry.label: [100 * result["val"][-1]["top1"] for result in queued.of(entry.name)]
        for entry in queued.members(group)
    }
    degrees = sum(len(values) - 1 for values in top1.values() if values)
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in top1.values() if len(values) > 1)
    base, found = top1.get("none", []), {}
    for label, values in top1.items():
        if label != "none" and values and base:
            half = None
            if degrees:
                error = (squares / degrees * (1 / len(values) + 1 / len(base))) ** 0.5
                half = float(student.ppf(0.975, degrees)) * error
            points = statistics.mean(values) - statistics.mean(base)
            found[label] = Effect(-points if taken else points, half, min(len(values), len(base)))
    return found


@dataclass(frozen=True)
class Accuracy:
    """Test top1 in percent: the mean over seeds, and the ends of what the 95 % intervals of all of them hold."""

    mean: float
    low: float
    high: float
    top1: list[float]
    lr: float


def accuracy(found: list[dict[str, Any]]) -> Accuracy | None:
    """Return the accuracy of the seeds of one recipe; None without a result."""
    if not (top1 := [100 * value for value in numbers(found, "test.top1")]):
        return None
    lows, highs = zip(*(result["test.top1_interval"] for result in found), strict=True)
    lr = found[0].get("options", {}).get("optim.lr", 0.001)  # the default is not among the options of a result
    return Accuracy(statistics.mean(top1), 100 * min(lows), 100 * max(highs), top1, lr)


def amounts(queued: Queued, model: str) -> dict[int, Accuracy]:
    """Return the test accuracy of a model by images a class."""
    group, whole = AMOUNT[model]
    found = {amount // 10: accuracy(queued.of(f"{group}_{amount}")) for amount in AMOUNTS}
    if whole:
        found[ALL_IMAGES // 10] = accuracy(queued.of(whole))
    return {amount: value for amount, value in found.items() if value is not None}


@dataclass(frozen=True)
class Curve:
    """Validation top1 in percent by epoch, over seeds; minutes None where the processor time of no seed is known."""

    epochs: list[float]
    minutes: list[float] | None
    mean: list[float]
    low: list[float]
    high: list[float]


def learning_curve(found: list[dict[str, Any]]) -> Curve | None:
    """Return the learning curve of the seeds of one recipe that have the first one's epochs; None without a result.

    The processor time of a whole run is shared out by the seconds an epoch takes at each image size, the median of all
    epochs and seeds: other programs may have held one up. Without these, in the oldest results, sizes are taken as one.
    """
    if not found:
        return None
    epochs = [point["epoch"] for point in found[0]["val"]]
    found = [result for result in found if [point["epoch"] for point in result["val"]] == epochs]
    top1 = 100 * np.array([[point["top1"] for point in result["val"]] for result in found])
    minutes = None
    if (whole := cost(found)) is not None:
        share = np.cumsum(epoch_seconds(found) * np.diff(epochs, prepend=0))
        minutes = list(whole * share / share[-1])
    return Curve(
        epochs=epochs,
        minutes=minutes,
        mean=list(top1.mean(0)),
        low=list(top1.min(0)),
        high=list(top1.max(0)),
    )


def epoch_seconds(found: list[dict[str, Any]]) -> np.ndarray:
    """Return the seconds that an epoch took at the image size of each validation [V]; ones where no result has any."""
    timed = [result["val"] for result in found if all("seconds" in point for point in result["val"])]
    lengths = np.diff([point["epoch"] for point in found[0]["val"]], prepend=0)
    starts = np.cumsum(lengths) - lengths
    sizes = found[0]["options"].get("augment.size")  # of a run that grows: the size from each epoch on
    firsts = sorted(map(int, sizes)) if isinstance(sizes, dict) else [0]
    phase = np.searchsorted(firsts, starts + 1e-6, side="right")
    seconds = np.ones(len(lengths))
    if timed:
        spent = np.array([np.diff([point["seconds"] for point in val], prepend=0) / lengths for val in timed])
        for each in np.unique(phase):
            seconds[phase == each] = np.median(spent[:, phase == each])
    return seconds


def drawn_models() -> list[str]:
    """Return the models of the figures that compare them."""
    return [model for model in FINAL if model not in REPLACED]


def cost(found: list[dict[str, Any]]) -> float | None:
    """Return the processor minutes of a whole run, the mean of the seeds where it is known."""
    seconds = numbers(found, "cpu_seconds")
    return statistics.mean(seconds) / 60 if seconds else None


def timed(queued: Queued) -> dict[str, tuple[float, Accuracy]]:
    """Return processor minutes and accuracy of the recipes of which both are known."""
    found = {model: (cost(queued.of(FINAL[model])), accuracy(queued.of(FINAL[model]))) for model in drawn_models()}
    return {model: (minutes, top1) for model, (minutes, top1) in found.items() if minutes and top1}
