"""Learning curves of a run, from its metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import uniform_filter1d

from fmnist.config.schema import Config
from fmnist.report.figures import BLUE, GREEN, ORANGE, Axes, Figure, by_default_style, save_figure
from fmnist.tracking.metrics_file import read_metrics

FEW_POINTS = 10  # up to so many are marked: a line of one point shows nothing


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and finite values of one scalar."""
    pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


def evaluations(metrics_path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl that hold validation numbers, in step order."""
    return read_metrics(metrics_path).get("val", [])


def of_one_start(metrics_path: Path) -> bool:
    """Tell whether the clock that a run's metrics.jsonl holds never goes back: a run that is resumed has a new one."""
    every = [line for lines in read_metrics(metrics_path).values() for line in lines]
    times = sorted((line["step"], line["elapsed_seconds"]) for line in every if "elapsed_seconds" in line)
    return all(earlier <= later for (_, earlier), (_, later) in pairwise(times))


def of_last_size(val: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the validations at the image size of the last one: those at another are not compared with them."""
    return [line for line in val if line.get("size") == val[-1].get("size")]


def marker(steps: np.ndarray) -> str:
    """Return how the points of a line are marked: not at all where they are many."""
    return "o" if len(steps) <= FEW_POINTS else ""


def draw_loss(axes: Axes, train: Sequence[Mapping[str, Any]], val: Sequence[Mapping[str, Any]]) -> None:
    """Draw training loss, as logged and smoothed, and validation loss."""
    steps, loss = series(train, "loss")
    if len(steps):
        # A centred mean over a fiftieth of the run: unlike an exponential one it does not lag.
        smooth = uniform_filter1d(loss, size=max(1, len(loss) // 50), mode="nearest")
        axes.plot(steps, loss, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color=BLUE, linewidth=1.8, marker=marker(steps), markersize=4, label="train")
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
    axes.plot(steps, 100 * top1, "o-", color=ORANGE, markersize=4, linewidth=1.2, label="val")
    steps, top1 = series(of_last_size(val), "top1")
    best = int(top1.argmax())
    label = f"best {100 * top1[best]:.2f} % at step {int(steps[best]):,}"
    axes.plot(steps[best], 100 * top1[best], "*", color=GREEN, markersize=14, label=label)
    axes.set_ylabel("validation top1 (%)")
    axes.legend(loc="lower right")


def draw_lr(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
    """Draw the learning rate as logged."""
    steps, lr = series(train, "lr")
    axes.plot(steps, lr, color=BLUE, linewidth=1.8, marker=marker(steps), markersize=4)
    axes.set_ylabel("learning rate")
    axes.yaxis.set_major_formatter("{x:.3g}")  # an offset text would sit on the epoch axis


def span_steps(panels: Iterable[Axes], lines: Iterable[Mapping[str, Any]]) -> None:
    """Give every panel the whole run as its x axis: one that starts at the first evaluation would mislead the eye."""
    last_step = max((line["step"] for line in lines), default=0)
    for axes in panels:
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if last_step > 0:
            axes.set_xlim(-0.02 * last_step, 1.02 * last_step)


def loss_note(cfg: Config) -> str:
    """Say why the training loss may lie above the validation loss; empty where nothing sets them apart."""
    augment, model, optim = cfg.augment, cfg.model, cfg.optim
    named = {
        "flips": augment.flip or augment.flip_vertical,
        "crops": augment.crop < 1,
        "rotation": augment.rotation,
        "shifts": augment.shift,
        "zoom": augment.scale,
        "changes of colour": augment.brightness or augment.contrast or augment.saturation or augment.hue,
        "TrivialAugment": augment.trivial,
        "erasing": augment.erase,
        "mixup": augment.mixup_alpha,
        "CutMix": augment.cutmix_alpha,
        "dropout": model.drop_rate,
        "drop path": model.drop_path_rate,
        "label smoothing": optim.label_smoothing,
        "class weights": optim.class_weights != "none",
        "classes drawn equally": cfg.data.sampling == "balanced",
    }
    parts = [name for name, value in named.items() if value]
    if optim.ema_decay:
        parts.append("the weights before their average")
    return f"train loss: with {', '.join(parts)}; val loss: without" if parts else ""


@by_default_style
def plot_learning_curves(metrics_path: Path, path: Path, title: str, note: str = "") -> None:
    """Draw loss, validation top1 and learning rate against the step, from a run's metrics.jsonl.

    Args:
        metrics_path: One JSON object per line with `step`, `epoch`, `prefix` and scalars. Lines that cannot
            be read are skipped; a panel with no data (top1, lr) is left out.
        path: The PNG to write.
        title: Heading.
        note: A line below the panels; `loss_note` makes it.
    """
    lines = read_metrics(metrics_path)
    train, val = lines.get("train", []), lines.get("val", [])
    has_top1, has_lr = len(series(val, "top1")[0]) > 0, len(series(train, "lr")[0]) > 0
    num_panels = 1 + has_top1 + has_lr
    figure = Figure(figsize=(5.2 * num_panels, 4.4), layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    draw_loss(panels[0], train, val)
    if has_top1:
        draw_top1(panels[1], val)
    if has_lr:
        draw_lr(panels[-1], train)

    steps, epochs = series(train + val, "epoch")
    steps_per_epoch = steps[epochs.argmax()] / epochs.max() if len(epochs) and epochs.max() > 0 else 0.0
    span_steps(panels, train + val)
    for axes in panels:
        axes.grid(alpha=0.25)
        if steps_per_epoch > 0:
            scale = (lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
            axes.secondary_xaxis("top", functions=scale).set_xlabel("epoch")
    figure.suptitle(title, fontsize=13, parse_math=False)
    if note:
        figure.supxlabel(note, fontsize=9, color="#52606d", parse_math=False)
    save_figure(path, figure)
