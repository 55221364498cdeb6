"""report.html: what it holds, that names are escaped, and how a real headless browser shows it."""

import itertools
import json
import logging
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from browser import command_line
from conftest import SMALL_RUN
from conftest import warm_train as train
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import evaluate
import fmnist.evaluation.retrieval
from fmnist.data.fashion_mnist import CLASS_NAMES
from fmnist.data.split import Split
from fmnist.evaluation.findings import Findings, findings
from fmnist.evaluation.misclassified import confident_errors, confused_pairs
from fmnist.evaluation.numbers import reliability_bins
from fmnist.evaluation.outcome import Outcome
from fmnist.evaluation.risk_coverage import risk_coverage
from fmnist.report import page_figures
from fmnist.report.page import context, place_on_scale, render
from fmnist.report.write import write_evaluation


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """evaluate.py's page of a run of 12 steps, every part of it made as a user makes it."""
    folder = tmp_path_factory.mktemp("html")
    (folder / "small.yaml").write_text(SMALL_RUN)
    train("--config", folder / "small.yaml", "--output_dir", folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", str(folder / "run")])
        patch.setattr(fmnist.evaluation.retrieval, "LIMIT_S", 1e9)  # measured on a busy machine too
        evaluate.main()
    return folder / "run/evaluation/test/report.html"


def browse(*args: object) -> subprocess.CompletedProcess[bytes]:
    line = [*command_line(), "--enable-logging=stderr", *map(str, args)]
    return subprocess.run(line, capture_output=True, timeout=120, check=True)


def console(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    return [line for line in done.stderr.decode(errors="replace").splitlines() if ":CONSOLE" in line]


def widths(page: Path, content: str, width: int) -> tuple[int, int]:
    """Width of the content and of the window: a script measures, in a copy without the policy that forbids scripts."""
    script = "<script>onload = () => document.documentElement.dataset.widths = "
    script += "document.documentElement.scrollWidth + ' ' + innerWidth</script></body>"
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", content).replace("</body>", script)
    page.write_text(copy, encoding="utf-8")
    done = browse(f"--window-size={width},844", "--dump-dom", page.as_uri())
    found = re.search(rb'data-widths="(\d+) (\d+)"', done.stdout)
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.mark.thorough
def test_the_page_holds_every_part_and_loads_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    metrics = json.loads((report.parent / "metrics.json").read_text())
    for part in (
        "subsets",
        "confused",
        "matrix",
        "classes",
        "errors",
        "calibration",
        "automation",
        "retrieval",
        "curves",
        "cost",
        "config",
    ):
        assert f'<section id="{part}">' in text
    assert f"{100 * metrics['top1']:.2f}<small>%" in text
    assert "83.5" in text and "arXiv:1708.07747" in text
    assert f"{100 * metrics['calibration']['ece_after']:.2f}" in text
    assert "global_batch_size: 32" in text
    assert all(name in text for name in CLASS_NAMES)
    # Everything is inside: pictures are data, nothing names a server or a script.
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', text)
    assert len(sources) > 24
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert report.stat().st_size < 2_000_000


@pytest.mark.thorough
def test_metrics_and_report_hold_the_same_figures(report: Path) -> None:
    metrics = json.loads((report.parent / "metrics.json").read_text())
    text = (report.parent / "report.txt").read_text()
    subsets, calibration, cost = metrics["subsets"], metrics["calibration"], metrics["cost"]
    assert subsets["all"]["top1"] == metrics["top1"]
    assert subsets["without_near_copies"]["removed"] == 89
    assert subsets["without_near_copies"]["num_images"] == 10_000 - 89
    assert subsets["without_similar"]["num_images"] == 10_000 - 682
    for entry in subsets.values():
        low, high = entry["top1_interval"]
        assert low < entry["top1"] < high
        assert f"{entry['num_images']:,} {100 * entry['top1']:6.2f} % ({100 * low:.2f} to {100 * high:.2f})" in text
    assert calibration["num_images"] == 1000
    assert calibration["ece_before"] == pytest.approx(metrics["ece"], abs=1e-6)
    assert calibration["loss_before"] == pytest.approx(metrics["loss"], abs=1e-9)
    assert f"ECE {calibration['ece_before']:.4f} -> {calibration['ece_after']:.4f}" in text
    assert [timing["batch_size"] for timing in cost["timings"]] == [1, 256]
    for timing in cost["timings"]:
        assert timing["low_ms"] <= timing["median_ms"] <= timing["high_ms"]
        assert timing["images_per_second"] == pytest.approx(1000 * timing["batch_size"] / timing["median_ms"])
    retrieval = metrics["retrieval"]
    assert (retrieval["num_queries"], retrieval["num_items"]) == (10_000, 59_000)
    assert 0.80 < retrieval["pixels"]["mean"] < 0.83  # measured apart among 55,000: 81.1 %
    assert f"{100 * retrieval['features']['mean']:.2f} %" in text
    assert cost["parameters"] == json.loads((report.parents[2] / "summary.json").read_text())["parameters"]


@pytest.mark.thorough
def test_a_browser_shows_it_without_a_word_on_the_console(report: Path, tmp_path: Path) -> None:
    for width, height in ((390, 844), (1120, 1400)):
        picture = tmp_path / f"{width}.png"
        done = browse(f"--window-size={width},{height}", f"--screenshot={picture}", report.as_uri())
        assert console(done) == []
        pixels = matplotlib.image.imread(picture)[..., :3]
        assert pixels.shape == (height, width, 3)
        assert (pixels.mean(axis=-1) > 0.95).mean() > 0.4  # a light page
        assert (pixels.mean(axis=-1) < 0.3).mean() > 0.005  # with ink on it
        assert len(np.unique((pixels * 255).astype(int).reshape(-1, 3), axis=0)) > 50
    # The console is really listened to: a picture from a server is refused by the page's policy, and said.
    planted = tmp_path / "planted.html"
    planted.write_text(report.read_text().replace("</body>", '<img src="https://example.org/x.png"></body>'))
    assert any("Content Security Policy" in line for line in console(browse("--dump-dom", planted.as_uri())))


@pytest.mark.thorough
def test_it_fits_a_phone(report: Path, tmp_path: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert 'name="viewport" content="width=device-width' in text
    for width in (320, 390, 768, 1120):
        assert widths(tmp_path / "copy.html", text, width) == (width, width)
    wide = text.replace("</main>", '<div style="width: 500px">wide</div></main>')
    assert widths(tmp_path / "copy.html", wide, 390)[0] > 390  # what does not fit is noticed


def small_outcome(images: Split, directory: Path) -> Outcome:
    labels = images.labels[:200]
    logits = 4 * torch.nn.functional.one_hot(labels, 10).float()
    logits[:20] = logits[:20].roll(1, dims=1)
    return Outcome(
        name="run", model="cnn", directory=directory, split="test", tta="none", images=images.images[:200],
        labels=labels, logits=logits, class_names=images.class_names, by_tta={"none": logits, "flip": logits},
    )  # fmt: skip


def written(outcome: Outcome, *, quick: bool = False) -> Findings:
    found = findings(outcome, quick=quick)
    write_evaluation(found)
    return found


def test_names_are_escaped_and_a_page_without_validation_images_says_so(train_images: Split, tmp_path: Path) -> None:
    outcome = replace(small_outcome(train_images, tmp_path), name='<script>alert("x")</script>', members=("<b>a", "b"))
    written(outcome)
    text = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in text and "&lt;script&gt;" in text
    assert "<b>a" not in text and "&lt;b&gt;a" in text
    assert "There are no validation images to fit a temperature on" in text
    assert "no temperature is fitted" in (tmp_path / "report.txt").read_text()
    assert '<section id="config">' not in text and '<section id="cost">' not in text


@pytest.mark.parametrize("num_images", [199, 200])
def test_few_images_leave_confidences_as_they_are_which_text_and_page_say(
    train_images: Split, tmp_path: Path, num_images: int
) -> None:
    outcome = small_outcome(train_images, tmp_path)
    written(replace(outcome, validation=(outcome.logits[:num_images], outcome.labels[:num_images])))
    for name in ("report.txt", "report.html"):
        text = (tmp_path / name).read_text()
        few = num_images == 199
        assert text.count("onfidences are not calibrated on 199 validation images: with fewer than 200") == few
        assert ("fitted on 200 validation images" in text) != few and "fitted on 199" not in text
    assert ("After temperature scaling" in text) != few and ("&rarr;" in text) != few


def test_no_two_labels_of_a_panel_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    finish = page_figures._svg
    monkeypatch.setattr(page_figures, "_svg", lambda figure, axes: drawn.append(figure) or finish(figure, axes))
    torch.manual_seed(0)
    confidence = torch.rand(2000).double()
    for chance in (0.0, 0.02, 0.5, 0.9):  # no errors at all, few, every second answer, nearly all of them
        page_figures.risk_against_coverage(risk_coverage(confidence, torch.rand(2000) >= chance))
    page_figures.reliability(reliability_bins(torch.randn(500, 10).softmax(1), torch.arange(500) % 10))
    lines = [{"step": n, "epoch": n / 9, "prefix": "train", "loss": 1 / n, "lr": 0.01 / n} for n in range(1, 99)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page_figures.learning_curves(tmp_path / "metrics.jsonl")
    assert len(drawn) == 7
    assert drawn[3].axes[0].get_ylim() == (0, 102)  # of a share: no tick at 120 %
    for figure in drawn:
        renderer = FigureCanvasAgg(figure).get_renderer()
        (axes,) = figure.axes
        shown = []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [label.get_window_extent(renderer) for label in shown if label.get_text()]
        assert len(boxes) >= 6 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    texts = [label.get_text() for label in drawn[1].axes[0].get_xticklabels()]
    assert texts == ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]


def test_quick_writes_no_page(train_images: Split, tmp_path: Path) -> None:
    found = written(small_outcome(train_images, tmp_path), quick=True)
    assert "subsets" not in found.metrics
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "reliability.png").exists()


def test_quick_keeps_a_full_evaluation_with_the_same_results_and_says_what_it_removes(
    train_images: Split, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = small_outcome(train_images, tmp_path)
    written(outcome)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with caplog.at_level(logging.INFO, "fmnist"):
        written(outcome, quick=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert caplog.messages == [f"{tmp_path} holds a full evaluation with the same results, which is kept"]

    caplog.clear()
    (tmp_path / "predictions.csv").unlink()  # somebody took a part of it away: the numbers are written anew
    with caplog.at_level(logging.INFO, "fmnist"):
        written(outcome, quick=True)
    assert not (tmp_path / "report.html").exists() and (tmp_path / "predictions.csv").exists()
    assert len(caplog.messages) == 1 and "report.html is removed" in caplog.messages[0]

    others = (
        {"data_sha256": "0" * 64},  # other images
        {"logits": 1.01 * outcome.logits},  # the same predictions, with other confidences
    )
    for other in others:
        written(outcome)
        caplog.clear()
        found = written(replace(outcome, **other), quick=True)
        assert "report.html is removed: it is of other results" in caplog.text
        assert not (tmp_path / "report.html").exists()
        assert json.loads((tmp_path / "metrics.json").read_text())["loss"] == found.metrics["loss"]


def test_a_model_without_errors_has_a_page(train_images: Split, tmp_path: Path) -> None:
    outcome = small_outcome(train_images, tmp_path)
    perfect = 4 * torch.nn.functional.one_hot(outcome.labels, 10).float()
    outcome = replace(outcome, logits=perfect, by_tta={"none": perfect, "flip": perfect})
    found = written(outcome)
    assert found.metrics["top1"] == 1.0
    assert "there is no error" in render(context(found))


def test_confused_pairs_by_hand() -> None:
    # a -> b 1 and b -> a 4: 5 together; a -> c 6 alone: 6; b and c never.
    confusion = [[9, 1, 6], [4, 9, 0], [0, 0, 9]]
    assert confused_pairs(confusion) == [(0, 2, 6, 0), (1, 0, 4, 1)]


def test_confident_errors_by_hand(train_images: Split, tmp_path: Path) -> None:
    outcome = small_outcome(train_images, tmp_path)
    logits = outcome.logits.clone()
    logits[7] *= 2  # of the 20 errors, the surest, the second and the third; all others are equally sure
    logits[3] *= 1.5
    logits[11] *= 1.25
    errors = confident_errors(replace(outcome, logits=logits))
    assert len(errors) == 20
    # Logit 8 against nine zeros: e^8 / (e^8 + 9) = 2980.958 / 2989.958 = 0.99699; the label's: 1 / 2989.958.
    assert (errors[0].index, errors[0].confidence) == (7, pytest.approx(0.99699, abs=1e-5))
    assert errors[0].p_label == pytest.approx(1 / (math.exp(8) + 9))
    assert errors[0].label == CLASS_NAMES[outcome.labels[7]]
    assert [error.index for error in errors[1:3]] == [3, 11]


def test_the_strip_by_hand() -> None:
    # Lowest 0.835: 20 * 0.835 - 0.5 = 16.2 -> 16 / 20 = 0.80. 0.93 is at (0.93 - 0.8) / 0.2 = 65 %.
    strip = place_on_scale(0.93, [0.925, 0.935], 0.835)
    assert strip["ticks"][0] == (0.0, pytest.approx(0.80))
    assert [tick for _, tick in strip["ticks"]] == [0.8, 0.85, 0.9, 0.95, 1.0]  # percent in steps of five
    assert strip["top1"] == pytest.approx(65.0)
    assert strip["human"] == pytest.approx(17.5)
    assert [tick for _, tick in place_on_scale(0.5, [0.47, 0.53], None)["ticks"]] == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert place_on_scale(0.02, [0.01, 0.04], None)["ticks"][0] == (0.0, 0.0)


def test_retrieval_is_shown_where_it_was_measured(train_images: Split, tmp_path: Path) -> None:
    outcome = small_outcome(train_images, tmp_path)
    values = context(written(outcome))
    assert values["retrieval"] is None and '<section id="retrieval">' not in render(values)
    space = {"mean": 0.9125, "interval": [0.9, 0.92], "per_class": dict.fromkeys(CLASS_NAMES, 0.5) | {"Bag": None}}
    values["retrieval"] = {"k": 10, "num_queries": 10000, "num_items": 55000, "features": space, "pixels": space}
    text = render(values)
    assert "Precision at 10" in text and "91.25 %" in text and "10,000 queries among 55,000" in text
    assert text.count("<td>50.00") == 2 * 9
