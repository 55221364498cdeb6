"""train_batch.png: what the model trains on, as it is made for the training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fmnist.config.schema import AugmentConfig, Config, EvaluationConfig, ScheduleConfig
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.data.fashion_mnist import CLASS_NAMES
from fmnist.data.split import Split
from fmnist.optim import Schedule
from fmnist.runtime.processes import Processes
from fmnist.training.batch_pictures import title, visible, write_train_batch


def parts(train_images: Split, size: int | dict[int, int]) -> tuple[Loader, Augment, Schedule]:
    cfg = Config(
        augment=AugmentConfig(size=size, rotation=10.0, mixup_alpha=0.4),
        schedule=ScheduleConfig(epochs=2, warmup_epochs=0),
        evaluation=EvaluationConfig(),
    )
    loader = Loader(train_images, global_batch_size=64, seed=5)
    return (
        loader,
        Augment(cfg.augment, num_classes=10, mean=(0.286,), std=(0.353,)),
        Schedule.from_config(cfg, loader.steps_per_epoch),
    )


@pytest.mark.parametrize("size", [28, {0: 14, 1: 28}])
def test_it_shows_the_first_step_and_the_last_size(
    train_images: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | dict[int, int]
) -> None:
    loader, augment, schedule = parts(train_images, size)
    drawn: list[Any] = []
    monkeypatch.setattr("fmnist.report.grid.draw_grid", lambda _, *what, **how: drawn.append((*what, how)))
    write_train_batch(tmp_path, loader, augment, schedule, Processes(0, 1))
    ((images, titles, heading, how),) = drawn
    # 2000 // 64 = 31 steps an epoch, 62 in all
    last = [] if size == 28 else [61]
    expected_images, expected_titles = [], []
    for step in [0, *last]:
        pixels, targets = augment(loader.micro_batches(step)[0])
        shown = visible(pixels[:16], augment).clamp(0, 1)
        factor = 28 // shown.shape[1]
        expected_images.append(shown.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
        expected_titles += [title(target, CLASS_NAMES) for target in targets[:16]]
    assert torch.equal(images, torch.cat(expected_images)) and titles == expected_titles
    assert heading == "what the model trains on: step 1 at " + (
        "28 px" if size == 28 else "14 px, then step 62 at 28 px"
    )
    assert how == {"columns": 8}


def test_it_is_drawn_once_and_a_failure_is_a_warning(
    train_images: Split, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader, augment, schedule = parts(train_images, 28)
    write_train_batch(tmp_path, loader, augment, schedule, Processes(0, 1))
    path = tmp_path / "train_batch.png"
    with Image.open(path) as picture:
        assert picture.width > picture.height > 100  # two rows of eight
    path.write_bytes(b"kept")
    write_train_batch(tmp_path, loader, augment, schedule, Processes(0, 1))
    assert path.read_bytes() == b"kept"
    write_train_batch(tmp_path / "absent" / "\0", loader, augment, schedule, Processes(0, 1))
    assert "is not drawn" in caplog.text
