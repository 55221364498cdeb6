"""Temperature scaling, on logits scaled by a known factor."""

import math

import pytest
import torch

from fmnist.evaluation.calibration import (
    ENOUGH_IMAGES,
    average_probabilities,
    calibrate,
    few_images,
    fit_temperature,
    usable_temperature,
)


def calibrated(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from exactly the probabilities that they state."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_images, 10, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_known_factor_is_found_and_taken_back(factor: float) -> None:
    (val, val_labels), (logits, labels) = calibrated(20_000, 1), calibrated(20_000, 2)
    # Labels follow softmax(logits); a model that states factor * logits needs the temperature `factor`. Its standard
    # error with 20,000 labels is about 1 %.
    assert fit_temperature(factor * val, val_labels) == pytest.approx(factor, rel=0.04)
    fitted = calibrate(factor * logits, labels, (factor * val, val_labels), same_images=False)
    assert fitted.temperature == fit_temperature(factor * val, val_labels)
    assert fitted.ece_after < 0.02  # calibrated by construction; with finite bins a little is left
    assert fitted.loss_after <= fitted.loss_before + 1e-4
    assert fitted.num_images == 20_000
    if factor != 1.0:
        assert fitted.ece_before > 0.1


def test_temperature_of_two_images_by_hand() -> None:
    # Four images with logits (1, 0), three of them right: least loss where 1 / (1 + exp(-1 / T)) = 3/4,
    # so 1 / T = ln 3 and T = 1 / 1.0986 = 0.9102.
    logits = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    assert fit_temperature(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(1 / math.log(3), rel=1e-4)


def test_too_few_images_are_said_at_the_number_where_ten_percent_begins() -> None:
    assert few_images(200) == few_images(5000) == ""
    rest = "with fewer than 200 a temperature may make them worse"
    assert few_images(199) == f"confidences are not calibrated on 199 validation images: {rest}"
    assert few_images(1) == f"confidences are not calibrated on 1 validation image: {rest}"
    # The reason for the number: 40 fits, each on 200 labels that follow the probabilities, spread by about 10 %.
    fits = torch.tensor([math.log(fit_temperature(*calibrated(ENOUGH_IMAGES, seed))) for seed in range(40)])
    assert 0.07 < float(fits.std()) < 0.13


def test_few_images_and_a_fit_at_a_limit_leave_the_temperature_at_one() -> None:
    # 12 images, all right: the colder the lower the loss, down to the limit of the search. The images that
    # are evaluated have errors too, and their loss would rise.
    sure = 4 * torch.eye(3)
    val, labels = sure.repeat(4, 1), torch.arange(3).repeat(4)
    assert fit_temperature(val, labels) < 0.1  # from there on the loss is 0 in float64
    few = calibrate(sure, torch.tensor([0, 1, 1]), (val, labels), same_images=False)
    assert (few.temperature, few.why_not, few.num_images) == (1.0, few_images(12), 12)
    assert (few.ece_before, few.loss_before) == (few.ece_after, few.loss_after)

    at_limit = "confidences are not calibrated: the temperature ends at {}, a limit of its search"
    assert usable_temperature(sure.repeat(100, 1), labels.repeat(25)) == (1.0, at_limit.format(0.05))
    assert usable_temperature(sure.repeat(100, 1), labels.roll(1).repeat(25)) == (1.0, at_limit.format(20))
    logits, labels = calibrated(ENOUGH_IMAGES, 0)
    assert usable_temperature(logits, labels) == (fit_temperature(logits, labels), "")


def test_averaged_probabilities_by_hand() -> None:
    # (0.9, 0.1) and (0.2, 0.8) average to (0.55, 0.45); softmax of the logarithms gives them back.
    parts = [torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.2, 0.8]]).log() + 5.0]
    averaged = average_probabilities(parts)
    assert averaged.softmax(dim=1).tolist()[0] == pytest.approx([0.55, 0.45], abs=1e-6)
    certain = average_probabilities([torch.tensor([[1000.0, 0.0]])] * 2)
    assert certain.isfinite().all()
