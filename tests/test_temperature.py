"""The temperature leaves the report: fitted on validation at a run's end, used by predict, the monitor and ONNX."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import SMALL_RUN
from PIL import Image
from small import command

import fmnist
from fmnist.apps.export.__main__ import main as export_main
from fmnist.apps.monitor.drift import describe
from fmnist.apps.novelty import NoveltyReference
from fmnist.apps.predict.__main__ import main as predict
from fmnist.data.fashion_mnist import load, load_split
from fmnist.evaluation.calibration import few_images, fit_temperature
from fmnist.evaluation.cost import measure_cost
from fmnist.evaluation.numbers import calibration_error
from fmnist.training.finish import calibration_errors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fmnist.RunResults:
    folder = tmp_path_factory.mktemp("temperature")
    (folder / "small.yaml").write_text(SMALL_RUN)
    return fmnist.train(folder / "small.yaml", output_dir=str(folder / "run"))


def test_a_run_fits_it_on_its_validation_images(run: fmnist.RunResults) -> None:
    images, labels = load_split("val", None, 1000)
    logits, _ = run.trained(images)
    assert run.summary["temperature"] == pytest.approx(fit_temperature(logits, labels), rel=1e-3)
    assert run.summary["temperature"] != 1 and run.trained.temperature == run.summary["temperature"]
    images, labels = load("test")
    logits, _ = run.trained(images)
    for key, calibrate in (("test.ece", False), ("test.ece_calibrated", True)):
        ece = calibration_error(run.trained.probabilities(logits, calibrate=calibrate), labels)
        assert run.summary[key] == pytest.approx(ece, abs=1e-4)


def test_it_is_not_of_probabilities_that_are_averaged_over_mirror_images(
    run: fmnist.RunResults, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = SimpleNamespace(outcome=SimpleNamespace(tta="flip"), metrics={"ece": 0.1})
    assert calibration_errors(found, 1.2) == {"test.ece": 0.1}  # type: ignore[arg-type]
    monkeypatch.setattr("fmnist.evaluation.cost.SECONDS", 0.01)
    one, two = (measure_cost(run.trained, load("test")[0][:256], "cpu", tta) for tta in ("none", "flip"))
    assert two.flops_per_image == 2 * one.flops_per_image and two.parameters == one.parameters


def test_predictions_use_it_and_can_leave_it_out(run: fmnist.RunResults) -> None:
    image = load("test")[0][:1]
    logits, _ = run.trained(image)
    (best, *_), (raw, *_) = run.predict(image)[0], run.predict(image, calibrate=False)[0]
    temperature = run.summary["temperature"]
    assert best[1] == pytest.approx(float((logits.double() / temperature).softmax(1).max()), abs=1e-9)
    assert raw[1] == pytest.approx(float(logits.double().softmax(1).max()), abs=1e-9)
    checkpoint = max((run.directory / "checkpoints").glob("step_*"))
    assert fmnist.open_run(checkpoint).trained.temperature == 1  # it was fitted on other weights


@pytest.mark.thorough
def test_few_images_leave_it_at_one_and_run_and_predict_say_so(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL_RUN)
    few = fmnist.train(
        tmp_path / "small.yaml", output_dir=str(tmp_path / "run"), data={"val_size": 20}, evaluation={"test": False}
    )
    said = few_images(20)
    assert "not calibrated on 20 validation images: with fewer than 200" in said
    assert few.summary["temperature"] == 1
    assert (few.directory / "train.log").read_text().count(said) == 1
    Image.fromarray(load("test")[0][0].numpy()).save(tmp_path / "a.png")
    asked = (few.directory, tmp_path / "a.png", "--output", tmp_path / "out")
    assert said in command(predict, *asked) and said not in command(predict, *asked, "--no-calibrate")


def test_one_fitted_on_many_is_not_remarked(run: fmnist.RunResults) -> None:
    assert "calibrated" not in (run.directory / "train.log").read_text()  # 1,000 images


def test_onnx_has_it_inside_and_says_so(run: fmnist.RunResults, tmp_path: Path) -> None:
    assert export_main([str(run.directory), "--to", "onnx", "--output", str(tmp_path / "model.onnx")]) == 0
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert float(about["temperature"]) == run.summary["temperature"]
    images = load("test")[0][:20]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    logits, probabilities = session.run(None, {"images": images.numpy()})
    scaled = torch.from_numpy(logits).double() / run.summary["temperature"]
    assert np.abs(scaled.softmax(1).numpy() - probabilities).max() < 1e-5


def test_the_monitor_uses_it() -> None:
    features, logits = torch.eye(10)[:4], torch.tensor([[4.0, *[0.0] * 9]] * 4)
    confidences = []
    for temperature in (1.0, 2.0):
        reference = NoveltyReference(torch.eye(10).repeat(2, 1), torch.eye(10), logits, temperature)
        confidences.append(float(describe(reference, logits, features)[0, 10]))
    # e^4 / (e^4 + 9) and e^2 / (e^2 + 9)
    assert confidences == [pytest.approx(0.8585, abs=1e-4), pytest.approx(0.4509, abs=1e-4)]
