"""Parts of the training images for learning curves: nested, stratified, the same for every run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import refused

from fmnist.config.conflicts import sizes_by_epoch
from fmnist.config.parse import parse_config
from fmnist.config.same_run import changes, recipe
from fmnist.config.schema import Config, DataConfig
from fmnist.data.split import Split
from fmnist.data.subset import subset

CPU = torch.device("cpu")


def test_a_part_begins_with_every_smaller_part(real_folder: Path) -> None:
    big, small, all_ = (
        Split.load("train", DataConfig(root=str(real_folder), limit=limit), CPU) for limit in (5000, 1000, None)
    )
    assert (len(big), len(small), len(all_)) == (5000, 1000, 55_000)
    assert torch.equal(big.images[:1000], small.images) and torch.equal(big.labels[:1000], small.labels)
    assert big.published is not None and torch.equal(big.published[:1000], small.published)
    assert torch.bincount(small.labels).tolist() == [100] * 10
    # They are images of the whole, each once, under their published names.
    place = {index: position for position, index in enumerate(all_.published.tolist())}
    picked = torch.tensor([place[index] for index in big.published.tolist()])
    assert len(picked.unique()) == 5000 and torch.equal(all_.images[picked], big.images)
    assert len({split.digest for split in (big, small, all_)}) == 3


def test_every_part_has_each_class_in_its_share() -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate((600, 300, 90, 10))])
    order = subset(labels, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    counts = torch.nn.functional.one_hot(labels[order], 4).cumsum(0)
    shares = torch.arange(1, 1001)[:, None] * torch.tensor([0.6, 0.3, 0.09, 0.01])
    assert (counts - shares).abs().max() < 1.5
    assert counts[99].tolist() == [60, 30, 9, 1]
    assert labels[subset(labels, 1)].tolist() == [0]  # the largest class


def test_a_share_is_a_number_of_images() -> None:
    labels = torch.arange(10).repeat(100)
    assert torch.equal(subset(labels, 0.1), subset(labels, 100))
    assert len(subset(labels, 1.0)) == len(subset(labels, 1000)) == 1000 and len(subset(labels, 1)) == 1


@pytest.mark.parametrize("limit", [1001, 0.0001])
def test_more_than_there_are_or_less_than_one_is_one_line(limit: float) -> None:
    with pytest.raises(ValueError, match=f"data.limit is {limit}; valid: 1 to 1,000 training images, or a share of th"):
        subset(torch.arange(10).repeat(100), limit)


@pytest.mark.parametrize("limit", ["0", "-5", "1.5", "0.0", ".nan", "half", "[5]", "true"])
def test_a_wrong_limit_is_one_line_before_torch(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "--data.limit", limit)
    assert "data.limit is" in error and ("valid" in error or "expected int|float|null" in error)


def test_validation_and_test_stay_whole_and_no_limit_changes_no_bit(data: Path) -> None:
    plain, limited = (DataConfig(root=str(data), val_size=500, limit=limit) for limit in (None, 300))
    for name in ("val", "test"):
        assert Split.load(name, plain, CPU).digest == Split.load(name, limited, CPU).digest
    assert len(Split.load("train", limited, CPU)) == 300
    with pytest.raises(ValueError, match="data.limit is 1501; valid: 1 to 1,500"):
        Split.load("train", replace(limited, limit=1501), CPU)
    old = {key: value for key, value in recipe(Config()).items() if key != "data.limit"}  # a run from before
    assert changes(old, recipe(Config())) == []


def test_the_sizes_of_a_short_run_know_the_limit() -> None:
    cfg = parse_config(["--data.limit", "1280", "--batch.global_batch_size", "128", "--schedule.steps", "30"])
    assert cfg.augment.size == {0: 20, 4: 28}
    assert sizes_by_epoch(cfg, 1280) == {0: 20, 2: 28}  # 1,280 images are 10 steps an epoch: three epochs
    assert sizes_by_epoch(cfg, 11_000) == {0: 28}  # 85 steps an epoch: less than one
