"""The README.md of a hub folder: the model, its measured figures, its use, its limits."""

import csv
import html
import json
import re
from dataclasses import dataclass
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData

from fmnist.apps.export.expected import Expected
from fmnist.trained import Trained

SAME_PROBABILITIES = 0.01  # mean absolute difference: bf16 stays far below, other weights lie above
DATASET = "zalando-datasets/fashion_mnist"
FASHION_MNIST = """\
Fashion-MNIST: 70,000 grey images of clothes, 28 x 28, in ten balanced classes, by Zalando Research, MIT licence.

```bibtex
@online{xiao2017fashion,
  author = {Han Xiao and Kashif Rasul and Roland Vollgraf},
  title  = {Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  date   = {2017-08-28},
  eprint = {1708.07747},
  eprinttype = {arXiv}
}
```
"""
USE = """\
It is meant for teaching, for comparing training methods, and for trying out cataloguing and visual search of pictures
like those of Fashion-MNIST: one piece of clothing, upright, light on a black background, 28 x 28 grey values.

It is not meant for decisions about people, and not for photos as they come from a camera: they have to be brought into
that form first, and the figures above do not hold for them. It names one of ten classes for any picture, also for one
that shows none of them. Shirts, T-shirts, pullovers and coats are confused most; see the table. The test images come
from the same shop and studio as the training images, and some nearly repeat one of them. Confidences are those of the
softmax, not calibrated beyond the stated ECE."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An evaluation on the test images that is known to be of these weights.

    Attributes:
        metrics: what metrics.json holds.
        flip: each image was averaged with its mirror.
    """

    metrics: dict[str, Any]
    flip: bool


def escape(text: str) -> str:
    """Make a name harmless in Markdown and HTML: no markup, no table cell, no second line."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(one_line))


def read_measured(expected: Expected) -> Measured:
    """Read the run's own test metrics, and find out from its predictions whether they are of these weights.

    Args:
        expected: the run and its answers.

    Raises:
        ValueError: one line: there is no evaluation of the test images, or it is of other weights.
    """
    trained = expected.trained
    folder = trained.folder("evaluation") / "test"
    again = f"run: fmnist evaluate {trained.weights.parent}"
    try:
        metrics = json.loads((folder / "metrics.json").read_bytes())
        with (folder / "predictions.csv").open(newline="") as file:
            rows = [row[4:] for row, _ in zip(csv.reader(file), range(1 + len(expected.images)), strict=False)][1:]
        written = torch.tensor([[float(cell) for cell in row] for row in rows])
        distance = (written - expected.logits.softmax(-1)).abs().mean()
    except FileNotFoundError as error:
        raise ValueError(f"a model card states measured figures, and there is no {error.filename}; {again}") from None
    except (OSError, ValueError, RuntimeError):
        raise ValueError(f"{folder} does not hold a whole evaluation; {again}") from None
    mirrored, _ = trained(expected.images.flip(-1))
    averaged = (expected.logits.softmax(-1) + mirrored.softmax(-1)) / 2
    distance_flipped = (written - averaged).abs().mean()
    if not min(distance, distance_flipped) < SAME_PROBABILITIES:
        raise ValueError(f"{folder} was evaluated with other weights; {again}")
    return Measured(metrics=metrics, flip=bool(distance_flipped < distance))


def model_card(trained: Trained, measured: Measured, *, ours: bool) -> str:
    """Return the card as Markdown with its YAML head.

    Args:
        trained: the run.
        measured: its test metrics.
        ours: a model of this project, which timm does not know.
    """
    metrics = measured.metrics
    known = None if ours else timm.get_pretrained_cfg(trained.cfg.model.name)
    from_pretrained = trained.cfg.model.pretrained or bool(trained.cfg.model.weights)
    weights_licence = (known.license if known else None) or "other"
    head = ModelCardData(
        library_name="fmnist" if ours else "timm",
        license=weights_licence if from_pretrained else "mit",
        pipeline_tag="image-classification",
        tags=["image-classification", "fashion-mnist", "fmnist"],
        datasets=[DATASET],
        metrics=["accuracy"],
        model_name=trained.name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=DATASET,
                dataset_name="Fashion-MNIST",
                dataset_split="test",
                metric_type="accuracy",
                metric_value=metrics["top1"],
            )
        ],
    )
    low, high = (100 * bound for bound in metrics["top1_interval"])
    averaging = ", each image averaged with its mirror (the code below does not)" if measured.flip else ""
    chosen = "The best epoch was chosen on validation images held out of the 60,000; this is one run."
    if trained.cfg.data.val_size == 0:
        chosen = "There were no validation images: these are the weights of the last step. This is one run."
    accuracy = f"accuracy **{100 * metrics['top1']:.2f} %** (95 % interval {low:.2f} to {high:.2f})"
    num_parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {escape(trained.name)}",
        f"{escape(trained.cfg.model.name)}, {num_parameters:,} parameters, classifies Fashion-MNIST at "
        f"{trained.size} px.",
        "## Measured",
        f"On {metrics['num_images']:,} test images{averaging}: {accuracy}, loss {metrics['loss']:.4f}, expected "
        f"calibration error {metrics['ece']:.4f} (15 bins). {chosen}",
        _class_table(metrics),
        "## Use",
        _own_snippet() if ours else _timm_snippet(trained),
        _stem(trained, ours=ours, from_pretrained=from_pretrained),
        "## Training",
        _training(trained, weights_licence if from_pretrained else None),
        "## Intended use and limits",
        USE,
        "## Data",
        FASHION_MNIST,
    ]
    return "\n\n".join(parts)


def _class_table(metrics: dict[str, Any]) -> str:
    lines = ["| class | precision | recall | F1 | images |", "|---|---|---|---|---|"]
    for name, row in metrics["per_class"].items():
        cells = (f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))
        lines.append(f"| {escape(name)} | {' | '.join(cells)} | {row['support']:,} |")
    return "\n".join(lines)


def _timm_snippet(trained: Trained) -> str:
    size, mean, std = trained.size, trained.augment.mean, trained.augment.std
    return f"""\
```python
import timm
import torch
import torch.nn.functional as F

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # FOLDER: where this README.md is
mean, std = (torch.tensor(values)[:, None, None] for values in ({list(mean)}, {list(std)}))


@torch.no_grad()
def logits(images: torch.Tensor) -> torch.Tensor:
    \"\"\"Take uint8 [N, 28, 28], light on black, as Fashion-MNIST.\"\"\"
    grey = F.interpolate(images[:, None].float() / 255, ({size}, {size}), mode="bilinear", align_corners=False)
    return model((grey - mean) / std)
```"""


def _own_snippet() -> str:
    return """\
timm does not know this model: `timm.create_model` refuses the folder as an unknown model. The project that trained it
opens it like a run (`fmnist evaluate FOLDER` works too):

```python
from pathlib import Path

from fmnist.trained import open_trained

trained = open_trained(Path("FOLDER"))  # FOLDER: where this README.md is


def logits(images):
    \"\"\"Take uint8 [N, 28, 28], light on black, as Fashion-MNIST.\"\"\"
    return trained(images)[0]
```"""


def _stem(trained: Trained, *, ours: bool, from_pretrained: bool) -> str:
    mean = trained.augment.mean
    if ours or not from_pretrained:
        return "The model reads one grey channel (`in_chans=1`); it was trained so from the start."
    if len(mean) > 1:
        return "The model reads three channels, all the same grey image, each normalised with its own statistics."
    how = "summed over the three channels"
    if mean == (0.0,):  # see fmnist/models/stem.py
        how += ", each divided by its ImageNet std, with the ImageNet means folded into the bias"
    return (
        "The model reads one grey channel (`in_chans=1`). Its stem began as that of the pretrained RGB weights, the "
        f"kernels {how}, and was then trained on."
    )


def _training(trained: Trained, pretrained_licence: str | None) -> str:
    summary, cfg = trained.summary, trained.cfg
    facts = [f"seed {cfg.seed}"]
    facts += [f"{summary[key]:,} {key}" for key in ("epochs", "steps") if isinstance(summary.get(key), int | float)]
    facts += [f"on {escape(str(summary['device']))}"] if summary.get("device") else []
    versions = summary.get("versions") if isinstance(summary.get("versions"), dict) else {}
    facts += [f"{escape(str(name))} {escape(str(version))}" for name, version in (versions or {}).items()]
    start = "It was trained from scratch"
    if pretrained_licence:
        start = f"It started from timm's pretrained weights (their licence: {escape(pretrained_licence)})"
    return f"{start}: {', '.join(facts)}. `config.yaml` holds every option."
