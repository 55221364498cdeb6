"""Images shrunk by 2 or more: the pyramid against exact means, and the warp against exact areas of real photos."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from fmnist.config.schema import AugmentConfig
from fmnist.data import pyramid as module
from fmnist.data.augment import Augment, pyramid_bytes
from fmnist.data.augment_table import LEVEL, MATRIX, augmentation_table, levels_read
from fmnist.data.augment_torch import resample
from fmnist.data.batches import NUM_UNIFORMS, MicroBatch
from fmnist.data.pyramid import at_level, build_pyramid, level_of, shrink
from fmnist.data.split import Split

OFF = AugmentConfig(flip=0.0)
CROP = replace(OFF, crop=0.35)


def uniforms(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(NUM_UNIFORMS, count, generator=torch.Generator().manual_seed(seed)).T.contiguous()


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def overlaps(side: int, low: float, high: float, count: int) -> np.ndarray:
    """How much of each pixel lies in each of `count` equal parts of [low, high], of their length: float64."""
    edges = np.linspace(low, high, count + 1)
    pixels = np.arange(side)
    shared = np.minimum(pixels + 1, edges[1:, None]) - np.maximum(pixels, edges[:-1, None])
    return shared.clip(0) / ((high - low) / count)


def area_exact(image: torch.Tensor, matrix: torch.Tensor, size: int) -> np.ndarray:
    """What each output pixel covers of an upright image [C, H, W], its mean, in [0, 1]: float64 [C, size, size]."""
    a, b, c, d, e, f = matrix.double().tolist()
    assert b == d == 0
    height, width = image.shape[-2:]
    rows = overlaps(height, (f + 1 - e) * height / 2, (f + 1 + e) * height / 2, size)
    columns = overlaps(width, (c + 1 - a) * width / 2, (c + 1 + a) * width / 2, size)
    return rows @ (image.double().numpy() / 255) @ columns.T


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """scikit-learn's two, a temple and a flower: uint8 [2, 3, 427, 640]."""
    return torch.tensor(np.stack(load_sample_images().images)).movedim(-1, 1)


def make(cfg: AugmentConfig, **more: object) -> Augment:
    return Augment(cfg, num_classes=10, mean=(0.0,) * 3, std=(1.0,) * 3, **more)


def everything(images: torch.Tensor, epoch: int = 0) -> MicroBatch:
    every, split = torch.arange(len(images)), Split(images=images, labels=torch.zeros(len(images), dtype=torch.int64))
    rows = uniforms(len(images), epoch)
    return MicroBatch(split=split, indices=every, partners=every.flip(0), uniforms=rows, epoch=epoch, key=(0, 0, 0))


# The levels


@pytest.mark.parametrize("shape", [(16, 16), (28, 28), (31, 20), (17, 40), (33, 65), (9, 300)], ids=str)
def test_each_level_is_the_exact_mean_rounded_once(shape: tuple[int, int]) -> None:
    images = noise(3, 2, *shape)
    for level in range(1, 4):
        small = [side >> level for side in shape]
        # Means as integers over one denominator: 'small' parts of each pixel, 'side' of them under one of the level.
        rows, columns = (
            np.rint(overlaps(side, 0, side, count) * side).astype(np.int64)
            for side, count in zip(shape, small, strict=True)
        )
        totals, area = rows @ images.numpy().astype(np.int64) @ columns.T, shape[0] * shape[1]
        quotient, rest = np.divmod(totals, area)
        up = (2 * rest > area) | ((2 * rest == area) & (quotient % 2 == 1))
        found = shrink(images, level)
        assert found.dtype == torch.uint8 and found.shape == (3, 2, *small)
        assert np.array_equal(found.numpy(), quotient + up)


def test_halfway_goes_to_the_even_number_and_a_plain_image_stays_plain() -> None:
    pairs = torch.tensor([[[[0, 1], [0, 1]]], [[[1, 2], [1, 2]]], [[[254, 255], [255, 254]]]], dtype=torch.uint8)
    assert shrink(pairs, 1).flatten().tolist() == [0, 2, 254]  # 0.5, 1.5 and 254.5
    for value in (0, 1, 127, 255):
        for level in range(1, 5):
            assert (shrink(torch.full((1, 1, 37, 53), value, dtype=torch.uint8), level) == value).all()


def test_sums_too_large_for_int32_are_exact() -> None:
    white = torch.full((1, 1, 3001, 3003), 255, dtype=torch.uint8)  # 255 x 3001 x 3003 = 2.3e9, above 2^31
    assert (shrink(white, 1) == 255).all()


def test_the_pyramid_holds_each_level_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(7, 3, 37, 50)
    whole = build_pyramid(images, 3)
    assert whole.shape == (7, 3 * (18 * 25 + 9 * 12 + 4 * 6)) and whole.is_contiguous()
    for level in range(4):
        assert torch.equal(at_level(images, whole, level), shrink(images, level))
    monkeypatch.setattr(module, "CHUNK", 3 * 37 * 50 * 2 + 1)  # two images at a time
    assert torch.equal(build_pyramid(images, 3), whole)
    monkeypatch.setattr(module, "CHUNK", 1)
    assert torch.equal(build_pyramid(images, 3), whole)


def test_the_level_has_no_fewer_pixels_than_the_output() -> None:
    shapes = {1.0: 0, 1.99: 0, 2.0: 1, 3.99: 1, 4.0: 2, 8.0: 3, 0.2: 0}
    assert {shrinking: level_of(shrinking, (512, 512)) for shrinking in shapes} == shapes
    # Two pixels are left of the shorter side, as an interpolation needs.
    assert [level_of(1000, (side, 2000)) for side in (2, 3, 4, 7, 8, 28)] == [0, 0, 1, 1, 2, 3]


# Which level a sample reads


@pytest.mark.parametrize("shape", [(256, 256), (300, 200), (64, 512)], ids=str)
@pytest.mark.parametrize(
    "cfg",
    [
        OFF,
        CROP,
        replace(OFF, scale=1.0, rotation=180),
        replace(CROP, crop=0.01, crop_aspect=4.0, scale=0.3, trivial=1.0),
    ],
    ids=["off", "crop", "zoom", "all"],
)
def test_each_sample_reads_the_level_of_its_own_matrix(cfg: AugmentConfig, shape: tuple[int, int]) -> None:
    size = 24
    table = augmentation_table(cfg, uniforms(5000), shape, size, whole_pixels=False)
    linear = table[:, MATRIX].double().view(-1, 2, 3)[:, :, :2] * torch.tensor([[shape[1]], [shape[0]]]) / size
    shrinking = torch.linalg.svdvals(linear)[:, 1]  # of the direction that has fewest pixels
    exact = (shrinking.log2() + 1e-4).floor().clamp(min=0)
    near = (shrinking.log2() - shrinking.log2().round()).abs() < 1e-3  # a power of 2, to the rounding of float32
    levels = levels_read(cfg, shape, size)
    assert torch.equal(table[~near, LEVEL].double(), exact[~near]) and ((table[:, LEVEL] - exact).abs() <= 1).all()
    assert (table[:, LEVEL] >= levels[0]).all() and (table[:, LEVEL] <= levels[-1]).all()
    assert exact[~near].max() <= levels[-1] and exact[~near].min() >= levels[0]  # nothing was cut off


def test_nothing_is_made_where_nothing_shrinks_by_2(train_images: Split) -> None:
    for cfg in (
        OFF,
        replace(OFF, size=15),  # 28 / 15 = 1.87
        replace(OFF, size={0: 20, 5: 28}, rotation=180, shift=0.5),
        replace(OFF, scale=0.9),
        replace(OFF, size=224, scale=1.0, crop=0.1),
    ):
        augment = Augment(cfg, num_classes=10, mean=(0.0,), std=(1.0,))
        batch = everything(train_images.images[:4])
        augment(batch)
        assert pyramid_bytes(augment.cfg, batch.split.images) == 0
        assert augment.pyramid(batch.split.images) is None and augment.table(batch).shape[1] == 16
    assert levels_read(replace(OFF, crop=0.1), (28, 28), 14) == range(2)  # and a whole image at half its size


def test_the_pyramid_is_made_once_and_serves_every_size_of_a_run() -> None:
    images = noise(6, 3, 64, 64)
    augment = make(replace(OFF, size={0: 16, 1: 32, 2: 64}))
    assert pyramid_bytes(augment.cfg, images) == 6 * 3 * (32 * 32 + 16 * 16)  # said by the plan, before it is made
    assert pyramid_bytes(augment.cfg, images[:, 0]) == 6 * (32 * 32 + 16 * 16)
    pyramid = augment.pyramid(images)
    assert pyramid is not None and pyramid.shape == (6, 3 * (32 * 32 + 16 * 16))  # level 2, for 16 pixels
    for epoch, size, level in ((0, 16, 2), (1, 32, 1), (2, 64, 0)):
        batch = everything(images, epoch)
        made = augment(batch)[0]
        assert augment.pyramid(images) is pyramid and augment.plan(size, (64, 64)).levels == range(level, level + 1)
        assert (made * 255 - shrink(images, level)).abs().max() < 1e-4  # a power of 2: just the level


# Against exact areas


def errors(cfg: AugmentConfig, photos: torch.Tensor, size: int, count: int) -> list[tuple[float, float]]:
    """Return the mean and the largest error in [0, 1] units: read from the stored images, and from their levels."""
    table = augmentation_table(cfg, uniforms(count), photos.shape[-2:], size, whole_pixels=False)
    pyramid = build_pyramid(photos, levels_read(cfg, photos.shape[-2:], size)[-1])
    found: list[list[np.ndarray]] = [[], []]
    for index, row in enumerate(table):
        image = photos[index % 2, None]
        exact = area_exact(image[0], row[MATRIX], size)
        level = at_level(photos, pyramid, int(row[LEVEL]))[index % 2, None]
        for errors, source in zip(found, (image, level), strict=True):
            errors.append(np.abs(resample(source, row[None, MATRIX].double(), size)[0].numpy() - exact))
    return [(float(np.mean(part)), float(np.max(part))) for part in found]


@pytest.mark.parametrize(
    ("cfg", "stored", "size", "before", "after"),
    [
        (OFF, 256, 64, (0.0136, 0.235), (0.0010, 0.00196)),  # the level itself: rounded by at most 0.5 / 255
        (OFF, 256, 96, (0.0107, 0.236), (0.0052, 0.116)),  # 2.67 times: from level 1
        (CROP, 256, 64, (0.0143, 0.346), (0.0065, 0.257)),
        (CROP, 0, 64, (0.0273, 0.567), (0.0088, 0.333)),  # 427 x 640 as they are
        (replace(CROP, crop=0.08), 0, 96, (0.0179, 0.495), (0.0093, 0.331)),
    ],
)
def test_errors_against_exact_areas_of_photos(
    photos: torch.Tensor,
    cfg: AugmentConfig,
    stored: int,
    size: int,
    before: tuple[float, float],
    after: tuple[float, float],
) -> None:
    if stored:
        whole = torch.tensor([1.0, 0, 0, 0, 1, 0])
        photos = torch.tensor(np.stack([area_exact(photo, whole, stored) for photo in photos]) * 255).round().byte()
    found = errors(cfg, photos, size, 2 if cfg == OFF else 10)
    assert found == [pytest.approx(before, rel=0.05), pytest.approx(after, rel=0.05)]


def test_a_batch_is_read_from_the_levels_of_its_samples(photos: torch.Tensor) -> None:
    augment, source = make(replace(CROP, size=80, scale=0.5, rotation=30)), photos.repeat(4, 1, 1, 1)
    batch = everything(source)
    made, table = augment(batch)[0], augment.table(batch)
    assert table[:, LEVEL].unique().tolist() == [1, 2]  # 427 / 80 = 5.3, times 0.5 to 1.5
    for image, row, ours in zip(source, table, made, strict=True):
        level = shrink(image[None], int(row[LEVEL]))
        assert (ours - resample(level, row[None, MATRIX].double(), 80)[0]).abs().max() < 1e-4


def test_evaluation_reads_what_training_does_without_augmentation(photos: torch.Tensor) -> None:
    for source in (photos, noise(3, 3, 256, 256), noise(3, 3, 61, 75)):
        for size in (8, 37, 64, 224):
            augment = make(replace(OFF, size=size))
            trained, _ = augment(everything(source))
            assert (trained - augment.evaluation(source, size)).abs().max() < 1e-4, (source.shape, size)
