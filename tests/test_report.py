"""The numbers, tables and figures of an evaluation."""

import csv
import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
)
from torch import Tensor

from fmnist.config.schema import AugmentConfig, Config, ModelConfig, OptimConfig
from fmnist.data.fashion_mnist import CLASS_NAMES
from fmnist.evaluation.findings import Findings, findings
from fmnist.evaluation.numbers import summarize
from fmnist.evaluation.outcome import Outcome
from fmnist.report.curves import draw_top1, loss_note, of_last_size, plot_learning_curves, series
from fmnist.report.figures import Figure, plot_confusion_matrix
from fmnist.report.page_figures import learning_curves
from fmnist.report.write import class_table, write_evaluation
from fmnist.tracking.metrics_file import read_metrics

NAMES = list(CLASS_NAMES)
TINY_NAMES = ["a", "b", "c"]
# Logits are logarithms, so softmax gives back exactly these probabilities.
TINY_PROBABILITIES = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.75, 0.125], [0.125, 0.125, 0.75]]
TINY_LABELS = torch.tensor([0, 0, 1, 2])


def tiny_logits() -> Tensor:
    return torch.tensor(TINY_PROBABILITIES).log()


def random_evaluation(num_images: int = 2000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(10, (num_images,), generator=generator)
    logits = torch.randn(num_images, 10, generator=generator)
    logits[torch.arange(num_images), labels] += 2.0
    return logits, labels


def write(directory: Path, logits: Tensor, labels: Tensor) -> Findings:
    """Write an evaluation of images that nobody looks at."""
    outcome = Outcome(
        name="cnn", model="cnn", directory=directory, split="test", tta="none", labels=labels, logits=logits,
        images=torch.zeros(len(labels), 28, 28, dtype=torch.uint8), class_names=tuple(NAMES),
    )  # fmt: skip
    found = findings(outcome, quick=True)
    write_evaluation(found)
    return found


def check_png(path: Path, min_width: int, min_height: int) -> tuple[int, int]:
    """A real PNG, of a sensible size, with something drawn on it; gives back (width, height)."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert min_width <= width <= 4000 and min_height <= height <= 4000
    assert pixels[..., :3].std() > 0.02
    return width, height


def test_tiny_case_by_hand() -> None:
    summary = summarize(tiny_logits(), TINY_LABELS, TINY_NAMES)
    # Predictions a, b, b, c against labels a, a, b, c: 3 of 4.
    assert summary["top1"] == 0.75
    assert summary["num_images"] == 4
    assert summary["confusion_matrix"] == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    # -(ln 1/2 + ln 1/4 + ln 3/4 + ln 3/4) / 4 = (ln 2 + 2 ln 2 + 2 ln 4/3) / 4
    assert summary["loss"] == pytest.approx((3 * math.log(2) + 2 * math.log(4 / 3)) / 4, abs=1e-7)
    # a: predicted once, rightly (1/1), found 1 of 2: f1 = 2 * 1 * 0.5 / 1.5 = 2/3.  b: 1 of 2 predicted, 1 of 1 found.
    per_class = summary["per_class"]
    assert per_class["a"] == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2})
    assert per_class["b"] == pytest.approx({"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1})
    assert per_class["c"] == pytest.approx({"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1})
    # Bin [7/15, 8/15) holds two images of confidence 0.5, one right: gap 0.
    # Bin [11/15, 12/15) holds two of confidence 0.75, both right: gap 0.25, weight 2/4.
    assert summary["ece"] == pytest.approx(0.5 * 0.25, abs=1e-6)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_wilson_interval_by_formula() -> None:
    low, high = summarize(tiny_logits(), TINY_LABELS, TINY_NAMES)["top1_interval"]
    # n = 4, p = 0.75, z = 1.959964, z^2 = 3.841459:
    # center = (p + z^2 / 2n) / (1 + z^2 / n) = (0.75 + 0.480182) / 1.960365 = 0.627527
    # half = z sqrt(p (1 - p) / n + z^2 / 4n^2) / 1.960365
    #      = 1.959964 * sqrt(0.046875 + 0.060023) / 1.960365 = 0.326885
    assert low == pytest.approx(0.627527 - 0.326885, abs=2e-6)
    assert high == pytest.approx(0.627527 + 0.326885, abs=2e-6)


def test_agrees_with_scikit_learn() -> None:
    logits, labels = random_evaluation()
    summary = summarize(logits, labels, NAMES)
    predictions = logits.argmax(dim=1)
    assert summary["confusion_matrix"] == confusion_matrix(labels, predictions).tolist()
    assert summary["top1"] == accuracy_score(labels, predictions)
    assert summary["loss"] == pytest.approx(log_loss(labels, logits.double().softmax(dim=1)), rel=1e-9)
    expected = precision_recall_fscore_support(labels, predictions)
    for row, key in zip(expected, ("precision", "recall", "f1", "support"), strict=True):
        assert [figures[key] for figures in summary["per_class"].values()] == row.tolist()


def test_a_class_without_images_keeps_its_row() -> None:
    summary = summarize(tiny_logits()[:1], TINY_LABELS[:1], TINY_NAMES)
    assert summary["confusion_matrix"] == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert summary["per_class"]["c"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    # One class has images, and its one image is found: the means are those of this class, not of all three.
    assert summary["macro_avg"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "num_classes": 1}


def test_the_table_is_that_of_scikit_learn() -> None:
    logits, labels = random_evaluation()
    expected = classification_report(labels, logits.argmax(dim=1), target_names=list(NAMES), digits=4)
    assert class_table(summarize(logits, labels, NAMES)) == expected


@pytest.mark.parametrize(("num_correct", "expected"), [(8, 0.0), (10, 0.2), (0, 0.8)])
def test_ece_of_one_confidence(num_correct: int, expected: float) -> None:
    # Ten images, each predicted as class 0 with confidence 0.8: the error is |num_correct / 10 - 0.8|.
    logits = torch.tensor([[0.8, 0.2]]).log().expand(10, 2)
    labels = (torch.arange(10) >= num_correct).long()
    assert summarize(logits, labels, ["a", "b"])["ece"] == pytest.approx(expected, abs=1e-6)


def test_ece_shares_the_last_bin_with_confidence_one() -> None:
    # Image 1: confidence 1, wrong. Image 2: confidence 0.95, right. Both in bin [14/15, 1]:
    # |0.5 - 0.975| = 0.475. With a bin of its own for 1: 0.5 * 1 + 0.5 * 0.05 = 0.525.
    logits = torch.tensor([[200.0, 0.0], [math.log(0.95), math.log(0.05)]])
    ece = summarize(logits, torch.tensor([1, 0]), ["a", "b"])["ece"]
    assert ece == pytest.approx(0.475, abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "names", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), TINY_NAMES, r"labels must lie in 0\.\.2, got 0\.\.3"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), TINY_NAMES, r"logits must be \[2, 3\].*got \[2, 4\]"),
        (torch.zeros(0, 3), torch.zeros(0).long(), TINY_NAMES, "at least one image"),
        (torch.full((1, 3), math.nan), torch.tensor([0]), TINY_NAMES, "finite, got 3"),
        (torch.zeros(1, 3), torch.tensor([0]), ["a", "b", "a"], "class_names must differ"),
    ],
)
def test_mistakes_are_named(logits: Tensor, labels: Tensor, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarize(logits, labels, names)


def test_write_evaluation(tmp_path: Path) -> None:
    logits, labels = random_evaluation(500)
    directory = tmp_path / "evaluation" / "test"
    summary = write(directory, logits, labels).metrics
    # Five files, and no temporary one left behind.
    files = {"metrics.json", "report.txt", "predictions.csv", "confusion_matrix.png", "reliability.png"}
    assert {path.name for path in directory.iterdir()} == files
    assert json.loads((directory / "metrics.json").read_text()) == summary

    text = (directory / "report.txt").read_text()
    low, high = summary["top1_interval"]
    assert text.startswith(
        f"cnn: test images: top1 {100 * summary['top1']:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f}), "
        f"loss {summary['loss']:.4f}, ECE {summary['ece']:.4f}, 500 images\n"
        f"macro F1 {100 * summary['macro_f1']:.2f} %, balanced accuracy {100 * summary['balanced_accuracy']:.2f} %\n"
    )
    assert all(name in text for name in NAMES) and "macro avg" in text

    width, height = check_png(directory / "confusion_matrix.png", 1200, 1200)
    assert width == height
    check_png(directory / "reliability.png", 800, 800)


def test_a_confusion_matrix_of_a_thousand_classes_shows_the_worst(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1000, (3000,), generator=generator)
    logits = torch.randn(3000, 1000, generator=generator)
    logits[torch.arange(3000), labels] += 4
    names = [f"class {i}" for i in range(1000)]
    summary = summarize(logits, labels, names)
    confusion = np.asarray(summary["confusion_matrix"])
    assert confusion.shape == (1000, 1000) and confusion.sum() == 3000
    assert summary["top5"] > summary["top1"] > 0.5
    drawn: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmnist.report.figures.Axes.text", lambda *a, **k: drawn.append(a))
        plot_confusion_matrix(summary["confusion_matrix"], names, "many", tmp_path / "many.png")
    assert len(drawn) == 20 * 21  # the 20 worst classes, and a column for all others: a million numbers take hours
    check_png(tmp_path / "many.png", 1200, 1200)


def test_predictions_round_trip(tmp_path: Path) -> None:
    logits, labels = random_evaluation(200)
    write(tmp_path, logits, labels)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["index", "label", "prediction", "confidence", *(f"p_{name}" for name in NAMES)]
    table = np.asarray(rows, dtype=np.float64)
    probabilities = logits.double().softmax(dim=1).numpy()
    assert table[:, 0].tolist() == list(range(200))
    assert table[:, 1].tolist() == labels.tolist()
    assert table[:, 2].tolist() == logits.argmax(dim=1).tolist()
    assert table[:, 3].tolist() == table[:, 4:].max(axis=1).tolist()
    np.testing.assert_array_equal(table[:, 4:].astype(np.float32), probabilities.astype(np.float32))


def metrics_lines(with_val: bool) -> list[str]:
    lines = []
    for step in range(10, 401, 10):
        scalars = {"loss": 2.3 * math.exp(-step / 100), "lr": 1e-3 * (1 - step / 400), "grad_norm": 1.0}
        lines.append(json.dumps({"step": step, "epoch": step / 100, "prefix": "train", **scalars}))
        if with_val and step % 100 == 0:
            val = {"top1": 0.8 + step / 4000, "loss": 0.5}
            lines.append(json.dumps({"step": step, "epoch": step / 100, "prefix": "val", **val}))
    return lines


@pytest.mark.parametrize("with_val", [True, False])
def test_learning_curves_tolerate_broken_lines(tmp_path: Path, with_val: bool) -> None:
    lines = metrics_lines(with_val)
    lines.insert(5, '{"step": 51, "epo')  # a kill, then the run went on
    lines.append('{"step": 410, "prefix": "tr')
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines))
    plot_learning_curves(path, tmp_path / "curves.png", "cnn")
    width, height = check_png(tmp_path / "curves.png", 1000, 500)
    # 5.2 inches at 150 dpi for each panel: loss, top1 where there is validation, learning rate.
    assert (width, height) == (780 * (3 if with_val else 2), 660)


def test_a_run_that_logged_once_shows_its_point_and_panels_share_a_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, drawn = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr("fmnist.report.curves.save_figure", lambda _, figure: drawn.extend(figure.axes))
    monkeypatch.setattr("fmnist.report.page_figures._svg", lambda _, axes: drawn.append(axes) or "")
    for num_logged, marked in ((1, "o"), (10, "o"), (11, "")):
        lines = [{"step": 4 * n, "prefix": "train", "loss": 1.0, "lr": 0.1} for n in range(1, num_logged + 1)]
        lines += [{"step": 40, "prefix": "val", "loss": 1.0, "top1": 0.5}]
        path.write_text("\n".join(map(json.dumps, lines)))
        drawn.clear()
        plot_learning_curves(path, tmp_path / "curves.png", "run")
        learning_curves(path)
        assert len(drawn) == 6  # loss, top1 and learning rate, in the figure and on the page
        last = max(40, 4 * num_logged)
        assert {axes.get_xlim() for axes in drawn} == {(-0.02 * last, 1.02 * last)}
        for loss, _, lr in (drawn[:3], drawn[3:]):
            assert loss.get_lines()[1].get_label() == "train"
            assert loss.get_lines()[1].get_marker() == lr.get_lines()[0].get_marker() == marked


def test_a_step_logged_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    pairs = [(10, 1.0), (20, 0.8), (20, 0.7), (30, math.nan)]
    lines = [json.dumps({"step": step, "epoch": 0.1, "prefix": "train", "loss": loss}) for step, loss in pairs]
    path.write_text("\n".join(lines))
    steps, loss = series(read_metrics(path)["train"], "loss")
    # The later of the two lines of step 20; the NaN of step 30 cannot be drawn.
    assert steps.tolist() == [10.0, 20.0] and loss.tolist() == [1.0, 0.7]


def test_learning_curves_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    plot_learning_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "a_$x_$", "b_$y_$")  # no formulas
    assert check_png(tmp_path / "curves.png", 500, 500) == (780, 660)


def test_the_note_names_what_sets_the_losses_apart() -> None:
    cfg = Config(
        augment=AugmentConfig(flip=0.0, rotation=10.0, mixup_alpha=0.2),
        model=ModelConfig(drop_rate=0.1),
        optim=OptimConfig(label_smoothing=0.1, ema_decay=0.0),
    )
    assert loss_note(cfg) == "train loss: with rotation, mixup, dropout, label smoothing; val loss: without"
    assert loss_note(Config(augment=AugmentConfig(flip=0.0), optim=OptimConfig(ema_decay=0.0))) == ""


def test_the_best_validation_of_a_figure_is_of_the_last_image_size() -> None:
    small = [{"step": 1, "top1": 0.9, "size": 20.0}, {"step": 2, "top1": 0.95, "size": 20.0}]
    large = [{"step": 3, "top1": 0.8}, {"step": 4, "top1": 0.85}, {"step": 5, "top1": 0.84}]
    assert of_last_size([]) == [] and of_last_size(small) == small and of_last_size(small + large) == large
    axes = Figure().subplots()
    draw_top1(axes, small + large)
    line, star = axes.get_lines()
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
    assert star.get_label() == "best 85.00 % at step 4"
