"""Write the training images in their four turns, to be told apart without labels: data to pretrain on.

example: python -m experiments.rotations data/rotations.npz

To predict by how much an image was turned, a network has to know what is on it (Gidaris, Singh, Komodakis 2018,
arXiv:1803.07728). Fashion-MNIST's validation images are this set's, in one turn each; its test images are left out.
"""

import argparse
from pathlib import Path

import numpy as np

from fmnist.config.schema import DataConfig
from fmnist.data.split import Split

TURNS = ("upright", "a quarter to the left", "upside down", "a quarter to the right")


def main(argv: list[str] | None = None) -> int:
    """Write the file and print how many images it has."""
    parser = argparse.ArgumentParser(prog="experiments.rotations", description=__doc__)
    parser.add_argument("file", type=Path, help="to write, .npz")
    file = parser.parse_args(argv).file
    train, val = (Split.load(name, DataConfig()).images.numpy() for name in ("train", "val"))
    turned = np.stack([np.rot90(train, turn, axes=(1, 2)) for turn in range(4)], axis=1)
    chosen = np.arange(len(val)) % 4
    arrays = {
        "train_images": turned.reshape(-1, *train.shape[1:]),
        "train_labels": np.tile(np.arange(4), len(train)),
        "val_images": np.stack([np.rot90(image, turn) for image, turn in zip(val, chosen, strict=True)]),
        "val_labels": chosen,
        "class_names": np.array(TURNS),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **arrays)
    print(f"{len(arrays['train_images']):,} training and {len(val):,} validation images: {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
