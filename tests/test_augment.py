"""Augmentation against torchvision, against a float64 warp written out pixel by pixel, and against its own promises."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from fmnist.config.schema import AugmentConfig
from fmnist.data import augment_table as params
from fmnist.data.augment import Augment, choose_backend
from fmnist.data.augment_table import (
    CUT_BOX,
    ERASE_BOX,
    MATRIX,
    OWN_SHARE,
    OWN_WEIGHT,
    augmentation_table,
    beta_quantile,
)
from fmnist.data.augment_torch import in_box, pack_channels, pack_neighbours, resample, resample_packed
from fmnist.data.batches import NUM_UNIFORMS, MicroBatch
from fmnist.data.fashion_mnist import MEAN
from fmnist.data.split import Split
from fmnist.data.whole_pixels import shift_and_flip

OFF = AugmentConfig(flip=0.0)
ALL = AugmentConfig(
    **{"flip": 0.5, "flip_vertical": 0.5, "crop": 0.3, "rotation": 10, "shift": 0.1, "scale": 0.1, "trivial": 0.8},
    **{"erase": 0.5, "mixup_alpha": 0.2, "cutmix_alpha": 1.0},
)


def make(cfg: AugmentConfig, **kwargs: object) -> Augment:
    return Augment(cfg, num_classes=10, mean=(0.0,), std=(1.0,), **kwargs)


def table(cfg: AugmentConfig, rows: torch.Tensor, size: int = 28, *, whole_pixels: bool = False) -> torch.Tensor:
    return augmentation_table(cfg, rows, (28, 28), size, whole_pixels=whole_pixels)


def augmented(cfg: AugmentConfig, images: torch.Tensor, rows: torch.Tensor, size: int = 28) -> torch.Tensor:
    """The images as augmented by these rows, in [0, 1]: float32 [B, size, size]."""
    split = Split(images=images, labels=torch.zeros(len(images), dtype=torch.int64))
    every = torch.arange(len(images))
    batch = MicroBatch(split=split, indices=every, partners=every, uniforms=rows, epoch=0, key=(0, 0, 0))
    return make(replace(cfg, size=size))(batch)[0][:, 0]


def uniforms(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(NUM_UNIFORMS, count, generator=torch.Generator().manual_seed(seed)).T.contiguous()


def micro_batch(split: Split, indices: torch.Tensor, epoch: int = 0) -> MicroBatch:
    return MicroBatch(
        split=split,
        indices=indices,
        partners=indices.flip(0),
        uniforms=uniforms(len(split), epoch),
        epoch=epoch,
        key=(0, 0, 0),
    )


def warp_float64(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """The warp by its definition: one output pixel at a time, in float64."""
    height, width = image.shape
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            place = matrix @ np.array([(2 * j + 1) / size - 1, (2 * i + 1) / size - 1, 1.0])
            x, y = (place[0] + 1) * width / 2 - 0.5, (place[1] + 1) * height / 2 - 0.5
            beyond_x = max(-0.5 - x, x - (width - 0.5), 0.0)
            beyond_y = max(-0.5 - y, y - (height - 0.5), 0.0)
            fade = max(0.0, 1 - 2 * beyond_x) * max(0.0, 1 - 2 * beyond_y)
            x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
            x0, y0 = min(int(x), width - 2), min(int(y), height - 2)
            top = image[y0, x0] * (x0 + 1 - x) + image[y0, x0 + 1] * (x - x0)
            bottom = image[y0 + 1, x0] * (x0 + 1 - x) + image[y0 + 1, x0 + 1] * (x - x0)
            out[i, j] = fade * (top * (y0 + 1 - y) + bottom * (y - y0)) / 255
    return out


@pytest.mark.parametrize("size", [28, 32, 64, 96, 224])
def test_the_identity_is_torchvisions_bilinear_resize(train_images: Split, size: int) -> None:
    images = train_images.images[:16]
    # A size that is not the stored one interpolates; at 28 px a rotation of 0 degrees does too.
    ours = resample(images[:, None], table(OFF, uniforms(16), size)[:, MATRIX], size)[:, 0]
    theirs = tv.resize(images[:, None].float() / 255, [size, size], antialias=False)[:, 0]
    assert (ours - theirs).abs().max() < 1 / 255
    assert torch.equal(make(OFF).evaluation(images, size)[:, 0], theirs)


@pytest.mark.parametrize("size", [28, 40, 64])
def test_the_warp_equals_its_definition_in_float64(train_images: Split, size: int) -> None:
    matrices = table(ALL, uniforms(3, seed=size), size)[:, MATRIX]
    images = train_images.images[:3, None]
    packed = pack_neighbours(images, torch.arange(3))
    assert packed.dtype == torch.int32 and packed.shape == (3, 1, 29, 29)
    for ours in (resample(images, matrices, size)[:, 0], resample_packed(packed, matrices, size)[0]):
        for i in range(3):
            matrix = matrices[i].double().numpy().reshape(2, 3)
            exact = warp_float64(train_images.images[i].double().numpy(), matrix, size)
            assert np.abs(ours[i].numpy() - exact).max() < 1e-4  # the bar is 2/255 = 7.8e-3


@pytest.mark.parametrize("shape", [(28, 28), (9, 17), (2, 3)])
@pytest.mark.parametrize("size", [8, 40])
def test_packed_by_channels_or_neighbours_a_pixel_is_the_same(shape: tuple[int, int], size: int) -> None:
    """Beyond every edge too: the matrices turn, zoom out and shift, and some show nothing of the image."""
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(256, (5, 3, *shape), generator=generator, dtype=torch.uint8)
    samples = torch.tensor([4, 0, 2, 2, 1, 3])
    matrices = 4 * torch.rand(6, 6, generator=generator) - 2
    matrices[0] = torch.tensor([1.0, 0, 0, 0, 1, 0])
    matrices[1] = torch.tensor([1.0, 0, 9, 0, 1, 0])
    packed = pack_channels(images, samples)
    assert packed.dtype == torch.int32 and packed.shape == (6, *shape)
    by_channels = torch.stack(resample_packed(packed, matrices, size), dim=1)
    by_neighbours = torch.stack(resample_packed(pack_neighbours(images, samples), matrices, size), dim=1)
    assert torch.equal(by_channels, by_neighbours)
    assert (by_channels - resample(images[samples], matrices, size)).abs().max() < 1e-4
    assert by_channels[1].abs().max() == 0 and by_channels[0].max() > 0


def test_the_integer_path_is_the_warp_without_interpolation(train_images: Split) -> None:
    cfg = AugmentConfig(flip=0.5, shift=0.15)
    matrices = table(cfg, uniforms(64), whole_pixels=True)[:, MATRIX]
    exact = shift_and_flip(train_images.images[:64, None], matrices, 28)
    assert torch.equal((exact * 255).round(), exact * 255)  # only values of the original
    assert (exact - resample(train_images.images[:64, None], matrices, 28)).abs().max() < 1e-4
    shifts = (matrices[:, 5] * 14).round().unique().tolist()
    assert shifts == [float(n) for n in range(-4, 5)]  # 0.15 * 28 = 4.2 pixels


def test_a_flip_gives_the_image_or_its_mirror(train_images: Split) -> None:
    images = train_images.images[:500]
    out = augmented(AugmentConfig(flip=0.5), images, uniforms(500))
    plain = images.float() / 255
    same, mirrored = ((out == other).flatten(1).all(1) for other in (plain, plain.flip(-1)))
    assert bool((same | mirrored).all())
    assert 200 < int(mirrored.sum()) < 300  # 250 expected, deviation sqrt(500)/2 = 11


def test_a_flip_in_turn_shows_each_image_both_ways_in_two_epochs(train_images: Split) -> None:
    augment, every = make(AugmentConfig(flip=0.5, flip_in_turn=True, shift=0.1)), torch.arange(2000)
    tables = [augment.table(micro_batch(train_images, every, epoch)) for epoch in range(4)]
    mirrored = torch.stack([table[:, 0] < 0 for table in tables])
    assert torch.equal(mirrored[0], ~mirrored[1]) and torch.equal(mirrored[0], mirrored[2])
    assert torch.equal(mirrored[1], mirrored[3])
    assert 900 < int(mirrored[0].sum()) < 1100  # 1000 expected, deviation sqrt(2000)/2 = 22
    # What else is drawn stays: the shift along y is that of a run without it.
    plain = make(AugmentConfig(flip=0.5, shift=0.1)).table(micro_batch(train_images, every, 3))
    assert torch.equal(tables[3][:, 5], plain[:, 5])
    # With a flip of 0.2 no image is mirrored in both of two epochs, and 0.2 of them are in each.
    rare = make(AugmentConfig(flip=0.2, flip_in_turn=True))
    first, second = (rare.table(micro_batch(train_images, every, epoch))[:, 0] < 0 for epoch in range(2))
    assert not (first & second).any()
    assert all(330 < int(part.sum()) < 470 for part in (first, second))  # 400 expected, deviation 18


def test_directions_are_those_people_expect(train_images: Split) -> None:
    image = train_images.images[:1]
    row = torch.full((1, NUM_UNIFORMS), 0.5)
    right = row.clone()
    right[0, params.SHIFT_X] = 1.0
    moved = augmented(AugmentConfig(flip=0, shift=2 / 28), image, right)
    assert torch.equal(moved[0, :, 2:], image[0, :, :-2].float() / 255)
    assert moved[0, :, :2].sum() == 0
    turned = row.clone()
    turned[0, params.ANGLE] = 1.0  # +15 degrees
    ours = augmented(AugmentConfig(flip=0, rotation=15), image, turned)[0]
    theirs = tv.rotate(image.float() / 255, 15, interpolation=tv.InterpolationMode.BILINEAR)[0]  # counter-clockwise
    assert (ours - theirs)[4:-4, 4:-4].abs().max() < 2 / 255
    larger = row.clone()
    larger[0, params.ZOOM] = 1.0
    zoomed = augmented(AugmentConfig(flip=0, scale=1.0), torch.full((1, 28, 28), 255, dtype=torch.uint8), larger)
    assert zoomed.min() > 0.999  # magnified twice: the border lies outside


def test_erasing_takes_2_to_33_percent_of_half_the_images(train_images: Split) -> None:
    cfg = AugmentConfig(flip=0, erase=0.5)
    white = torch.full((1000, 28, 28), 255, dtype=torch.uint8)
    erased = (augmented(cfg, white, uniforms(1000), 64) != 1).float().mean((1, 2))
    hit = erased[erased > 0]
    assert 430 < len(hit) < 570  # 500 expected, deviation 16
    assert hit.min() > 0.01
    assert hit.max() < 0.36  # 33 %, and a pixel row more where the box is cut by the grid
    assert augmented(cfg, white, uniforms(1000)).unique().tolist() == pytest.approx([MEAN, 1.0])


@pytest.mark.parametrize(("alphas", "kind"), [((0.4, 0.0), "mixup"), ((0.0, 1.0), "cutmix"), ((0.4, 1.0), "both")])
def test_mixed_images_and_targets_agree(train_images: Split, alphas: tuple[float, float], kind: str) -> None:
    """A white image mixed with a black one shows how much of it is left; the target must say the same."""
    images = torch.zeros(200, 28, 28, dtype=torch.uint8)
    images[:100] = 255
    split = Split(images=images, labels=(torch.arange(200) < 100).long())  # white is 1, black is 0
    augment = make(AugmentConfig(flip=0, mixup_alpha=alphas[0], cutmix_alpha=alphas[1]))
    out, targets = augment(micro_batch(split, torch.arange(200)))
    assert torch.allclose(out.mean((1, 2, 3)), targets[:, 1], atol=1e-6)
    assert torch.allclose(targets.sum(1), torch.ones(200))
    assert targets[:100, 1].min() < 0.9  # something was mixed
    values = out.unique()
    assert kind != "cutmix" or values.tolist() == [0.0, 1.0]
    assert kind != "mixup" or all(len(image.unique()) == 1 for image in out)


def test_the_share_of_a_label_is_the_share_of_its_pixels() -> None:
    rows = table(replace(ALL, mix_probability=0.8), uniforms(500), 40)
    cut = in_box(rows[:, CUT_BOX], 40)
    weight = torch.where(cut, 0.0, rows[:, OWN_WEIGHT, None, None])
    assert torch.allclose(weight.mean((1, 2)), rows[:, OWN_SHARE], atol=1e-6)
    assert torch.equal(rows[:, ERASE_BOX].round(), rows[:, ERASE_BOX])
    untouched = float((rows[:, OWN_SHARE] == 1).float().mean())
    assert 0.15 < untouched < 0.3  # 0.2 are not mixed, and a few boxes or lambdas round to nothing


def test_beta_weights_have_the_moments_of_beta() -> None:
    draws = beta_quantile(torch.rand(200_000, generator=torch.Generator().manual_seed(0)), 0.4)
    assert abs(draws.mean() - 0.5) < 0.005
    assert abs(draws.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.002  # variance of Beta(a, a): 1 / (4 (2a + 1))


def test_a_sample_does_not_depend_on_its_neighbours(train_images: Split) -> None:
    cfg = replace(ALL, mixup_alpha=0.0, cutmix_alpha=0.0)
    rows = uniforms(16)
    together = augmented(cfg, train_images.images[:16], rows, 48)
    alone = torch.cat([augmented(cfg, train_images.images[i : i + 1], rows[i : i + 1], 48) for i in range(16)])
    assert (together - alone).abs().max() < 1e-6


def test_colour_images_keep_their_channels(train_images: Split) -> None:
    """Three-channel sources, such as CIFAR's, go through the same code: each channel as if it were alone."""
    grey = train_images.images[:24].view(8, 3, 28, 28)
    statistics = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    augment = Augment(replace(ALL, size=40), num_classes=10, **statistics)
    split = Split(images=grey, labels=train_images.labels[:8])
    colour, _ = augment(micro_batch(split, torch.arange(8)))
    for channel in range(3):
        alone = Augment(replace(ALL, size=40), num_classes=10, mean=(0.0,), std=(1.0,))
        one = Split(images=grey[:, channel], labels=split.labels)
        expected, _ = alone(micro_batch(one, torch.arange(8)))
        mean, std = statistics["mean"][channel], statistics["std"][channel]
        assert torch.allclose(colour[:, channel], (expected[:, 0] - mean) / std, atol=1e-6)


def test_the_backend_is_chosen_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    host, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_backend("auto", device) for device in (host, gpu)] == ["eager", "triton"]
    assert [choose_backend(wish, host) for wish in ("compiled", "eager")] == ["compiled", "eager"]
    with pytest.raises(
        ValueError, match="augment.backend is triton, which needs a CUDA device and .* triton; valid here: auto"
    ):
        choose_backend("triton", host)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend("auto", gpu) == "eager"
    with pytest.raises(ValueError, match="needs a CUDA device and the package triton"):
        choose_backend("triton", gpu)


def test_the_size_follows_the_epoch() -> None:
    augment = make(AugmentConfig(size={0: 96, 4: 128, 8: 224}))
    assert [augment.size(epoch) for epoch in (0, 3, 4, 7, 8, 100)] == [96, 96, 128, 128, 224, 224]
    assert augment.final_size == 224


def test_batches_have_the_shape_the_model_wants(train_images: Split) -> None:
    cfg = replace(ALL, size=40)
    one = Augment(cfg, num_classes=10, mean=(0.286,), std=(0.353,))
    three = Augment(cfg, num_classes=10, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), channels_last=True)
    batch = micro_batch(train_images, torch.arange(7))
    images, targets = one(batch)
    colour, _ = three(batch)
    assert (images.shape, targets.shape, images.dtype) == ((7, 1, 40, 40), (7, 10), torch.float32)
    assert colour.shape == (7, 3, 40, 40)
    assert colour.is_contiguous(memory_format=torch.channels_last)
    # The three channels are the one, with other statistics: channel 1 undone and redone is channel 0.
    assert torch.allclose(colour[:, 1] * 0.224 + 0.456, images[:, 0] * 0.353 + 0.286, atol=1e-5)
    plain, labels = Augment(OFF, num_classes=10, mean=(0.286,), std=(0.353,))(batch)
    assert torch.equal(labels, train_images.labels[:7])
    assert plain.mean().abs() < 0.5


def test_normalisation_gives_mean_0_and_std_1_on_the_real_images(train_images: Split) -> None:
    images = Augment(OFF, num_classes=10, mean=(0.286,), std=(0.353,)).evaluation(train_images.images, 28)
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02


def test_rotation_is_uniform_within_its_bounds() -> None:
    matrices = table(AugmentConfig(flip=0, rotation=30), uniforms(5000))[:, MATRIX]
    degrees = torch.atan2(matrices[:, 3], matrices[:, 4]) * 180 / math.pi
    assert degrees.abs().max() <= 30.001
    assert abs(float(degrees.std()) - 30 / math.sqrt(3)) < 0.5  # of a uniform on [-30, 30]
