"""Figures of an evaluation and of a run, as PNG: colour-blind safe, no display needed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Figures use the object API: no pyplot state, no rcParams, no display.
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d
from torch import Tensor

NUM_BINS = 15
# Okabe and Ito, "Color Universal Design" (2008): told apart with any common colour blindness.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
DPI = 150


def write_file(path: Path, content: str | Figure) -> None:
    """Write a text or a PNG under a temporary name, then rename: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, Figure):
            FigureCanvasAgg(content)
            content.savefig(temporary, format="png", dpi=DPI)
        else:
            temporary.write_text(content, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plot_confusion_matrix(
    confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str, path: Path
) -> None:
    """Draw counts and row percentages, with each class's recall on the right.

    Args:
        confusion: [C, C] counts; rows true class, columns predicted.
        class_names: C names, in label order.
        title: Heading.
        path: The PNG to write.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    num_classes, totals = len(class_names), counts.sum(axis=1)
    percent = 100 * counts / np.maximum(totals, 1)[:, None]
    side = float(np.clip(0.9 * num_classes + 2.0, 6.0, 16.0))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    # A square root scale: at 93 % top1 a linear one shows a diagonal and nothing else.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    for (row, column), count in np.ndenumerate(counts):
        red, green, blue, _ = image.to_rgba(percent[row, column])
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        label = f"{count:,}\n{percent[row, column]:.1f} %" if count else "0"
        color = "white" if dark else "black" if count else "#B0B0B0"
        weight = "bold" if row == column else "normal"
        axes.text(column, row, label, ha="center", va="center", color=color, fontsize=10, weight=weight)

    ticks = range(num_classes)
    axes.set_xticks(ticks, class_names, rotation=40, ha="right", rotation_mode="anchor", fontsize=11)
    axes.set_yticks(ticks, class_names, fontsize=11)
    axes.set_xlabel("predicted class", fontsize=12)
    axes.set_ylabel("true class", fontsize=12)
    shares = [f"{100 * hit / n:.1f} %" if n else "-" for hit, n in zip(np.diag(counts), totals, strict=True)]
    right = axes.secondary_yaxis("right")
    right.set_yticks(list(ticks), shares, fontsize=11)
    right.set_ylabel("recall", fontsize=12)
    right.tick_params(length=0)
    axes.set_xticks(np.arange(0.5, num_classes - 1), minor=True)
    axes.set_yticks(np.arange(0.5, num_classes - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.set_title(f"{title}\ntop1 {100 * np.trace(counts) / max(counts.sum(), 1):.2f} %", fontsize=14, pad=12)
    write_file(path, figure)


def reliability_bins(logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Sort images into 15 equal-width bins of confidence.

    Args:
        logits: float32 [N, C], CPU, finite, N >= 1.
        labels: int64 [N], CPU, in 0..C-1.

    Returns:
        For each bin that holds an image its `center`, `count`, `top1` and mean `confidence`.
    """
    probabilities = logits.double().softmax(dim=1)
    predictions = logits.argmax(dim=1)
    confidence = probabilities.gather(1, predictions[:, None])[:, 0].clamp(max=1.0).numpy()
    correct = (predictions == labels).double().numpy()
    edges = np.linspace(0.0, 1.0, NUM_BINS + 1)
    counts = np.histogram(confidence, edges)[0]
    filled = counts > 0
    sums = {
        key: np.histogram(confidence, edges, weights=weights)[0]
        for key, weights in (("top1", correct), ("confidence", confidence))
    }
    means = {key: total[filled] / counts[filled] for key, total in sums.items()}
    return {"center": ((edges[:-1] + edges[1:]) / 2)[filled], "count": counts[filled], **means}


def plot_reliability(logits: Tensor, labels: Tensor, ece: float, title: str, path: Path) -> None:
    """Draw top1 against confidence in 15 bins, and how many images each bin holds.

    Args:
        logits: float32 [N, C], CPU, finite, N >= 1.
        labels: int64 [N], CPU, in 0..C-1.
        ece: the calibration error, for the heading.
        title: Heading.
        path: The PNG to write.
    """
    bins = reliability_bins(logits, labels)
    centers, width, counts = bins["center"], 1.0 / NUM_BINS, bins["count"]
    accuracy, mean_confidence = bins["top1"], bins["confidence"]
    figure = Figure(figsize=(6.4, 7.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.bar(centers, accuracy, width=width, color=BLUE, edgecolor="white", label="top1 in the bin")
    upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfectly calibrated")
    upper.plot(mean_confidence, accuracy, "o", color=ORANGE, label="at the mean confidence")
    upper.set(xlim=(0, 1), ylim=(0, 1.03), ylabel="top1")
    # Outside: low confidences may have bars of any height, so no corner is always free.
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    lower.bar(centers, counts, width=width, color=GREY, edgecolor="white")
    # Most images sit in the last bin; a log scale keeps the thin bins, whose bars are noisy, visible.
    lower.set(yscale="log", ylim=(0.7, 2.0 * counts.max()), xlabel="confidence", ylabel="images")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    figure.suptitle(f"{title}\nexpected calibration error {ece:.4f}", fontsize=13)
    write_file(path, figure)


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read metrics.jsonl: lines by prefix, in step order, one per step."""
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    if not path.is_file():  # it could not be written: a figure without curves must not end a run
        return {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            step, prefix = int(line["step"]), str(line["prefix"])
        except (ValueError, KeyError, TypeError):
            continue  # a killed run leaves half a line, in the middle too once the run has gone on
        # A run that goes on from a checkpoint logs some steps twice: the later line is the one that counts.
        lines.setdefault(prefix, {})[step] = line
    return {prefix: [by_step[step] for step in sorted(by_step)] for prefix, by_step in lines.items()}


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and finite values of one scalar."""
    pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


def draw_loss(axes: Axes, train: Sequence[Mapping[str, Any]], val: Sequence[Mapping[str, Any]]) -> None:
    """Draw training loss, as logged and smoothed, and validation loss."""
    steps, loss = series(train, "loss")
    if len(steps):
        # A centred mean over a fiftieth of the run: unlike an exponential one it does not lag.
        smooth = uniform_filter1d(loss, size=max(1, len(loss) // 50), mode="nearest")
        axes.plot(steps, loss, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color=BLUE, linewidth=1.8, label="train")
    steps, loss = series(val, "loss")
    if len(steps):
        axes.plot(steps, loss, "o-", color=ORANGE, markersize=4, linewidth=1.2, label="val")
    axes.set_ylabel("loss (nats)")
    if axes.get_lines():
        axes.legend()
    else:
        axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axes.transAxes)


def draw_top1(axes: Axes, val: Sequence[Mapping[str, Any]]) -> None:
    """Draw validation top1, of which there must be some, with its best."""
    steps, top1 = series(val, "top1")
    best = int(top1.argmax())
    label = f"best {100 * top1[best]:.2f} % at step {int(steps[best]):,}"
    axes.plot(steps, 100 * top1, "o-", color=ORANGE, markersize=4, linewidth=1.2, label="val")
    axes.plot(steps[best], 100 * top1[best], "*", color=GREEN, markersize=14, label=label)
    axes.set_ylabel("validation top1 (%)")
    axes.legend(loc="lower right")


def plot_learning_curves(metrics_path: Path, path: Path, title: str) -> None:
    """Draw loss, validation top1 and learning rate against the step, from a run's metrics.jsonl.

    Args:
        metrics_path: One JSON object per line with `step`, `epoch`, `prefix` and scalars. Lines that cannot
            be read are passed over; a panel with no data (top1, lr) is left out.
        path: The PNG to write.
        title: Heading.
    """
    lines = read_metrics(metrics_path)
    train, val = lines.get("train", []), lines.get("val", [])
    lr_steps, lr = series(train, "lr")
    has_top1, has_lr = len(series(val, "top1")[0]) > 0, len(lr_steps) > 0
    num_panels = 1 + has_top1 + has_lr
    figure = Figure(figsize=(5.2 * num_panels, 4.4), layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    draw_loss(panels[0], train, val)
    if has_top1:
        draw_top1(panels[1], val)
    if has_lr:
        panels[-1].plot(lr_steps, lr, color=BLUE, linewidth=1.8)
        panels[-1].set_ylabel("learning rate")
        panels[-1].yaxis.set_major_formatter("{x:.3g}")  # an offset text would sit on the epoch axis

    steps, epochs = series(train + val, "epoch")
    steps_per_epoch = steps[epochs.argmax()] / epochs.max() if len(epochs) and epochs.max() > 0 else 0.0
    last_step = max((line["step"] for line in train + val), default=0)
    for axes in panels:
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        if last_step > 0:
            # The same span in every panel: one that starts at the first evaluation would mislead the eye.
            axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
        if steps_per_epoch > 0:
            scale = (lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
            axes.secondary_xaxis("top", functions=scale).set_xlabel("epoch")
    figure.suptitle(title, fontsize=13)
    write_file(path, figure)
