"""The published data, and the split into training and validation images: a constant of the data."""

import logging
import math
from pathlib import Path

import pytest
import torch
from idx_files import assert_one_line, write_small
from torch import Tensor

from fmnist.data import fashion_mnist
from fmnist.data.fashion_mnist import load, load_split, stratified_split


@pytest.fixture(scope="module")
def real_train(real_folder: Path) -> tuple[Tensor, Tensor]:
    return load("train", str(real_folder))


def test_the_real_data_are_the_published_ones(
    real_folder: Path, real_train: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    images, labels = real_train
    with caplog.at_level(logging.WARNING, logger="fmnist"):
        test_images, test_labels = load("test", str(real_folder))
    assert caplog.records == []
    assert images.shape == (60_000, 28, 28)
    assert test_images.shape == (10_000, 28, 28)
    assert images.dtype == test_images.dtype == torch.uint8
    assert labels.dtype == test_labels.dtype == torch.int64
    assert images.device.type == labels.device.type == "cpu"
    # 60,000 / 10 classes and 10,000 / 10 classes
    assert labels.bincount().tolist() == [6_000] * 10
    assert test_labels.bincount().tolist() == [1_000] * 10
    assert labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # as printed in many tutorials
    assert len(fashion_mnist.CLASS_NAMES) == fashion_mnist.NUM_CLASSES == 10
    assert fashion_mnist.CLASS_NAMES[labels[0]] == "Ankle boot"
    with pytest.raises(ValueError, match="split 'dev': expected train or test"):
        load("dev", str(real_folder))


def test_mean_and_std_are_those_of_the_training_pixels(real_train: tuple[Tensor, Tensor]) -> None:
    counts = real_train[0].flatten().bincount(minlength=256).tolist()
    num_pixels = 60_000 * 28 * 28
    assert sum(counts) == num_pixels == 47_040_000
    # integers up to the division: E[v] and E[v^2] - E[v]^2 of the 47,040,000 values v; then 0..255 to 0..1
    first = sum(value * count for value, count in enumerate(counts))
    second = sum(value * value * count for value, count in enumerate(counts))
    mean = first / num_pixels / 255
    std = math.sqrt(second / num_pixels - (first / num_pixels) ** 2) / 255
    assert round(mean, 4) == fashion_mnist.MEAN == 0.2860
    assert round(std, 4) == fashion_mnist.STD == 0.3530


def test_split_of_the_60000(real_train: tuple[Tensor, Tensor]) -> None:
    images, labels = real_train
    train_indices, val_indices = stratified_split(labels, 5_000)
    # 5,000 x 6,000 / 60,000 = 500 of each class; 6,000 - 500 = 5,500 are left
    assert labels[val_indices].bincount().tolist() == [500] * 10
    assert labels[train_indices].bincount().tolist() == [5_500] * 10
    assert torch.equal(torch.cat([train_indices, val_indices]).sort().values, torch.arange(60_000))
    for indices in (train_indices, val_indices):
        assert indices.dtype == torch.int64
        assert torch.equal(indices, indices.sort().values)
    # 0 exact copies across the two
    rows = [image.tobytes() for image in images.numpy()]
    assert not {rows[i] for i in train_indices.tolist()} & {rows[i] for i in val_indices.tolist()}


def test_split_is_a_constant_of_the_data(real_train: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = stratified_split(real_train[1], 5_000)
    assert torch.equal(torch.get_rng_state(), before), "the global generator must not move"
    torch.manual_seed(2)
    second = stratified_split(real_train[1], 5_000)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # The split of every earlier run: a change here makes old validation numbers incomparable.
    assert first[1][:8].tolist() == [5, 22, 25, 56, 66, 70, 73, 75]
    assert int(first[1].sum()) == 149855323


@pytest.mark.parametrize(
    ("class_sizes", "val_size", "expected"),
    [
        ([6] * 10, 0, [0] * 10),
        ([6] * 10, 59, [6] * 9 + [5]),  # 59 x 6 / 60 = 5.9 each: 5 each, the 9 left over to classes 0 to 8
        ([6] * 10, 13, [2] * 3 + [1] * 7),  # 13 x 6 / 60 = 1.3 each: 1 each, 3 left over
        ([10, 30, 60], 5, [1, 1, 3]),  # 0.5, 1.5, 3.0: 0, 1, 3 and 1 left over; 0.5 = 0.5, so the lower class
        ([1, 99], 1, [0, 1]),  # 0.01, 0.99: 0, 0 and 1 left over to the larger remainder
        ([3, 0, 3], 2, [1, 0, 1]),  # an absent class takes none
    ],
)
def test_split_shares(class_sizes: list[int], val_size: int, expected: list[int]) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(class_sizes)])
    train_indices, val_indices = stratified_split(labels, val_size)
    assert labels[val_indices].bincount(minlength=len(expected)).tolist() == expected
    assert len(train_indices) == sum(class_sizes) - val_size


@pytest.mark.parametrize("val_size", [-1, 60, 61])
def test_split_refuses_sizes_out_of_range(val_size: int) -> None:
    with pytest.raises(ValueError) as error:
        stratified_split(torch.arange(60) % 10, val_size)
    assert_one_line(error, "data.val_size", str(val_size), "0 to 59")


def test_load_split(tmp_path: Path) -> None:
    root = str(write_small(tmp_path / "small"))
    images, labels = load_split("val", root, 10)
    assert images.shape == (10, 28, 28)
    assert labels.bincount().tolist() == [1] * 10  # 10 x 2 / 20
    assert (images[:, 0, 0] % 10 == labels).all(), "images and labels must stay together"
    assert len(load_split("train", root, 10)[0]) == 10
    assert load_split("val", root, 0)[0].shape == (0, 28, 28)
    assert len(load_split("train", root, 0)[0]) == 20
    assert len(load_split("test", root, 10)[0]) == 10
    with pytest.raises(ValueError, match="train, val or test"):
        load_split("dev", root, 10)
