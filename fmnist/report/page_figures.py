"""Figures and pictures of report.html as data URIs: SVG for curves, PNG for images."""

import base64
import io
from pathlib import Path

from PIL import Image
from torch import Tensor

from fmnist.evaluation.misclassified import channels_last
from fmnist.evaluation.numbers import NUM_BINS, ReliabilityBins
from fmnist.evaluation.risk_coverage import RiskCoverage
from fmnist.report.curves import draw_loss, draw_lr, draw_top1, series, span_steps
from fmnist.report.figures import BLUE, ORANGE, PERCENT, Axes, Figure, by_default_style
from fmnist.tracking.metrics_file import read_metrics

INK, MUTED, RULE = "#1f2933", "#52606d", "#d9dee4"
SMALL_SIDE = 32  # pixels of a picture that may be kept without loss
LARGEST_SIDE = 128  # pixels: twice as many as it is shown with on a screen of many pixels
SIZE = (4.3, 3.1)  # inches: on a phone about as wide as the screen, so that its 9 point text stays readable


def data_uri(content: bytes, media_type: str) -> str:
    """Return bytes as a URI that needs no network."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def picture(image: Tensor) -> str:
    """Return a uint8 [H, W] or [3, H, W] image as the URI of a PNG of at most LARGEST_SIDE pixels a side."""
    buffer = io.BytesIO()
    drawn = Image.fromarray(channels_last(image))
    drawn.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    drawn.save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")


def sheet(images: Tensor, side: int = 64, lossless: bool = True) -> tuple[str, tuple[int, int]]:
    """Put small pictures one below another, in one image: a page of hundreds of cells then stays small.

    Args:
        images: uint8 [N, H, W] or [N, 3, H, W], N >= 1.
        side: pixels at most of a picture.
        lossless: PNG where they have up to SMALL_SIDE pixels; others are JPEG.

    Returns:
        The URI of the PNG or JPEG, and width and height of one picture in it, pixels.
    """
    drawn = [Image.fromarray(channels_last(image)) for image in images]
    for each in drawn:
        each.thumbnail((side, side), Image.Resampling.LANCZOS)
    width, height = drawn[0].size
    whole, buffer = Image.new(drawn[0].mode, (width, height * len(drawn))), io.BytesIO()
    for place, each in enumerate(drawn):
        whole.paste(each, (0, place * height))
    kind = "png" if lossless and max(width, height) <= SMALL_SIDE else "jpeg"
    whole.save(buffer, format=kind, **({"optimize": True} if kind == "png" else {"quality": 80, "subsampling": 0}))
    return data_uri(buffer.getvalue(), f"image/{kind}"), (width, height)


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, axes: Axes) -> str:
    """Give a panel the page's ink and quiet lines, and return it as a URI."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=MUTED)
    axes.tick_params("x", pad=7)  # below the lowest label of the y axis, which is next to it where both begin at 0
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=MUTED, fontsize=9)
    if legend := axes.get_legend():
        legend.set_frame_on(False)
        for text in legend.get_texts():
            text.set(fontsize=9, color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")


@by_default_style
def learning_curves(metrics_path: Path) -> list[tuple[str, str]]:
    """Draw loss, validation top1 and learning rate, each on its own.

    Args:
        metrics_path: a run's metrics.jsonl.

    Returns:
        What each panel shows, in words, and its URI; panels without data are left out.
    """
    lines = read_metrics(metrics_path)
    train, val = lines.get("train", []), lines.get("val", [])
    panels = []
    if train or val:
        figure, axes = _panel()
        draw_loss(axes, train, val)
        panels.append(("Loss by step", figure, axes))
    if len(series(val, "top1")[0]):
        figure, axes = _panel()
        draw_top1(axes, val)
        panels.append(("Validation accuracy by step", figure, axes))
    if len(series(train, "lr")[0]):
        figure, axes = _panel()
        draw_lr(axes, train)
        panels.append(("Learning rate by step", figure, axes))
    span_steps((axes for _, _, axes in panels), train + val)
    for _, _, axes in panels:
        axes.locator_params(axis="x", nbins=5, integer=True)
    return [(words, _svg(figure, axes)) for words, figure, axes in panels]


@by_default_style
def reliability(bins: ReliabilityBins) -> str:
    """Draw top1 against confidence; a bin is the darker the more images it holds; return the figure's URI."""
    figure, axes = _panel()
    share = bins.count / bins.count.max()
    bars = axes.bar(bins.center, bins.top1, width=0.92 / NUM_BINS, color=BLUE)
    for bar, part in zip(bars, share, strict=True):
        bar.set_alpha(0.25 + 0.75 * float(part) ** 0.33)
    axes.plot([0, 1], [0, 1], color=INK, linestyle=(0, (4, 3)), linewidth=1)
    axes.plot(bins.confidence, bins.top1, "o", color=ORANGE, markersize=4)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    return _svg(figure, axes)


@by_default_style
def risk_against_coverage(curve: RiskCoverage) -> str:
    """Draw the share of errors against the share of images answered, with its interval; return the figure's URI."""
    figure, axes = _panel()
    coverage, risk, low, high = (100 * each for each in (curve.coverage, curve.risk, curve.low, curve.high))
    axes.fill_between(coverage, low, high, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(coverage, risk, color=BLUE, linewidth=1.8)
    # The interval of the first few answers reaches far up; the curve is what is looked for.
    top = min(102.0, max(0.5, 1.3 * float(high[len(high) // 10 :].max())))
    axes.set(xlim=(0, 100), ylim=(0, top))
    axes.set(xlabel="images answered", ylabel="errors among them")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PERCENT)
    return _svg(figure, axes)
