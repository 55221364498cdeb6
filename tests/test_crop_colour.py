"""Random crops and changes of colour: against torchvision, colorsys and their definitions in float64."""

import colorsys
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import warm_train as train
from torchvision.transforms.v2 import functional as tv

from fmnist.config.conflicts import Length, validate, without_effect
from fmnist.config.schema import AugmentConfig, Config, OptimConfig
from fmnist.data import augment_table as params
from fmnist.data.augment import Augment
from fmnist.data.augment_table import COLOUR, LEVEL, MATRIX, augmentation_table
from fmnist.data.batches import NUM_UNIFORMS, MicroBatch
from fmnist.data.colour import LUMA, QUARTER_TURN, recolour
from fmnist.data.split import Split
from fmnist.report.curves import loss_note

OFF = AugmentConfig(flip=0.0)
COLOURS = AugmentConfig(flip=0.0, brightness=0.4, contrast=0.3, saturation=0.5, hue=0.1)


def uniforms(count: int, **given: float) -> torch.Tensor:
    """Rows of random numbers, but for what is given: `uniforms(3, hue=1.0)`."""
    rows = torch.rand(NUM_UNIFORMS, count, generator=torch.Generator().manual_seed(0)).T.contiguous()
    for name, value in given.items():
        rows[:, getattr(params, name.upper())] = value
    return rows


def table(cfg: AugmentConfig, rows: torch.Tensor, grey: float = 0.5) -> torch.Tensor:
    return augmentation_table(cfg, rows, (28, 28), 28, whole_pixels=False, grey=grey)


def augmented(
    cfg: AugmentConfig, images: torch.Tensor, rows: torch.Tensor, fill: tuple[float, ...] = (0.5,)
) -> torch.Tensor:
    """The images as augmented by these rows, at their own size, in [0, 1]: float32 [B, C, S, S]."""
    split = Split(images=images, labels=torch.zeros(len(images), dtype=torch.int64))
    every, channels = torch.arange(len(images)), 1 if images.ndim == 3 else images.shape[1]
    batch = MicroBatch(split=split, indices=every, partners=every.flip(0), uniforms=rows, epoch=0, key=(0, 0, 0))
    cfg = replace(cfg, size=images.shape[-1])
    return Augment(cfg, num_classes=10, mean=(0.0,) * channels, std=(1.0,) * channels, fill=fill)(batch)[0]


@pytest.fixture(scope="module")
def colours() -> torch.Tensor:
    return torch.randint(0, 256, (40, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# Crops


def test_a_crop_is_torchvisions(train_images: Split) -> None:
    """A quarter of the area in the upper left corner: torchvision's, but for the edge, which reads its neighbours."""
    image = train_images.images[:1]
    rows = uniforms(1, crop_area=0.0, crop_aspect=0.5, crop_x=0.0, crop_y=0.0)
    ours = augmented(replace(OFF, crop=0.25), image, rows)[0]
    theirs = tv.resized_crop(image.float() / 255, 0, 0, 14, 14, [28, 28], antialias=False)
    assert (ours - theirs)[:, 1:-1, 1:-1].abs().max() < 1e-5
    # Twice as wide as high, in the lower right: 0.25 = 0.7071 x 0.3536, 19.8 x 9.9 pixels; its centre is white.
    rows = uniforms(1, crop_area=0.0, crop_aspect=1.0, crop_x=1.0, crop_y=1.0)
    matrix = table(replace(OFF, crop=0.25, crop_aspect=2.0), rows)[0, MATRIX].tolist()
    width, height = math.sqrt(0.5), math.sqrt(0.125)
    assert matrix == pytest.approx([width, 0, 1 - width, 0, height, 1 - height], abs=1e-6)


def test_crops_have_uniform_area_lie_inside_and_reach_every_edge() -> None:
    matrices = table(AugmentConfig(flip=0, crop=0.35), uniforms(20_000))[:, MATRIX]
    width, _, centre_x, _, height, centre_y = matrices.double().unbind(1)
    area, aspect = width * height, width / height
    # Uniform in [0.35, 1], but for those whose aspect does not fit: none, as it is drawn from what fits.
    assert area.min() < 0.351 and area.max() > 0.999
    assert area.mean() == pytest.approx(0.675, abs=0.005)  # deviation 0.65 / sqrt(12 x 20,000) = 0.0013
    assert area.std() == pytest.approx(0.65 / math.sqrt(12), abs=0.003)
    assert (aspect >= 1 / 1.33 - 1e-5).all() and (aspect <= 1.33 + 1e-5).all()
    assert aspect.max() > 1.32 and aspect.min() < 0.76
    assert aspect.log().mean().abs() < 0.01
    for side, centre in ((width, centre_x), (height, centre_y)):
        assert (side <= 1 + 1e-6).all() and (centre.abs() + side <= 1 + 1e-6).all()  # never outside the image
        room = centre[side < 0.9] / (1 - side[side < 0.9])
        assert room.min() < -0.99 and room.max() > 0.99 and room.mean().abs() < 0.02
    whole = table(AugmentConfig(flip=0, crop=0.35), uniforms(100, crop_area=1.0))[:, MATRIX]
    assert torch.allclose(whole, torch.tensor([1.0, 0, 0, 0, 1, 0]).expand(100, 6), atol=1e-6)


def test_all_of_geometry_is_one_product_of_matrices() -> None:
    """Cropped, flipped, magnified, sheared, rotated, shifted: each written out in float64, and multiplied."""
    cfg = AugmentConfig(flip=0.5, flip_vertical=0.5, crop=0.2, rotation=40, shift=0.2, scale=0.5, trivial=0.8)
    rows, seen = uniforms(200), set()
    found = table(cfg, rows)[:, MATRIX].double().view(-1, 2, 3)
    u = rows.double().numpy()
    for row, matrix in zip(u, found.numpy(), strict=True):
        area = 0.2 + 0.8 * row[params.CROP_AREA]
        aspect = math.exp((2 * row[params.CROP_ASPECT] - 1) * min(math.log(1.33), -math.log(area)))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        place_x, place_y = ((2 * row[i] - 1) * (1 - side) for i, side in ((params.CROP_X, w), (params.CROP_Y, h)))
        crop = np.array([[w, 0, place_x], [0, h, place_y], [0, 0, 1]])  # what is shown, in the image
        flips = [-1.0 if row[i] < 0.5 else 1.0 for i in (params.FLIP, params.FLIP_VERTICAL)]
        zoom = 1.5 ** (2 * row[params.ZOOM] - 1)
        operation, strength = min(5, int(row[params.TRIVIAL] / 0.8 * 5)), 2 * row[params.STRENGTH] - 1  # 5: none
        seen.add(operation)
        angle = math.radians(40 * (2 * row[params.ANGLE] - 1) + 30 * strength * (operation == 0))
        turn = np.array([[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
        shift = np.eye(3)
        shift[:2, 2] = [2 * 0.2 * (2 * row[i] - 1) for i in (params.SHIFT_X, params.SHIFT_Y)]
        shift[:2, 2] += [0.625 * strength * (operation == number) for number in (1, 2)]  # 10 of 32 pixels
        shear = np.eye(3)
        shear[0, 1], shear[1, 0] = (0.3 * strength * (operation == number) for number in (3, 4))
        # y points down, so that a turn counter-clockwise as seen has its sines exchanged.
        forward = shift @ turn @ shear @ np.diag([zoom, zoom, 1.0]) @ np.diag([*flips, 1.0]) @ np.linalg.inv(crop)
        assert np.abs(np.linalg.inv(forward)[:2] - matrix).max() < 1e-5
    assert seen == set(range(6))


def test_each_trivial_operation_comes_alone_and_as_often_as_the_others() -> None:
    matrices = table(AugmentConfig(flip=0, trivial=0.5), uniforms(20_000))[:, MATRIX].double()
    xx, xy, x, yx, yy, y = matrices.unbind(1)
    turned = (xy != 0) & (yx != 0)
    kinds = [turned, x != 0, y != 0, (xy != 0) & ~turned, (yx != 0) & ~turned]
    assert all(1850 < int(kind.sum()) < 2150 for kind in kinds)  # 2,000 expected, deviation 42
    assert int(torch.stack(kinds).sum(0).max()) == 1
    assert float(x.abs().max()) == pytest.approx(20 / 32, abs=0.001) and float(yx[kinds[4]].abs().max()) < 0.3001
    assert float(xy[kinds[3]].abs().max()) == pytest.approx(0.3, abs=0.001)
    degrees = torch.atan2(yx, yy)[turned].rad2deg()
    assert 29.9 < degrees.abs().max() < 30.01 and degrees.mean().abs() < 1.2  # deviation 30 / sqrt(3 x 2000) = 0.39
    # A shear moves along one axis only: lines of the other stay where they are.
    assert (xx == 1)[kinds[3]].all() and (y == 0)[kinds[3]].all()


def test_a_vertical_flip_is_exact_and_independent_of_the_other(train_images: Split) -> None:
    images = train_images.images[:1000]
    out = augmented(AugmentConfig(flip=0.5, flip_vertical=0.5), images, uniforms(1000))[:, 0]
    plain = images.float() / 255
    seen = [(out == other).flatten(1).all(1) for other in (plain, plain.flip(-1), plain.flip(-2), plain.flip(-1, -2))]
    assert all(200 < int(part.sum()) < 300 for part in seen)  # 250 expected, deviation sqrt(1000 x 3/16) = 14
    assert bool(torch.stack(seen).any(0).all())


# Colours


def test_the_matrix_is_brightness_contrast_saturation_and_hue_by_the_book(colours: torch.Tensor) -> None:
    """Pixel by pixel in float64, with I and Q of the FCC, before and after."""
    rows, grey = uniforms(40), 0.4
    matrices = table(COLOURS, rows, grey)[:, COLOUR].double()
    pixels = colours[:, :, 0, 0].double() / 255
    ours = torch.stack(recolour(pixels[:, :, None, None].unbind(1), matrices), dim=1)[:, :, 0, 0]
    yiq = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    turn = np.linalg.inv(yiq) @ [(0, 0, 0), (0, 0, 1), (0, -1, 0)] @ yiq
    assert np.abs(turn - QUARTER_TURN).max() < 1e-9
    u = rows.double().numpy()
    for row, pixel, found in zip(u, pixels.numpy(), ours.numpy(), strict=True):
        brightness, contrast, saturation = (
            1 + limit * (2 * row[i] - 1)
            for i, limit in ((params.BRIGHTNESS, 0.4), (params.CONTRAST, 0.3), (params.SATURATION, 0.5))
        )
        y, i, q = yiq @ (contrast * (brightness * pixel - grey) + grey)
        turned = complex(i, q) * saturation * np.exp(-1j * 2 * math.pi * 0.1 * (2 * row[params.HUE] - 1))
        expected = np.linalg.inv(yiq) @ [y, turned.real, turned.imag]
        assert np.abs(found - expected.clip(0, 1)).max() < 1e-5


@pytest.mark.parametrize("up", [0.0, 1.0])
def test_colours_are_torchvisions(colours: torch.Tensor, up: float) -> None:
    scaled, factor = colours.float() / 255, 0.6 if up == 0 else 1.4
    bright = augmented(replace(OFF, brightness=0.4), colours, uniforms(40, brightness=up))
    assert (bright - tv.adjust_brightness(scaled, factor)).abs().max() < 1e-5
    saturated = augmented(replace(OFF, saturation=0.4), colours, uniforms(40, saturation=up))
    assert (saturated - tv.adjust_saturation(scaled, factor)).abs().max() < 1e-3  # their grey has 0.2989 of red
    # Theirs is about the image's own grey: the same for an image whose grey is the data set's.
    grey = float(tv.rgb_to_grayscale(scaled[:1]).mean())
    contrast = augmented(replace(OFF, contrast=0.4), colours[:1], uniforms(1, contrast=up), fill=(grey,) * 3)
    assert (contrast - tv.adjust_contrast(scaled[:1], factor)).abs().max() < 1e-3


def test_hue_keeps_greys_and_brightness_and_turns_as_people_expect() -> None:
    matrices = table(replace(OFF, hue=0.5), uniforms(2000))[:, COLOUR].double().view(-1, 3, 4)
    greys = matrices[:, :, :3].sum(2)
    assert torch.allclose(greys, torch.ones_like(greys), atol=1e-6)  # white stays white
    luma = torch.tensor(LUMA, dtype=torch.float64)
    assert torch.allclose(luma @ matrices[:, :, :3], luma.expand(2000, 3), atol=1e-6)
    assert (matrices[:, :, 3] == 0).all()
    # A small step takes the hue of HSV along with it, up for a number above 0.5.
    for start in np.arange(0, 1, 0.1):
        pixel = torch.tensor(colorsys.hsv_to_rgb(start, 0.3, 0.5))
        for drawn, sign in ((1.0, 1), (0.0, -1)):
            matrix = table(replace(OFF, hue=0.02), uniforms(1, hue=drawn))[:, COLOUR]
            turned = torch.cat(recolour(pixel.view(1, 3, 1, 1).unbind(1), matrix)).flatten().tolist()
            step = (colorsys.rgb_to_hsv(*turned)[0] - start + 0.5) % 1 - 0.5
            assert 0.005 < sign * step < 0.06  # 0.02 of a turn in YIQ; more or less of one in HSV's hexagon


def test_grey_images_take_brightness_and_contrast(train_images: Split) -> None:
    images, rows = train_images.images[:200], uniforms(200)
    cfg = replace(OFF, brightness=0.5, contrast=0.5)
    ours = augmented(cfg, images, rows, fill=(0.286,))[:, 0]
    brightness, contrast = (0.5 + rows[:, i, None, None] for i in (params.BRIGHTNESS, params.CONTRAST))
    expected = (contrast * (brightness * (images / 255) - 0.286) + 0.286).clamp(0, 1)
    assert (ours - expected).abs().max() < 1e-5
    assert ours.max() == 1 and (expected == 1).any()  # clamped, as torchvision does
    # Saturation and hue change no grey; the same images in three channels stay grey.
    more = augmented(replace(cfg, saturation=1.0, hue=0.5), images, rows, fill=(0.286,))[:, 0]
    assert (more - ours).abs().max() < 1e-5
    three = augmented(replace(cfg, saturation=1.0, hue=0.5), images[:, None].repeat(1, 3, 1, 1), rows, fill=(0.286,))
    assert (three - ours[:, None]).abs().max() < 1e-5


def test_colour_comes_before_erasing_and_mixing(colours: torch.Tensor) -> None:
    fill, rows = (0.1, 0.2, 0.3), uniforms(40, erase=0.0)
    erased = augmented(replace(COLOURS, erase=1.0), colours, rows, fill)
    plain = augmented(COLOURS, colours, rows, fill)
    boxes = (erased != plain).any(1)
    assert boxes.flatten(1).any(1).all()
    for channel, value in enumerate(fill):  # the data set's mean, whatever the sample's colours
        assert torch.allclose(erased[:, channel][boxes], torch.tensor(value))
    mixed = augmented(replace(COLOURS, erase=1.0, mixup_alpha=1.0), colours, rows, fill)
    weight = table(replace(COLOURS, mixup_alpha=1.0), rows)[:, params.OWN_WEIGHT, None, None, None]
    assert (mixed - (weight * erased + (1 - weight) * erased.flip(0))).abs().max() < 1e-5


def test_what_is_off_is_not_in_the_table() -> None:
    rows = uniforms(500)
    geometry = AugmentConfig(rotation=10, scale=0.1, shift=0.1, erase=0.3, mixup_alpha=0.2)
    plain = table(geometry, rows)
    assert plain.shape == (500, 16)
    coloured = table(replace(geometry, brightness=0.2, saturation=0.1), rows)
    assert coloured.shape == (500, 29) and torch.equal(coloured[:, :16], plain) and (coloured[:, LEVEL] == 0).all()
    assert not torch.equal(table(replace(geometry, crop=0.5), rows)[:, MATRIX], plain[:, MATRIX])
    # Each strength is uniform in its range: the extremes are reached, 0 changes nothing.
    factors = table(replace(OFF, brightness=0.4), rows)[:, COLOUR][:, 0]
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
    none = table(replace(OFF, brightness=0.4), uniforms(1, brightness=0.5))[0, COLOUR].view(3, 4)
    assert torch.allclose(none, torch.eye(3, 4), atol=1e-6)


def test_colours_of_other_channels_are_refused() -> None:
    images = torch.zeros(2, 4, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="images have 4 channels; brightness, contrast, saturation, hue need 1 or 3"):
        augmented(replace(OFF, brightness=0.1), images, uniforms(2))
    means = (0.1, 0.2, 0.3, 0.4)
    erased = augmented(replace(OFF, erase=1.0), images, uniforms(2, erase=0.0), means)
    assert erased.amax((0, 2, 3)).tolist() == pytest.approx(means)
    with pytest.raises(ValueError, match="fill has 3 values, but images have 4 channels"):
        augmented(OFF, images, uniforms(2), means[:3])


def test_options_without_effect_are_refused_or_said() -> None:
    with pytest.raises(ValueError, match=r"augment.crop_aspect 2.0 has no effect: augment.crop is 1"):
        validate(Config(augment=AugmentConfig(crop_aspect=2.0)))
    validate(Config(augment=AugmentConfig(crop_aspect=2.0, crop=0.5)))
    cfg = Config(augment=AugmentConfig(saturation=0.2, hue=0.1, brightness=0.1, contrast=0.1))
    grey, rgb = Length(1000, 100), Length(1000, 100, 32, channels=3)
    assert without_effect(cfg, grey) == [
        "augment.saturation 0.2 has no effect: the images are grey",
        "augment.hue 0.1 has no effect: the images are grey",
    ]
    assert without_effect(cfg, rgb) == []
    average = Config(optim=OptimConfig(ema_decay=0.998))
    assert without_effect(average, Length(5148, 429)) == [
        "optim.ema_decay 0.998 is not reached: in 5,148 steps it warms up to 0.9966"
    ]
    assert without_effect(average, Length(20_000, 429)) == []  # as good as there: 0.99864
    assert without_effect(Config(optim=OptimConfig(ema_decay=0.99)), Length(2140, 214)) == []
    note = loss_note(Config(augment=AugmentConfig(flip=0, flip_vertical=0.5, crop=0.5, hue=0.1)))
    assert note == "train loss: with flips, crops, changes of colour; val loss: without"
    shift = AugmentConfig(shift=0.01, trivial=0.1)
    assert without_effect(Config(augment=shift), grey) == [] and shift.interpolates


@pytest.mark.thorough
def test_a_run_with_all_of_it_is_the_same_on_two_processes(small_config: Path, tmp_path: Path) -> None:
    options = "--augment.size 12 --augment.crop 0.35 --augment.flip_vertical 0.3 --augment.trivial 0.5 "
    options += "--augment.brightness 0.3 --augment.contrast 0.3 --augment.saturation 0.3 --batch.micro_batch_size 16"
    losses = []
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        done = train("--config", small_config, *options.split(), "--output_dir", directory, processes=processes)
        assert "augment.saturation 0.3 has no effect: the images are grey" in done.stderr
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["prefix"] == "train"])
        assert (directory / "train_batch.png").exists()
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]
