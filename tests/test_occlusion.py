"""Occlusion maps: against a direct loop, on models with a known answer, on every kind of model, and as drawn."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from other_sets import untrained_on, write_npz
from PIL import Image
from small import command, untrained
from torch import Tensor

from fmnist.apps.predict.__main__ import main as predict
from fmnist.config.schema import ModelConfig
from fmnist.data.fashion_mnist import load_split
from fmnist.evaluation import occlusion
from fmnist.evaluation.occlusion import PLACES, explain_errors, occlusion_map
from fmnist.report.overlay import AGAINST, FOR, overlay
from fmnist.trained import Trained, open_trained


def by_a_loop(trained: Trained, image: Tensor, label: int) -> Tensor:
    """The same map, its patches cut one at a time."""
    height, width = image.shape[-2:]
    patch = max(1, round(height / 4)), max(1, round(width / 4))
    pictures, places = [image], []
    for i in range(14):
        for j in range(14):
            top = (2 * i + 1) * height // 28 - patch[0] // 2
            left = (2 * j + 1) * width // 28 - patch[1] // 2
            place = slice(max(0, top), top + patch[0]), slice(max(0, left), left + patch[1])
            covered = image.clone()
            for channel, mean in enumerate(trained.info.mean):
                (covered if image.ndim == 2 else covered[channel])[place] = round(255 * mean)
            pictures.append(covered)
            places.append(place)
    whole, *others = trained.probabilities(trained(torch.stack(pictures))[0])[:, label].tolist()
    total, times = torch.zeros(height, width), torch.zeros(height, width)
    for place, probability in zip(places, others, strict=True):
        total[place] += whole - probability
        times[place] += 1
    return total / times


@pytest.mark.parametrize("model", ["mlp", "cnn", "mobilenetv3_small_050"])
def test_it_is_that_of_a_direct_loop(model: str, tmp_path: Path) -> None:
    options = {"widths": [8, 16, 32]} if model == "cnn" else {}
    run = untrained(tmp_path / "run", ModelConfig(name=model, options=options), 32 if "mobile" in model else 28)
    trained, image = open_trained(run, "cpu"), load_split("test", None, 0)[0][3]
    found = occlusion_map(trained, image, 2)
    assert found.shape == (28, 28) and found.dtype == torch.float32
    assert torch.allclose(found, by_a_loop(trained, image, 2), atol=1e-6, rtol=1e-3)
    assert float(found.abs().max()) > 1e-5  # a model as drawn: it depends on the picture a little


@pytest.mark.parametrize("shape", [(12, 20, 3), (33, 9)])
def test_any_shape_in_colour_and_grey(shape: tuple[int, ...], tmp_path: Path) -> None:
    trained = open_trained(untrained_on(write_npz(tmp_path / "a.npz", 5, shape), tmp_path / "run"), "cpu")
    image = trained.split("test").images[0]
    found = occlusion_map(trained, image, 1)
    assert found.shape == image.shape[-2:]
    assert torch.allclose(found, by_a_loop(trained, image, 1), atol=1e-6, rtol=1e-3)


class LooksAt:
    """A model whose first class depends on one pixel alone: bright, it is sure of it."""

    def __init__(self, row: int, column: int, sign: float = 1.0) -> None:
        self.place, self.sign, self.seen = (row, column), sign, 0
        self.info = SimpleNamespace(mean=(0.0,))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(images)
        value = self.sign * (images[:, self.place[0], self.place[1]].float() / 255 - 0.5)
        return torch.stack([20 * value, torch.zeros_like(value)], dim=1), images

    def probabilities(self, logits: Tensor, *, calibrate: bool = True) -> Tensor:
        return logits.double().softmax(1)


@pytest.mark.parametrize(("row", "column"), [(14, 14), (0, 0), (27, 5)])
def test_a_model_that_looks_at_one_pixel(row: int, column: int) -> None:
    image = torch.full((28, 28), 255, dtype=torch.uint8)
    model = LooksAt(row, column)
    found = occlusion_map(model, image, 0)  # type: ignore[arg-type]
    assert model.seen == 1 + PLACES**2
    # A patch is 7 pixels wide, so only pixels closer than 7 share one with it; the pixel itself always does.
    assert found[row, column] == found.max() == pytest.approx(1, abs=1e-4)
    distant = (torch.arange(28)[:, None] - row).abs().maximum((torch.arange(28)[None] - column).abs()) >= 7
    assert found[distant].abs().max() == 0
    against = occlusion_map(LooksAt(row, column, -1), image, 0)  # type: ignore[arg-type]
    assert against[row, column] == against.min() == pytest.approx(-1, abs=1e-4)


def test_a_report_explains_as_many_errors_as_its_seconds_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    images, logits = torch.full((5, 28, 28), 255, dtype=torch.uint8), torch.tensor([[1.0, 0.0]] * 5)
    outcome = SimpleNamespace(trained=LooksAt(3, 3), images=images, logits=logits)
    maps, seconds = explain_errors(outcome, [4, 0, 2])  # type: ignore[arg-type]
    assert len(maps) == 3 and 0 < seconds < 5
    monkeypatch.setattr(occlusion, "LIMIT_S", 1e-9)
    assert len(explain_errors(outcome, [4, 0, 2])[0]) == 1  # type: ignore[arg-type]
    outcome.trained = None  # an ensemble
    assert explain_errors(outcome, [4, 0, 2]) == ([], 0.0)  # type: ignore[arg-type]


def test_colours_say_for_and_against() -> None:
    image = torch.full((2, 2), 100, dtype=torch.uint8)
    drawn = overlay(image, torch.tensor([[0.5, -0.2], [0.0, 0.0]]))
    assert drawn.shape == (3, 2, 2) and drawn[:, 1, 0].tolist() == [100] * 3
    assert drawn[:, 0, 0].tolist() == [round(0.15 * 100 + 0.85 * part) for part in FOR]
    assert drawn[:, 0, 1].tolist() == [round(0.66 * 100 + 0.34 * part) for part in AGAINST]
    faint = overlay(image, torch.full((2, 2), 0.005))  # a tenth of what is worth full colour
    assert faint[:, 0, 0].tolist() == [round(0.915 * 100 + 0.085 * part) for part in FOR]
    colour = torch.stack([image, image + 30, image - 30])
    assert overlay(colour, torch.zeros(2, 2))[:, 0, 0].tolist() == [100] * 3


def test_predict_draws_them_on_the_sheet(tmp_path: Path) -> None:
    run = untrained_on(write_npz(tmp_path / "shapes.npz", 5, (12, 12, 3)), tmp_path / "run")
    (tmp_path / "pictures").mkdir()
    for index, image in enumerate(open_trained(run, "cpu").split("test").images[:3]):
        Image.fromarray(image.movedim(0, -1).numpy()).save(tmp_path / f"pictures/{index}.png")
    (tmp_path / "pictures/3.png").write_bytes(b"")
    sizes = []
    for more in ((), ("--explain",), ("--explain", "--sheet", 2)):
        output = tmp_path / f"out{len(sizes)}"
        command(predict, run, tmp_path / "pictures", "--output", output, *more)
        sizes.append(Image.open(output / "predictions.png").size)
    assert sizes[1][0] == sizes[0][0] + 4 * (112 + 4)  # a third picture in each of four columns
    assert sizes[1][1] == sizes[0][1] + 16 and sizes[2][0] == 960
    assert (tmp_path / "out0/predictions.csv").read_bytes() == (tmp_path / "out1/predictions.csv").read_bytes()
