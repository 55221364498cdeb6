"""Data sets that are not Fashion-MNIST, as .npz files, and runs on them that were never trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from small import keep_untrained

from fmnist.config.schema import AugmentConfig, BatchConfig, Config, DataConfig, ModelConfig
from fmnist.data.registry import open_source

SIZES = {"train": 240, "val": 120, "test": 160}


def names(num_classes: int) -> list[str]:
    """Class names as people have them: long ones, with markup, with a dollar sign."""
    return [f"kind {i:03d}" for i in range(num_classes - 3)] + [
        "Chrysanthemum morifolium, the florist's daisy, cultivated in many forms",
        "<b>bold</b> & $x^2$",
        "Ärmel",
    ]


def write_npz(path: Path, num_classes: int, shape: tuple[int, ...], **changes: Any) -> Path:
    """Write images of one bright rectangle a class, with noise.

    Args:
        path: the file.
        num_classes: 5 and more.
        shape: of an image, [H, W] or [H, W, 3].
        changes: arrays that replace its own; None takes one out.
    """
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"class_names": np.array(names(num_classes))}
    for part, count in SIZES.items():
        count = max(count, num_classes)
        labels = np.arange(count) % num_classes
        images = rng.integers(0, 90, (count, *shape), np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = label % shape[0], label * 3 % shape[1]
            image[row : row + 4, column : column + 4] = 140 + label * 100 // num_classes
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(path, **arrays)
    return path


SMALL_CNN = ModelConfig(name="cnn", options={"widths": [8, 16, 32]})


def untrained_on(npz: Path, folder: Path, size: int = 16, model: ModelConfig = SMALL_CNN) -> Path:
    """Make a run directory of a small model as drawn, moved off its first symmetric state; npz: or a folder."""
    data = DataConfig(name="folder" if npz.is_dir() else "npz", root=str(npz), val_size=0)
    cfg = Config(
        data=data, batch=BatchConfig(global_batch_size=32), model=model, augment=AugmentConfig(size=size),
        output_dir=str(folder),
    )  # fmt: skip
    source = open_source(data)
    counts = {f"num_{part}": len(source.read(part)[1]) for part in ("train", "val", "test")}  # type: ignore[arg-type]
    return keep_untrained(folder, cfg, replace(source.info, **counts), size)
