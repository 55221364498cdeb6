"""Prediction sets and automatic answers: exact thresholds, the promise kept by simulation, predict's columns."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from other_sets import untrained_on, write_npz
from pictures import learned_run
from PIL import Image
from scipy.stats import beta
from small import command, rows_of, write_small_data
from torch import Tensor

import fmnist
from fmnist.apps.novelty import NoveltyReference
from fmnist.apps.predict import predictions
from fmnist.apps.predict.__main__ import PARSER
from fmnist.apps.predict.__main__ import main as predict
from fmnist.apps.predict.photo_sheet import Cell
from fmnist.apps.trust import RANGES
from fmnist.data.fashion_mnist import CLASS_NAMES, load_split
from fmnist.evaluation import risk_coverage as selective
from fmnist.evaluation.conformal import class_thresholds, expected_coverage, least_images, prediction_sets, set_coverage
from fmnist.evaluation.findings import findings
from fmnist.evaluation.outcome import Outcome
from fmnist.evaluation.risk_coverage import automation, confidence_threshold, least_answers, risk_coverage
from fmnist.report.page import context, render
from fmnist.trained import open_trained


def drawn(count: int, num_classes: int, seed: int, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    """Draw probabilities and labels that agree now and then: a poor model on exchangeable images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    logits = torch.randn(count, num_classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(count), labels] += sharpness * torch.rand(count, generator=generator)
    return logits.softmax(1), labels


@pytest.mark.parametrize(
    ("count", "coverage", "place"),
    [
        (19, 0.95, 0),  # ceil(0.95 * 20) = 19 of them are in: the least probable decides
        (18, 0.95, None),
        (39, 0.95, 1),
        (99, 0.55, 44),  # 0.55 * 100 is 55.00000000000001 in floating point
        (99, 0.99, 0),
        (98, 0.99, None),
        (9, 0.9, 0),
        (8, 0.9, None),
        (1, 0.5, 0),
        (0, 0.5, None),
    ],
)
def test_a_threshold_is_the_order_statistic_of_split_conformal(count: int, coverage: float, place: int | None) -> None:
    own = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    probabilities = torch.stack([own, 1 - own], dim=1)
    first, second = class_thresholds(probabilities, torch.zeros(count, dtype=torch.int64), coverage).tolist()
    assert first == (0 if place is None else float(own.sort().values[place]))
    assert second == 0  # no image: in every set
    assert (count >= least_images(coverage)) == (place is not None)


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_sets_are_those_of_mapie(coverage: float) -> None:
    pytest.importorskip("mapie")
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        """Takes probabilities as they are."""

        classes_ = np.arange(4)

        def fit(self, x, y):  # type: ignore[no-untyped-def]
            return self

        def predict(self, x):  # type: ignore[no-untyped-def]
            return x.argmax(1)

        def predict_proba(self, x):  # type: ignore[no-untyped-def]
            return x

        def __sklearn_is_fitted__(self) -> bool:
            return True

    known, labels = drawn(400, 4, 0)
    others, _ = drawn(300, 4, 1)
    thresholds = class_thresholds(known, labels, coverage)
    for label in range(4):  # MAPIE has one threshold: of the images of a class, it is that of the class
        model = SplitConformalClassifier(Given(), confidence_level=coverage, conformity_score="lac", prefit=True)
        of_class = labels == label
        model.conformalize(known[of_class].numpy(), labels[of_class].numpy())
        theirs = model.predict_set(others.numpy())[1][:, label, 0]
        assert np.array_equal(theirs, (others[:, label] >= thresholds[label]).numpy())
        assert 0.02 < theirs.mean() < 0.98


def test_every_class_is_covered_whatever_the_model() -> None:
    hits, counts, trials = torch.zeros(3), torch.zeros(3), 100
    for trial in range(trials):
        probabilities, labels = drawn(1100, 3, trial, sharpness=(0.5 if trial % 2 else 3.0))
        probabilities[:, 2] **= 3  # a class that the model hardly gives a chance
        thresholds = class_thresholds(probabilities[:100], labels[:100], 0.9)
        inside = (probabilities >= thresholds)[100:].gather(1, labels[100:, None]).flatten()
        hits += labels[100:][inside].bincount(minlength=3)
        counts += labels[100:].bincount(minlength=3)
    for share in (hits / counts).tolist():  # at least 0.9, at most 1 / (n + 1) more with about 33 images
        assert 0.89 < share < 0.9 + 1 / 25


def test_no_set_is_empty_and_ties_are_in() -> None:
    probabilities = torch.tensor([[0.4, 0.3, 0.3], [0.1, 0.2, 0.7]], dtype=torch.float64)
    sets = prediction_sets(probabilities, torch.tensor([0.9, 0.3, 0.9], dtype=torch.float64))
    assert sets.tolist() == [[True, True, False], [False, False, True]]
    assert prediction_sets(probabilities[:0], torch.zeros(3)).shape == (0, 3)


def test_where_coverage_falls_by_chance() -> None:
    rng, found = np.random.default_rng(0), []
    for _ in range(4000):
        threshold = np.sort(rng.random(500))[25 - 0 - 1]  # 500 - ceil(0.95 * 501) = 24
        found.append(rng.binomial(1000, 1 - threshold) / 1000)
    low, high = expected_coverage(500, 1000, 0.95, 0.05)
    assert (low, high) == (pytest.approx(np.quantile(found, 0.025), abs=2e-3), pytest.approx(0.971, abs=2e-3))
    assert np.mean([low <= share <= high for share in found]) == pytest.approx(0.95, abs=0.015)


def test_coverage_is_counted_by_class() -> None:
    known = torch.tensor([[0.8, 0.1, 0.1]] * 9 + [[0.2, 0.7, 0.1]], dtype=torch.float64)
    labels = torch.tensor([0] * 9 + [1])
    seen = torch.tensor([[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.3, 0.6, 0.1]], dtype=torch.float64)
    found = set_coverage((known, labels), (seen, torch.tensor([0, 0, 0])), 0.9, ("a", "b", "c"))
    # class a from 0.8 on, or where it is the likeliest; b and c, with too few images, always
    assert found["in_every_set"] == ["b", "c"]
    assert found["coverage"] == found["worst_coverage"] == pytest.approx(2 / 3) and found["worst_class"] == "a"
    assert found["mean_size"] == pytest.approx((3 + 3 + 2) / 3)
    assert found["per_class"]["b"] == {"threshold": 0.0, "coverage": None, "expected": None}
    assert found["per_class"]["a"]["threshold"] == 0.8
    assert found["below"] == []  # of three images 2/3 is no surprise
    many = (seen[:1].expand(900, 3), torch.tensor([0] * 300 + [1] * 600))
    assert set_coverage((known, labels), many, 0.9, ("a", "b", "c"))["below"] == []
    wrong = torch.tensor([[0.3, 0.6, 0.1]], dtype=torch.float64).expand(300, 3)
    assert set_coverage((known, labels), (wrong, torch.zeros(300).long()), 0.9, ("a", "b", "c"))["below"] == ["a"]
    json.dumps(found, allow_nan=False)


def right(count: int, wrong: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Confidences that fall from near 1, and what is right but for some places."""
    correct = torch.ones(count, dtype=torch.bool)
    correct[list(wrong)] = False
    return torch.linspace(0.999, 0.5, count, dtype=torch.float64), correct


def test_a_confidence_by_hand() -> None:
    assert least_answers(0.01) == 299  # 0.99 ** 299 < 0.05 < 0.99 ** 298
    confidence, correct = right(299)
    assert confidence_threshold(confidence, correct, 0.01) == float(confidence[-1])
    assert confidence_threshold(*right(298), 0.01) is None
    assert confidence_threshold(*right(299, (0,)), 0.01) is None  # the surest one is wrong
    assert confidence_threshold(*right(0), 0.01) is None
    # From a rank on all are wrong: steps of ten images end before errors outweigh what is allowed.
    confidence, correct = right(1000, tuple(range(700, 1000)))
    found = confidence_threshold(confidence, correct, 0.05)
    answered = int((confidence >= found).sum())
    errors = answered - 700
    assert beta.ppf(0.95, errors + 1, answered - errors) <= 0.05 < beta.ppf(0.95, errors + 11, answered - errors)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert confidence_threshold(confidence[shuffled], correct[shuffled], 0.05) == found


def test_images_of_one_confidence_are_answered_together() -> None:
    confidence, correct = right(1000, tuple(range(900, 1000)))
    assert confidence_threshold(torch.full_like(confidence, 0.7), correct, 0.05) is None
    confidence[500:] = 0.7
    assert confidence_threshold(confidence, correct, 0.05) == float(confidence[499])


@pytest.mark.parametrize("steep", [False, True])
def test_more_errors_than_allowed_in_at_most_one_case_of_ten(steep: bool) -> None:
    """A model whose errors do not depend on its confidence, just above what is allowed; and one whose errors do."""
    rng, over, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        confidence = np.sort(rng.random(2000))[::-1].copy()
        risk = 0.2 * (1 - confidence) ** 2 if steep else np.full(2000, 0.022)
        correct = torch.from_numpy(rng.random(2000) >= risk)
        found = confidence_threshold(torch.from_numpy(confidence), correct, 0.02)
        # the true risk of answers from a confidence on: the mean of 0.2 (1 - c)^2 over c in found..1
        over += found is not None and (0.2 * (1 - found) ** 2 / 3 > 0.02 if steep else True)
    assert over / trials < 0.13  # 0.1, give or take two deviations
    assert not steep or found is not None


def test_the_curve_ends_at_the_error_rate() -> None:
    confidence, correct = right(1000, (10, 500, 501, 999))
    curve = risk_coverage(confidence, correct)
    assert len(curve.coverage) == selective.POINTS
    assert (curve.coverage[-1], curve.risk[-1]) == (1, pytest.approx(0.004))
    assert curve.risk[0] == 0 and curve.coverage[0] == 0.005
    assert curve.risk[99] == pytest.approx(1 / 500)
    z, n, p = 1.959964, 1000, 0.004  # Wilson by its formula
    middle, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert [curve.low[-1], curve.high[-1]] == pytest.approx(
        [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    )
    assert len(risk_coverage(*right(3)).coverage) == 3


def test_what_is_automatic_is_counted_on_other_images() -> None:
    known = torch.tensor([[0.9, 0.1]] * 400 + [[0.4, 0.6]] * 100, dtype=torch.float64)
    labels = torch.zeros(500, dtype=torch.int64)
    seen = torch.tensor([[0.95, 0.05], [0.9, 0.1], [0.05, 0.95], [0.8, 0.2]], dtype=torch.float64)
    found = automation((known, labels), (seen, torch.zeros(4, dtype=torch.int64)), 0.01)
    assert (found["threshold"], found["automatic_val"], found["automatic"]) == (0.9, 0.8, 0.75)
    assert found["errors"] == pytest.approx(1 / 3)
    none = automation((known[400:], labels[400:]), (seen, torch.zeros(4, dtype=torch.int64)), 0.01)
    assert (none["threshold"], none["automatic"], none["errors"], none["interval"]) == (None, 0.0, None, None)


# The report


def an_outcome(folder: Path, validation: tuple[Tensor, Tensor] | None) -> Outcome:
    probabilities, labels = drawn(400, 10, 5, sharpness=9.0)
    logits = probabilities.log().float()
    return Outcome(
        name="run", model="cnn", directory=folder, split="test", tta="none", labels=labels, logits=logits,
        images=torch.zeros(400, 28, 28, dtype=torch.uint8), class_names=CLASS_NAMES,
        by_tta={"none": logits, "flip": logits}, validation=validation,
    )  # fmt: skip


def test_the_report_says_what_can_be_automated(tmp_path: Path) -> None:
    probabilities, labels = drawn(900, 10, 6, sharpness=9.0)
    kept = (labels != 9) | (labels.cumsum(0) < 200)  # few bags
    found = findings(an_outcome(tmp_path, (probabilities.log().float()[kept], labels[kept])))
    assert found.risk is not None and found.risk.risk[-1] == pytest.approx(1 - found.metrics["top1"])
    held = found.metrics["trust"]
    assert [row["max_error"] for row in held["automation"]] == [0.005, 0.01, 0.02, 0.05]
    assert held["automation"][0]["threshold"] is None  # 598 images are needed
    assert [row["asked"] for row in held["sets"]] == [0.9, 0.95, 0.99]
    text = re.sub(r"\s+", " ", render(context(found)).split('<section id="automation">')[1].split("</section>")[0])
    assert "<tr><th>0.5</th><td>-</td><td>0.0</td><td>-</td><td>-</td></tr>" in text
    for row in held["automation"]:
        if row["threshold"] is not None:
            assert f"<td>{row['threshold']:.4f}</td><td>{100 * row['automatic']:.1f}</td>" in text
    for row in held["sets"]:
        assert (
            f"<td>{100 * row['coverage']:.1f}</td><td>{row['worst_class']} {100 * row['worst_coverage']:.1f}</td>"
            in text
        )
    assert "Ankle boot" in held["sets"][0]["in_every_set"] and "Ankle boot has too few validation images" in text
    assert "no confidence is sure" not in text
    assert "not calibrated" not in render(context(found))  # of 900 images
    without = render(context(findings(an_outcome(tmp_path, None))))
    assert "There are no validation images to choose a confidence on" in without and "--max_error" not in without


def test_the_report_of_few_validation_images_says_each_thing_once(tmp_path: Path) -> None:
    probabilities, labels = drawn(6, 10, 6, sharpness=9.0)
    found = findings(an_outcome(tmp_path, (probabilities.log().float(), labels)))
    text = re.sub(r"\s+", " ", render(context(found)).split('<section id="automation">')[1].split("</section>")[0])
    assert "<th>from confidence</th>" not in text and "--max_error" not in text
    # 0.95 ** 58 = 0.0510, 0.95 ** 59 = 0.0485, the first below 0.05, half of one case of ten
    assert "Nothing, even where 5 % of errors are allowed: on 6 validation images" in text and "It takes 59 of" in text
    assert text.count("too few validation images") == 1
    said = "90 %, 95 %, 99 %: T-shirt/top, Trouser, Pullover and 7 more have too few validation images"
    assert said in text


# The command


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learned_run(tmp_path_factory)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index, image in enumerate(load_split("test", None, 2000)[0][:150].numpy()):
        Image.fromarray(image).save(folder / f"{index:03}.png")
    (folder / "150.png").write_bytes(b"")
    return folder


def test_predict_gives_sets_and_decisions(learned: Path, pictures: Path, tmp_path: Path) -> None:
    asked = ("--coverage", 0.9, "--max_error", 0.05, "--sheet", 0, "--top", 10)
    said = command(predict, learned, pictures, *asked, "--output", tmp_path)
    *rows, bad = rows_of(tmp_path / "predictions.csv")
    assert list(bad)[-3:] == ["set", "decision", "error"] and (bad["set"], bad["decision"]) == ("", "person")

    trained = open_trained(learned, "cpu")
    split = trained.split("val")
    probabilities = trained.probabilities(trained(split.images)[0])
    thresholds = class_thresholds(probabilities, split.labels, 0.9)
    confidence, predictions = probabilities.max(1)
    limit = confidence_threshold(confidence, predictions == split.labels, 0.05)
    assert limit is not None
    for row in rows:
        chances = {row[f"top{place}"]: float(row[f"p{place}"]) for place in range(1, 11)}
        limits = {name: float(thresholds[CLASS_NAMES.index(name)]) - 1e-6 for name in chances}
        mine = [name for name, p in chances.items() if p >= limits[name] or name == row["prediction"]]
        assert row["set"].split(" | ") == mine
        alone = float(row["confidence"]) >= limit and row["unfamiliar"] == "no"
        assert row["decision"] == ("automatic" if alone else "person")
    labels = load_split("test", None, 2000)[1][:150].tolist()
    inside = [CLASS_NAMES[label] in row["set"].split(" | ") for row, label in zip(rows, labels, strict=True)]
    assert sum(inside) >= 0.85 * 150
    share = float((confidence >= limit).double().mean())
    automatic = sum(row["decision"] == "automatic" for row in rows)
    assert 0 < automatic < 150
    assert (
        f"at most 5 % errors: {100 * share:.0f} % of 2,000 validation images automatic, from confidence {limit:.4f} on"
        in said
    )
    assert f"{automatic} automatic, {151 - automatic} for a person" in said and "90 % sets: " in said

    found = json.loads(command(predict, learned, pictures, *asked, "--output", tmp_path, "--json"))
    assert (found["automatic"], found["automatic_from"]) == (automatic, pytest.approx(limit))
    assert found["mean_set_size"] == pytest.approx(np.mean([len(row["set"].split(" | ")) for row in rows]))
    plain = command(predict, learned, pictures, *asked, "--no-calibrate", "--output", tmp_path)
    other = trained.probabilities(trained(split.images)[0], calibrate=False).max(1).values
    limit = confidence_threshold(other, predictions == split.labels, 0.05)
    assert f"from confidence {limit:.4f} on" in plain


def test_python_gives_the_sets_and_decisions_of_the_command(learned: Path, pictures: Path, tmp_path: Path) -> None:
    run, files = fmnist.open_run(learned, "cpu"), sorted(pictures.glob("*.png"))[:40]
    for asked in ({"coverage": 0.99}, {"coverage": 0.9, "max_error": 0.05, "calibrate": False}):
        flags = ["--no-calibrate" if name == "calibrate" else f"--{name}={value}" for name, value in asked.items()]
        command(predict, learned, *files, *flags, "--sheet", 0, "--output", tmp_path, "--force")
        answers, rows = run.predict(files, **asked), rows_of(tmp_path / "predictions.csv")
        assert len(answers) == len(rows) == 40
        for answer, row in zip(answers, rows, strict=True):
            assert (row.get("set"), row.get("decision")) == (answer.set and " | ".join(answer.set), answer.decision)
            assert [name for name, _ in answer] == [row[f"top{place}"] for place in (1, 2, 3)]
    assert {answer.decision for answer in answers} == {"automatic", "person"}
    plain = run.predict(files[0])[0]
    assert (plain.set, plain.decision) == (None, None) and plain == run.predict(files[0], coverage=0.9)[0]
    assert copy.deepcopy(answers[0]).decision == answers[0].decision  # as a list of one's own
    assert run.predict([], coverage=0.9, max_error=0.1) == []


def test_python_refuses_what_the_command_refuses(learned: Path, pictures: Path, tmp_path: Path) -> None:
    run, picture = fmnist.open_run(learned, "cpu"), pictures / "000.png"
    for name, (low, high) in RANGES.items():
        for value in (low, high):
            PARSER.parse_args([str(learned), "a.png", f"--{name}", str(value)])
            run.predict(picture, **{name: value})
        for value in (low / 2, high + 0.1, float("nan"), True, "0.9"):
            with pytest.raises(ValueError, match=f"^{name} is {value!r}; valid range: {low} to {high}$"):
                run.predict(picture, **{name: value})
        for value in (low / 2, high + 0.1):
            assert f"valid range: {low:g} to {high:g}" in command(
                predict, learned, picture, f"--{name}", value, status=2
            )
    with pytest.raises(ValueError, match="no Fashion-MNIST in .*nowhere"):
        run.predict(picture, coverage=0.9, root=tmp_path / "nowhere")


def test_the_sheet_says_what_the_table_says(
    learned: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells: list[Cell] = []
    monkeypatch.setattr(predictions, "draw_sheet", lambda drawn, title: cells.extend(drawn) or b"")
    # the run's own threshold may flag none of these, on some processors
    monkeypatch.setattr(NoveltyReference, "threshold", 0.4)
    command(predict, learned, pictures, "--coverage", 0.9, "--max_error", 0.05, "--output", tmp_path)
    for row, cell in zip(rows_of(tmp_path / "predictions.csv"), cells, strict=False):
        assert [line for line, _ in cell.lines][3:5] == [f"set: {row['set']}", f"decision: {row['decision']}"]
        assert len(cell.lines) == 5 + (row["unfamiliar"] == "yes")
    assert len(cells) == 120 and {len(cell.lines) for cell in cells} == {5, 6}  # some are unfamiliar


def test_too_few_validation_images_are_said(learned: Path, pictures: Path, tmp_path: Path) -> None:
    asked = ("--coverage", 0.999, "--max_error", 0.0005, "--sheet", 0, "--output", tmp_path)
    said = command(predict, learned, pictures / "000.png", *asked)
    always = "fewer than 999 validation images, too few for 99.9 %: in every set"
    assert f"T-shirt/top, Trouser, Pullover and 7 more: {always}" in said
    assert "at most 0.05 % errors: none of 2,000 validation images automatic; at least 5,990, all answered" in said
    (row,) = rows_of(tmp_path / "predictions.csv")
    assert sorted(row["set"].split(" | ")) == sorted(CLASS_NAMES) and row["decision"] == "person"


def test_other_classes_and_names(tmp_path: Path) -> None:
    run = untrained_on(write_npz(tmp_path / "shapes.npz", 5, (12, 12)), tmp_path / "run")
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(tmp_path / "a.png")
    said = command(predict, run, tmp_path / "a.png", "--coverage", 0.99, "--output", tmp_path / "out")
    assert "kind 000, kind 001, Chrysanthemum" in said and "and 2 more: fewer than 99 validation images" in said
    (row,) = rows_of(tmp_path / "out" / "predictions.csv")
    assert "<b>bold</b> & $x^2$" in row["set"].split(" | ") and "decision" not in row


def test_what_has_no_thresholds_is_refused(
    learned: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, output = pictures / "000.png", ("--output", tmp_path / "out")
    for wrong, said in (
        (["--coverage", 95], "--coverage: '95' is not valid; valid range: 0.01 to 0.9999"),
        (["--coverage", "nan"], "--coverage: 'nan' is not valid"),
        (["--max_error", 0], "--max_error: '0' is not valid; valid range: 0.0001 to 0.5"),
        (["--explain", "--sheet", 0], "--explain draws on the sheet, and --sheet 0 leaves that out"),
    ):
        assert said in command(predict, learned, one, *wrong, *output, status=2)
    monkeypatch.setattr("small.NUM_TRAIN", 2100)  # the run holds 2,000 out
    other = tmp_path / "other"
    other.mkdir()
    asked = ("--max_error", 0.01, "--data.root", write_small_data(other))
    assert "holds other validation images or labels than run was made with" in command(
        predict, learned, one, *asked, *output, status=2
    )
    parts = {f"val_{kind}": None for kind in ("images", "labels")}
    run = untrained_on(write_npz(tmp_path / "shapes.npz", 5, (12, 12), **parts), tmp_path / "run")
    for option in ("--coverage", "--max_error"):
        said = command(predict, run, one, option, 0.1, *output, status=2)
        assert f"{option[2:]}: thresholds are taken from validation images, and run has none" in said
    assert not (tmp_path / "out").exists()
    shutil.rmtree(other)
