"""Reports: the numbers by hand and by scikit-learn, and files that can be read."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from fmnist.report import (
    comparison_table,
    plot_comparison,
    plot_learning_curves,
    summarize,
    write_evaluation,
)

NAMES = ("shirt", "dress", "bag")


def case(num_images: int = 500, num_classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_classes, (num_images,), generator=generator)
    logits = torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), labels] += 1.0
    return logits, labels


def assert_is_a_picture(path: Path) -> None:
    image = np.asarray(Image.open(path).convert("L"))
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(image.shape) > 300
    assert image.std() > 5


def test_four_images_by_hand() -> None:
    # Confidences 0.8, 0.8, 0.6, 0.6; predictions 0, 1, 2, 0; labels 0, 1, 2, 2: three of four are right.
    rows = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.6, 0.2, 0.2]]
    result = summarize(torch.tensor(rows).log(), torch.tensor([0, 1, 2, 2]), NAMES)
    assert result["top1"] == 0.75
    assert result["confusion_matrix"] == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert result["loss"] == pytest.approx(-(math.log(0.8) * 2 + math.log(0.6) + math.log(0.2)) / 4, abs=1e-6)
    # Bin of 0.8: accuracy 1, gap 0.2, weight 1/2. Bin of 0.6: accuracy 1/2, gap 0.1, weight 1/2. Sum 0.15.
    assert result["ece"] == pytest.approx(0.15, abs=1e-6)
    # Wilson, z = 1.95996, n = 4, p = 3/4: centre (p + z^2/8) / (1 + z^2/4) = 0.6275, half width 0.3267.
    assert result["top1_interval"] == pytest.approx([0.3006, 0.9544], abs=2e-4)
    assert result["per_class"]["bag"] == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2})


def test_a_large_case_equals_scikit_learn() -> None:
    logits, labels = case()
    result = summarize(logits, labels, NAMES)
    predictions = logits.argmax(1)
    assert result["top1"] == accuracy_score(labels, predictions)
    assert result["confusion_matrix"] == confusion_matrix(labels, predictions).tolist()
    ours = [result["per_class"][name]["f1"] for name in NAMES]
    assert ours == pytest.approx(f1_score(labels, predictions, average=None).tolist())


@pytest.mark.parametrize(("confidence", "expected"), [(1.0, 0.5), (0.5 + 1e-4, 0.0)])
def test_calibration_error_of_a_coin_that_is_sure_or_honest(confidence: float, expected: float) -> None:
    # Half of 1,000 answers are right. Claimed with certainty the gap is 0.5; claimed at one half it is 0.
    other = (1 - confidence) / 2
    probabilities = torch.tensor([[confidence, other, other]]).clamp(min=1e-30).expand(1000, 3)
    labels = (torch.arange(1000) % 2).long()
    assert summarize(probabilities.log(), labels, NAMES)["ece"] == pytest.approx(expected, abs=1e-3)


def test_the_files_of_an_evaluation(tmp_path: Path) -> None:
    logits, labels = case()
    indices = torch.arange(500) + 100
    result = write_evaluation(tmp_path / "test", logits, labels, indices, NAMES, title="a run")
    assert json.loads((tmp_path / "test/metrics.json").read_text()) == result
    report = (tmp_path / "test/report.txt").read_text()
    assert report.startswith(f"a run: top1 {100 * result['top1']:.2f} %")
    assert "weighted avg" in report
    with (tmp_path / "test/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == indices.tolist()
    assert [int(row["prediction"]) for row in rows] == logits.argmax(1).tolist()
    stored = torch.tensor([[float(row[f"p_{name}"]) for name in NAMES] for row in rows])
    assert torch.allclose(stored, logits.softmax(1), atol=1e-6)
    for name in ("confusion_matrix.png", "reliability.png"):
        assert_is_a_picture(tmp_path / "test" / name)
    assert not list((tmp_path / "test").glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits, labels: (logits[:-1], labels), "logits must be"),
        (lambda logits, labels: (logits, labels + 1), "labels must lie in 0..2"),
        (lambda logits, labels: (logits * float("nan"), labels), "must be finite"),
        (lambda logits, labels: (logits[:0], labels[:0]), "at least one image"),
    ],
)
def test_what_is_not_an_evaluation_is_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarize(*change(*case()), NAMES)


@pytest.mark.parametrize("with_val", [True, False])
def test_learning_curves_bear_a_torn_line_and_no_validation(with_val: bool, tmp_path: Path) -> None:
    lines = [
        {"step": step, "epoch": step / 100, "prefix": "train", "loss": 2 / step, "lr": 1e-3} for step in range(1, 300)
    ]
    if with_val:
        lines += [{"step": s, "epoch": s / 100, "prefix": "val", "top1": 0.9, "loss": 0.3} for s in (100, 200)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 300, "lo')
    plot_learning_curves(path, tmp_path / "curves.png", "a run")
    assert_is_a_picture(tmp_path / "curves.png")


def test_runs_side_by_side(tmp_path: Path) -> None:
    rows = [
        {"run": "one", "model": "cnn", "parameters": 278890, "top1": 0.93, "top1_interval": [0.925, 0.935]},
        {"run": "two", "model": "mlp", "top1": 0.9, "top1_interval": [0.894, 0.906], "loss": 0.3},
    ]
    table = comparison_table(rows).splitlines()
    assert "278,890" in table[2]
    assert "93.00 %" in table[2]
    assert " - " in table[3]
    assert len({len(line) for line in table}) == 1
    plot_comparison(rows, tmp_path / "comparison.png")
    assert_is_a_picture(tmp_path / "comparison.png")
