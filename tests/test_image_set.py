"""The data path in somebody else's loop: fmnist.data.load(...).batches(...)."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import execute

import fmnist.data
from fmnist.config.schema import AugmentConfig
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.data.fashion_mnist import MEAN, STD
from fmnist.data.image_set import ImageSet

OPTIONS = {"flip": 0.5, "rotation": 10.0, "shift": 0.1, "erase": 0.25, "size": 32}


@pytest.fixture(scope="module")
def train() -> ImageSet:
    whole = fmnist.data.load("fashion_mnist", "train", device="cpu")
    return ImageSet(images=whole.images[:1000], labels=whole.labels[:1000])


def test_the_splits_are_the_published_ones() -> None:
    assert len(fmnist.data.load("fashion_mnist", "train", device="cpu")) == 60_000
    assert len(fmnist.data.load("fashion_mnist", "train", device="cpu", val_size=5000)) == 55_000
    assert len(fmnist.data.load("fashion_mnist", "val", device="cpu", val_size=5000)) == 5_000
    assert len(fmnist.data.load("fashion_mnist", "test", device="cpu")) == 10_000


def test_batches_are_those_of_train_py(train: ImageSet) -> None:
    loader = Loader(train, global_batch_size=128, seed=3)
    augment = Augment(AugmentConfig(**OPTIONS), num_classes=10, mean=(MEAN,), std=(STD,))  # type: ignore[arg-type]
    seen = list(train.batches(128, seed=3, epoch=2, **OPTIONS))
    assert len(seen) == 7  # 1000 // 128; the incomplete batch is dropped
    for step, (images, targets) in enumerate(seen, 2 * 7):
        expected = augment(loader.micro_batches(step)[0])
        assert torch.equal(images, expected[0]) and torch.equal(targets, expected[1])
        assert images.shape == (128, 1, 32, 32) and targets.shape == (128,)


def test_any_start_and_any_process_count_give_the_same_images(train: ImageSet) -> None:
    whole = list(train.batches(100, epoch=1, **OPTIONS))
    for (images, targets), (later, labels) in zip(
        whole[4:], train.batches(100, epoch=1, start=4, **OPTIONS), strict=True
    ):
        assert torch.equal(images, later) and torch.equal(targets, labels)
    parts = [list(train.batches(100, epoch=1, rank=rank, world_size=4, **OPTIONS)) for rank in range(4)]
    for step, (images, targets) in enumerate(whole):
        assert torch.equal(images, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(targets, torch.cat([part[step][1] for part in parts]))
    assert list(train.batches(100, epoch=1, start=10)) == []  # an epoch that is done
    other = next(train.batches(100, epoch=2, **OPTIONS))[0]
    assert not torch.equal(whole[0][0], other)


def test_unshuffled_batches_are_every_image_once_as_it_is(train: ImageSet) -> None:
    for world_size in (1, 3):
        parts = [list(train.batches(96, shuffle=False, rank=r, world_size=world_size)) for r in range(world_size)]
        images = torch.cat([part[step][0] for step in range(len(parts[0])) for part in parts])
        labels = torch.cat([part[step][1] for step in range(len(parts[0])) for part in parts])
        assert torch.equal(labels, train.labels)
        assert torch.allclose(images, (train.images[:, None] / 255 - MEAN) / STD, atol=1e-6)


@pytest.mark.parametrize("side", [1, 2, 3, 7, 9])
def test_images_smaller_than_any_model_takes_are_enlarged(side: int, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, side, side), np.uint8)
    np.savez(tmp_path / "small.npz", train_images=images, train_labels=np.arange(20) % 2)
    small = fmnist.data.load("npz", root=str(tmp_path / "small.npz"), device="cpu")
    for options in ({"crop": 0.5, "flip": 0.5}, {"shuffle": False}):
        batch, labels = next(small.batches(10, **options))
        assert batch.shape == (10, 1, max(side, 8), max(side, 8)) and batch.isfinite().all() and len(labels) == 10
    with pytest.raises(ValueError, match="split 'test' is empty: small has no test images"):
        fmnist.data.load("npz", "test", root=str(tmp_path / "small.npz"), device="cpu")


def test_mixed_targets_are_soft(train: ImageSet) -> None:
    images, targets = next(train.batches(64, mixup_alpha=0.4))
    assert images.shape == (64, 1, 28, 28) and targets.shape == (64, 10)
    assert torch.allclose(targets.sum(dim=1), torch.ones(64))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "shirts"}, "data.name is 'shirts'; valid: fashion_mnist"),
        ({"split": "valid"}, "split 'valid'; valid: train, val, test"),
        ({"split": "val"}, "val_size 0"),
        ({"val_size": -1}, "data.val_size is -1"),
        ({"root": "/nowhere"}, "data.root"),
        ({"val_size": 2.5}, "data.val_size is 2.5; expected int"),
        ({"device": "nope"}, "device is nope"),
        ({"sampling": "balanced"}, "sampling 'balanced' has no effect here"),
        ({"where": "host"}, "where 'host' has no effect here; valid: auto, device"),
    ],
)
def test_a_mistake_in_load_is_one_line(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        fmnist.data.load(**arguments)  # type: ignore[arg-type]
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rotate": 10}, "unknown augmentation 'rotate'"),
        ({"flip": 2}, "augment.flip is 2.0; valid range: 0 to 1"),
        ({"batch_size": 5000}, "5000 but there are 1000"),
        ({"world_size": 3}, "3 processes"),
        ({"batch_size": 0}, "batch_size is 0; valid: a whole number, 1 or more"),
        ({"batch_size": "256"}, "batch_size is '256'"),
        ({"rank": 2, "world_size": 2}, "rank is 2; valid range: 0 to 1"),
        ({"start": -1}, "start is -1"),
        ({"start": 11}, "start is 11; valid range: 0 to 10, the steps of an epoch"),  # 1000 / 100
        ({"start": 4, "batch_size": 300}, "start is 4; valid range: 0 to 3"),  # the incomplete batch is dropped
        ({"start": 5, "batch_size": 300, "shuffle": False}, "start is 5; valid range: 0 to 4"),  # and here it is not
        ({"epoch": 1.5}, "epoch is 1.5"),
        ({"std": 0.0}, "std 0.0"),
        ({"dtype": torch.uint8}, "dtype torch.uint8"),
        ({"flip": "0.5"}, "augment.flip is '0.5'; expected float"),
        ({"shuffle": False, "flip": 0.5}, "shuffle is False"),
    ],
)
def test_a_mistake_in_batches_is_one_line(train: ImageSet, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        train.batches(**{"batch_size": 100} | arguments)  # type: ignore[arg-type] # before the first batch
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_importing_the_room_imports_no_torch() -> None:
    code = "import fmnist.data, sys; print('torch' in sys.modules)"
    done = execute(sys.executable, "-c", code, timeout=60)
    assert done.stdout == "False\n", done.stderr
