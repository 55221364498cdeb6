"""Measure the flag for unfamiliar images: how often it is raised wrongly, and how often it is missing.

    python -m experiments.novelty_rates rates runs/cnn
    python -m experiments.novelty_rates hold_out data/held_out 3 8
    accelerate launch train.py --data.root data/held_out --schedule.epochs 3 --augment.size 28 \\
        --output_dir runs/held_out
    python -m experiments.novelty_rates rates runs/held_out --held_out 3 8

(EfficientNet-Lite0: the middle command with its config and weights, and without --schedule and --augment.)
`rates` prints, for the score in use and for others on the same model, the share flagged of each kind of image, with
the threshold at the 95th percentile of the validation images. `hold_out` writes Fashion-MNIST without some classes, for
a model that never saw them. Digits: 1,797 handwritten ones that come with scikit-learn, 8 x 8, enlarged to 28 x 28.
"""

import argparse
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from sklearn.covariance import ledoit_wolf
from sklearn.datasets import load_digits
from torch import Tensor

from fmnist.apps.novelty import FLAGGED, NUM_IMAGES, NoveltyReference
from fmnist.data.fashion_mnist import CLASS_NAMES, load, load_split
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.trained import open_trained

Scorer = Callable[[Tensor, Tensor], Tensor]


def hold_out(folder: Path, classes: list[int]) -> None:
    """Write the four IDX files without these classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = load(split)
        keep = ~torch.isin(labels, torch.tensor(classes))
        images, labels = images[keep], labels[keep].byte()
        for kind, tensor in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">BBBB{tensor.ndim}I", 0, 0, 8, tensor.ndim, *tensor.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + tensor.numpy().tobytes())
    left = ", ".join(name for label, name in enumerate(CLASS_NAMES) if label not in classes)
    print(f"{folder}: {left}")


def other_images(test: Tensor) -> dict[str, Tensor]:
    """Return images without clothes, and clothes changed beyond what training shows: uint8 [N, 28, 28] by name."""
    generator = torch.Generator().manual_seed(0)
    digits = torch.from_numpy(load_digits().images).float()[:, None] / 16 * 255
    digits = F.interpolate(digits, (28, 28), mode="bicubic", align_corners=False).clamp(0, 255).byte()[:, 0]
    noise = torch.randint(0, 256, (1000, 28, 28), generator=generator, dtype=torch.uint8)
    order = torch.rand(1000, 784, generator=generator).argsort(1)
    blobs = gaussian_filter(torch.rand(1000, 28, 28, generator=generator).numpy(), (0, 2, 2))
    low, high = blobs.min((1, 2), keepdims=True), blobs.max((1, 2), keepdims=True)
    return {
        "digits": digits,
        "noise": noise,
        "shuffled pixels": test[:1000].flatten(1).gather(1, order).view(-1, 28, 28),
        "blobs": torch.from_numpy(((blobs - low) / (high - low) * 255).astype(np.uint8)),
        "negatives": 255 - test[:1000],
        "turned by 90": test[:1000].rot90(1, (1, 2)),
    }


def scorers(features: Tensor, labels: Tensor) -> dict[str, Scorer]:
    """Return each score, higher for less familiar images, from penultimate features of training images."""

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)

    def mahalanobis(reference: Tensor) -> Callable[[Tensor], Tensor]:
        means = {int(c): reference[labels == c].mean(0) for c in labels.unique()}
        centred = torch.cat([reference[labels == c] - mean for c, mean in means.items()])
        covariance, _ = ledoit_wolf(centred.numpy(), assume_centered=True)
        whiten = torch.from_numpy(np.linalg.cholesky(np.linalg.inv(covariance))).float()
        return lambda x: torch.stack([((x - mean) @ whiten).square().sum(1) for mean in means.values()]).amin(0)

    def neighbour(reference: Tensor, k: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([torch.cdist(p, reference).topk(k, 1, False).values[:, -1] for p in x.split(500)])

    plain, scaled, tenth, first, raw = (
        mahalanobis(features),
        mahalanobis(unit(features)),
        neighbour(unit(features), 10),
        neighbour(unit(features), 1),
        neighbour(features, 10),
    )
    return {
        "cosine to the 10th neighbour": lambda _, x: tenth(unit(x)),
        "cosine to the nearest neighbour": lambda _, x: first(unit(x)),
        "euclidean to the 10th neighbour": lambda _, x: raw(x),
        "Mahalanobis to the nearest class": lambda _, x: plain(x),
        "Mahalanobis, features of length 1": lambda _, x: scaled(unit(x)),
        "energy": lambda logits, _: -logits.logsumexp(1),
        "1 - highest probability": lambda logits, _: 1 - logits.softmax(1).amax(1),
    }


def rates(run: Path, held_out: list[int]) -> None:
    """Print the share flagged by each score, in percent, of each kind of image."""
    trained = open_trained(run)
    data = trained.cfg.data
    train, labels = load_split("train", data.root, data.val_size)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:NUM_IMAGES]
    val = load_split("val", data.root, data.val_size)[0]
    test, test_labels = load("test")
    unseen = torch.isin(test_labels, torch.tensor(held_out, dtype=torch.long))
    kinds = {"test images": test[~unseen]}
    kinds |= {f"held out: {CLASS_NAMES[label]}": test[test_labels == label] for label in held_out}
    seen = {kind: trained(images) for kind, images in (kinds | other_images(test)).items()}
    logits, features = trained(val)
    _, reference = trained(train[chosen])
    print(f"flagged, in percent; threshold: {100 * FLAGGED:.0f} % of {len(val):,} validation images of {run}")
    in_use = NoveltyReference(reference, features, logits)
    scores = {"in use: cosine or euclidean": lambda _, x: in_use.score(x)} | scorers(reference, labels[chosen])
    print("".join(f"{place + 1}. {name}\n" for place, name in enumerate(scores)), end="")
    print(f"{'':24}" + "".join(f"{place + 1:>7}." for place in range(len(scores))))
    thresholds = [torch.quantile(score(logits, features), 1 - FLAGGED) for score in scores.values()]
    for kind, pair in seen.items():
        shares = [
            (score(*pair) > limit).double().mean() for score, limit in zip(scores.values(), thresholds, strict=True)
        ]
        print(f"{kind:24}" + "".join(f"{100 * share:8.1f}" for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("hold_out", help="write Fashion-MNIST without some classes")
    writer.add_argument("folder", type=Path)
    writer.add_argument("classes", type=int, nargs="+", choices=range(10))
    reader = commands.add_parser("rates", help="print the share of each kind of image that is flagged")
    reader.add_argument("run", type=Path)
    reader.add_argument("--held_out", type=int, nargs="*", default=[], choices=range(10), help="classes it never saw")
    args = parser.parse_args()
    log_to_console()
    with one_line_errors("experiments/novelty_rates.py"):
        if args.command == "hold_out":
            hold_out(args.folder, args.classes)
        else:
            rates(args.run, args.held_out)


if __name__ == "__main__":
    main()
