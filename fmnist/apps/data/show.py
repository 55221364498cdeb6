"""What a run would see of a data set, as numbers and as two sheets of its images."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmnist.config.schema import Config
from fmnist.data.augment import Augment, with_channels
from fmnist.data.batches import Loader, batch_size_for
from fmnist.data.info import SplitName
from fmnist.data.registry import open_source
from fmnist.data.split import Split
from fmnist.evaluation.exact_copies import copies_line, exact_copies
from fmnist.runtime.console import MAX_ERROR, one_line

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
MOST_CLASSES, EACH_END = 30, 10  # listed whole; of more the largest and the smallest
ROWS, COLUMNS = 30, 8  # classes, and images of each, on a sheet
LARGEST_SIDE = 64  # pixels of an image on the sheet of samples
LABEL_BYTES = 8


def show(cfg: Config, args: argparse.Namespace) -> None:
    """Print a data set's numbers, and draw samples of it and the same augmented.

    Raises:
        ValueError: it cannot be read; one line.
    """
    source = open_source(cfg.data)
    splits = {name: Split.load(name, source) for name in SPLITS}
    facts = facts_of(splits, source.location)
    train = splits["train"]
    chosen = choose(train)
    sheets = {"samples.png": samples(train.images[chosen]), "augmented.png": augmented(train, chosen, cfg)}
    heads = {
        "samples.png": f"{train.info.title}: training images",
        "augmented.png": f"{train.info.title}: the same, augmented, at {sheets['augmented.png'].shape[1]} px",
    }
    from fmnist.report.grid import draw_grid  # late: seconds of libraries

    titles = [train.class_names[label] for label in train.labels[chosen].tolist()]
    for name, images in sheets.items():
        draw_grid(args.output / name, images, titles, one_line(heads[name], 100), columns=COLUMNS)
    facts["sheets"] = [str(args.output / name) for name in sheets]
    batch = cfg.batch.global_batch_size
    print(json.dumps(facts, indent=2, allow_nan=False) if args.json else text_of(facts, batch))


def facts_of(splits: dict[SplitName, Split], location: str | Path) -> dict[str, Any]:
    """Return the numbers of a data set, ready for JSON.

    Args:
        splits: train, val and test; on the CPU.
        location: where it lies.
    """
    info = splits["train"].info
    counts = {
        name: torch.bincount(split.labels, minlength=len(info.class_names)).tolist() for name, split in splits.items()
    }
    return {
        "name": info.name,
        "title": info.title,
        "location": str(location),
        "source": info.source,
        "licence": info.licence,
        "shape": list(info.shape),
        "mean": list(info.mean),
        "std": list(info.std),
        "images": {name: len(split) for name, split in splits.items()},
        "bytes_on_device": sum(split.images.numel() + LABEL_BYTES * len(split) for split in splits.values()),
        "classes": {
            label: {name: counts[name][position] for name in SPLITS} for position, label in enumerate(info.class_names)
        },
        "duplicates": [pair.as_dict() for pair in exact_copies(splits)],
        "sha256": {name: split.digest for name, split in splits.items()},
    }


def text_of(facts: dict[str, Any], batch_size: int) -> str:
    """Lay the numbers out for people; `batch_size` is that of a training by the same options."""
    channels, height, width = facts["shape"]
    mean, std = (", ".join(f"{value:.4f}" for value in facts[name]) for name in ("mean", "std"))
    title, location = one_line(facts["title"]), one_line(facts["location"], MAX_ERROR)
    about = [one_line(facts[name], 200) for name in ("source", "licence") if facts[name] not in (None, "", title)]
    rows = {
        "data": location if Path(location).name == title else f"{title} in {location}",
        "from": ", ".join(about) or ("" if facts["source"] else "not known"),
        "images": ", ".join(f"{count:,} {name}" for name, count in facts["images"].items()),
        "each": f"{'grey' if channels == 1 else 'colour'}, {height} x {width} pixels; mean {mean}, std {std}",
        "memory": f"{facts['bytes_on_device'] / 2**20:,.1f} MiB on the device",
        "copies": copies_line(facts["duplicates"]).removeprefix("exact copies: "),
        "sheets": ", ".join(facts["sheets"]),
    }
    lines = [f"{name:<8}  {text}" for name, text in rows.items() if text]
    classes = sorted(facts["classes"].items(), key=lambda pair: -pair[1]["train"])
    if len(classes) <= MOST_CLASSES:
        shown = list(facts["classes"].items())
    else:
        shown = [*classes[:EACH_END], ("...", dict.fromkeys(SPLITS, "")), *classes[-EACH_END:]]
    width = max(8, *(len(one_line(name, MAX_ERROR)) for name, _ in shown))
    lines += ["", f"{f'{len(classes):,} classes':<{width}}" + "".join(f"{name:>10}" for name in SPLITS)]
    for name, counts in shown:
        cells = "".join(f"{counts[split]:>10,}" if counts[split] != "" else f"{'':>10}" for split in SPLITS)
        lines.append(f"{one_line(name, MAX_ERROR):<{width}}{cells}".rstrip())
    most, least = classes[0][1]["train"], classes[-1][1]["train"]
    if most > 2 * least:
        lines.append(f"the largest class has {most / max(least, 1):.1f} times as many training images as the smallest")
    if (num_train := facts["images"]["train"]) < batch_size:
        smaller = f"--batch.global_batch_size {batch_size_for(num_train)}"
        lines.append(f"fewer training images than a batch of {batch_size}: train with {smaller}")
    return "\n".join(lines)


def choose(train: Split) -> Tensor:
    """Return the first COLUMNS images of the first ROWS classes, int64 [M]; of a small class, fewer and some again."""
    chosen = []
    for label in range(min(ROWS, len(train.class_names))):
        of_class = torch.nonzero(train.labels == label).flatten()[:COLUMNS]
        if len(of_class):  # where the only one of its class is held out
            chosen.append(of_class[torch.arange(COLUMNS) % len(of_class)])
    return torch.cat(chosen)


def samples(images: Tensor) -> Tensor:
    """Return stored images, uint8 [N, H, W] or [N, 3, H, W], as float32 [N, S, S, 3] in 0 to 1, on white squares."""
    shown = with_channels(images).float() / 255
    height, width = shown.shape[-2:]
    if (side := max(height, width)) > LARGEST_SIDE:
        scale = LARGEST_SIDE / side
        height, width = (max(1, round(edge * scale)) for edge in (height, width))
        shown = F.interpolate(shown, (height, width), mode="bilinear", antialias=True, align_corners=False)
        side = LARGEST_SIDE
    left, top = (side - width) // 2, (side - height) // 2
    shown = F.pad(shown, (left, side - width - left, top, side - height - top), value=1.0)
    return shown.clamp(0, 1).expand(-1, 3, -1, -1).movedim(1, -1)


def augmented(train: Split, chosen: Tensor, cfg: Config) -> Tensor:
    """Return the images as the model is trained on them in the last epochs: float32 [N, S, S, 3] in about 0 to 1."""
    last = cfg.augment.sizes[max(cfg.augment.sizes)]
    maker = Augment(
        replace(cfg.augment, size=last, backend="eager"),
        num_classes=len(train.class_names),
        mean=train.info.mean,
        std=train.info.std,
        fill=train.info.mean,
    )
    loader = Loader(train, global_batch_size=min(cfg.batch.global_batch_size, len(train)), seed=cfg.seed)
    batch = loader.micro_batches(0)[0]
    pixels, _ = maker(replace(batch, indices=chosen, partners=chosen.roll(COLUMNS)))  # mixed with the class before
    means, stds = (torch.tensor(values)[:, None, None] for values in (train.info.mean, train.info.std))
    return (pixels * stds + means).clamp(0, 1).expand(-1, 3, -1, -1).movedim(1, -1)
