"""Figures and reports of 2 to 1,000 classes: readable, and every number of the classes shown is that of the whole."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fmnist.data.fashion_mnist import INFO
from fmnist.evaluation.findings import Findings, findings
from fmnist.evaluation.misclassified import channels_last, confused_pairs, worst_by_f1, worst_classes
from fmnist.evaluation.numbers import confusion_of, summarize
from fmnist.evaluation.outcome import Outcome
from fmnist.report import figures
from fmnist.report.figures import MOST_CLASSES, WORST_CLASSES, plot_confusion_matrix, shown_classes
from fmnist.report.matrix import matrix_rows
from fmnist.report.page import context, render
from fmnist.report.page_figures import picture
from fmnist.report.write import report_text, write_evaluation
from fmnist.runtime.files import MAX_JSON_BYTES
from fmnist.training.batch_pictures import visible


def outcome_of(num_classes: int, folder: Path, per_class: int = 4) -> Outcome:
    """Images in colour; class i is taken for i + 1 once, and class 7 always for 3."""
    labels = torch.arange(num_classes).repeat(per_class)
    predictions = labels.clone()
    predictions[:num_classes] = (labels[:num_classes] + 1) % num_classes
    predictions[labels == 7] = 3
    logits = torch.nn.functional.one_hot(predictions, num_classes) * 5.0
    names = tuple(f"species {i}: <i>a name that goes on & on</i> $\\frac{{{i}" for i in range(num_classes))
    info = replace(INFO, name="npz", title="plants", class_names=names, source="", licence="CC0")
    images = torch.randint(0, 256, (len(labels), 3, 20, 30), dtype=torch.uint8)
    return Outcome(
        name="run", model="cnn", directory=folder, split="test", tta="none", images=images, labels=labels,
        logits=logits, by_tta={"none": logits, "flip": logits}, class_names=names, info=info, data="plants",
        data_sha256="0" * 64,
    )  # fmt: skip


@pytest.mark.parametrize(
    "num_classes", [2, 31, pytest.param(30, marks=pytest.mark.thorough), pytest.param(400, marks=pytest.mark.thorough)]
)
def test_every_file_is_written_and_readable(num_classes: int, tmp_path: Path) -> None:
    found = findings(outcome_of(num_classes, tmp_path))
    write_evaluation(found)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["per_class"]) == num_classes == len(metrics["confusion_matrix"])
    assert len((tmp_path / "metrics.json").read_text().splitlines()) < 3000
    header = (tmp_path / "predictions.csv").read_text().splitlines()[0]
    assert header.count("p_species") == num_classes
    report = (tmp_path / "report.txt").read_text()
    assert len(report.splitlines()) < 100 and "species 1: <i>a name that goes on & on</i>" in report
    assert "human line" not in report + (tmp_path / "report.html").read_text().split("<body>")[1]
    assert (tmp_path / "report.html").stat().st_size < 1_500_000


def test_of_many_classes_the_report_lists_the_worst_and_their_pairs(tmp_path: Path) -> None:
    found = findings(outcome_of(100, tmp_path))
    # class 7: taken for 3 four times; F1 of 7: 0, of 3: 3 right, 1 missed, 4 + 1 (class 2) false: 6 / 12; others 6 / 8
    assert next(iter(worst_by_f1(found.metrics["per_class"]))).startswith("species 7:")
    report = report_text(found)
    rows = [line for line in report.splitlines() if "species" in line and "taken for" not in line]
    assert len(rows) == 30 and "species 7:" in rows[0] and "species 3:" in rows[1] and "0.5000" in rows[1]
    assert "the 30 of 100 classes with the lowest F1; metrics.json holds all" in report
    pairs = [line for line in report.splitlines() if "taken for" in line]
    assert len(pairs) == 30 and pairs[0].startswith("      4  species 7:") and "the reverse: 0" in pairs[0]
    text = render(context(found))
    assert '<section id="pairs">' in text and text.count("<details>") == 1
    assert "<i>a name" not in text and "Most confused pairs" in text and "plants, CC0 licence." in text


def test_of_more_than_a_thousand_classes_the_cells_that_hold_images_are_kept(tmp_path: Path) -> None:
    names = [str(i) for i in range(40_000)]  # whose whole matrix has 1.6e9 cells
    logits = torch.zeros(4, 40_000)
    logits[range(4), [7, 39_999, 39_999, 3]] = 1.0
    metrics = summarize(logits, torch.tensor([7, 5, 5, 39_998]), names)
    assert (
        metrics["confusion_cells"] == [[5, 39_999, 2], [7, 7, 1], [39_998, 3, 1]] and "confusion_matrix" not in metrics
    )
    assert len(json.dumps(metrics)) < MAX_JSON_BYTES / 10
    confusion = confusion_of(metrics)
    assert confused_pairs(confusion) == [(5, 39_999, 2, 0), (39_998, 3, 1, 0)]
    assert worst_classes(confusion, 4) == [3, 5, 39_998, 39_999]
    (row,) = (row for row in matrix_rows(confusion, names) if row["name"] == "5")
    assert row["recall"] == 0 and sum(cell["count"] for cell in row["cells"]) == 2
    # dense up to a thousand, and both are one matrix
    few = replace(outcome_of(1000, tmp_path, per_class=1), directory=tmp_path)
    dense = summarize(few.logits, few.labels, few.class_names)
    assert len(dense["confusion_matrix"]) == 1000 and "confusion_cells" not in dense
    more = summarize(F.pad(few.logits, (0, 1)), few.labels, [*few.class_names, "one more"])
    assert np.array_equal(confusion_of(more).toarray()[:1000, :1000], dense["confusion_matrix"])


def test_a_quick_evaluation_of_many_classes_keeps_the_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmnist.evaluation.numbers.MOST_DENSE", 39)
    outcome = outcome_of(40, tmp_path)
    for quick in (False, True):
        write_evaluation(findings(outcome, quick=quick))
        assert (tmp_path / "report.html").is_file()
    text, kept = report_text(findings(outcome)), json.loads((tmp_path / "metrics.json").read_text())
    # four images of each class; those of 7 are all taken for 3
    assert "species 7: <i>a name that goes on & on</i>" in text and [7, 3, 4] in kept["confusion_cells"]
    assert sum(count for _, _, count in kept["confusion_cells"]) == 160
    write_evaluation(findings(replace(outcome, logits=outcome.logits.roll(1, 1)), quick=True))
    assert not (tmp_path / "report.html").exists()


def test_thirty_classes_are_drawn_whole_and_of_more_the_worst() -> None:
    confusion = np.zeros((50, 50), int)
    np.fill_diagonal(confusion, 9)
    for row, column, count in ((40, 3, 5), (3, 40, 2), (10, 49, 4), (0, 1, 1)):
        confusion[row, column] = count
    assert worst_classes(confusion.tolist(), 4) == [3, 10, 40, 49]
    assert shown_classes(np.eye(MOST_CLASSES, dtype=int).tolist()) == list(range(MOST_CLASSES))
    assert len(shown_classes(confusion.tolist())) == WORST_CLASSES


def test_the_figure_of_the_worst_keeps_shares_of_the_whole_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    confusion = np.diag([8] * 40)
    confusion[5, 6], confusion[5, 39] = 3, 5  # class 5: 8 of 16 right, and 39 is no one of the twenty
    confusion[6:24, 5] = 2
    drawn: list[figures.Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda path, figure: drawn.append(figure))
    names = [f"class {i} $" for i in range(40)]
    plot_confusion_matrix(confusion.tolist(), names, "run", tmp_path / "a.png")
    axes = drawn[0].axes[0]
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown[-1] == "others" and len(shown) == WORST_CLASSES + 1 and shown[:2] == ["class 5 $", "class 6 $"]
    texts = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert texts[0, 0] == "8\n50.0 %" and texts[0, 1] == "3\n18.8 %"
    others = sum(confusion[5, int(name.split()[1])] for name in shown[:-1])
    assert texts[0, WORST_CLASSES] == (f"{16 - others}\n{100 * (16 - others) / 16:.1f} %" if others < 16 else "0")
    assert "20 classes with most errors of 40" in axes.get_title()


def test_pairs_are_those_of_the_matrix_by_hand() -> None:
    confusion = [[5, 1, 0], [4, 5, 0], [2, 0, 7]]
    assert confused_pairs(confusion) == [(1, 0, 4, 1), (2, 0, 2, 0)]


def test_pictures_of_a_report_keep_their_colours_and_proportions() -> None:
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    image[0] = 200
    assert channels_last(image).shape == (20, 30, 3) and channels_last(image)[0, 0].tolist() == [200, 0, 0]
    assert channels_last(image[0]).shape == (20, 30)
    assert picture(image).startswith("data:image/png")
    assert len(picture(torch.randint(0, 256, (3, 700, 500), dtype=torch.uint8))) < 100_000


def test_training_pictures_are_in_colour_and_red_where_not_finite() -> None:
    class Maker:
        mean, std = (0.5, 0.25, 0.0), (0.5, 0.5, 1.0)

    pixels = torch.zeros(1, 3, 1, 2)
    pixels[0, 1, 0, 1] = torch.nan
    shown = visible(pixels, Maker)  # type: ignore[arg-type]
    assert shown[0, 0, 0].tolist() == [0.5, 0.25, 0.0] and shown[0, 0, 1].tolist() == [1.0, 0.0, 0.0]


def test_fashion_mnist_keeps_its_human_line(tmp_path: Path) -> None:
    outcome = replace(outcome_of(10, tmp_path), class_names=INFO.class_names, info=INFO, data="Fashion-MNIST")
    found: Findings = findings(outcome)
    assert context(found)["human"] == 0.835 and "human 83.5" in render(context(found))
    assert context(findings(replace(outcome, info=replace(INFO, name="mnist"))))["human"] is None
