"""The README.md of a hub folder: the model, its measured figures, its use, its limits."""

import html
import inspect
import re
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from fmnist.apps.export.expected import Measured
from fmnist.apps.export.preprocess import level_read, means
from fmnist.data.info import DataInfo
from fmnist.runtime.console import MAX_ERROR, one_line
from fmnist.trained import Trained

TASK, DATASET = "image-classification", "zalando-datasets/fashion_mnist"
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

OTHER_USE = """\
It is meant for pictures like those of {title}, in their form: {form}. The figures above do not hold for others, and
nothing is known of how it does on them. It names one of {num_classes:,} classes for any picture, also for one that
shows none of them. Confidences are those of the softmax, not calibrated beyond the stated ECE."""

OWN_SNIPPET = """\
timm does not know this model: `timm.create_model` refuses the folder as an unknown model. The project that trained it
opens it like a run (`fmnist evaluate FOLDER` works too):

```python
from pathlib import Path

from fmnist.trained import open_trained

trained = open_trained(Path("FOLDER"))  # FOLDER: where this README.md is


def logits(images):
    \"\"\"Take IMAGES.\"\"\"
    return trained(images)[0]
```"""


def escape(text: str) -> str:
    """Make a name harmless in Markdown and HTML: no markup, no table cell, no second line."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(one_line(text, MAX_ERROR)))


def model_card(trained: Trained, measured: Measured, *, ours: bool) -> str:
    """Return the card as Markdown with its YAML head.

    Args:
        trained: the run.
        measured: its test metrics.
        ours: a model of this project, which timm does not know.
    """
    metrics = measured.metrics
    known = None if ours else timm.get_pretrained_cfg(trained.cfg.model.name)
    from_pretrained = trained.cfg.model.has_pretrained_input
    weights_licence = (known.license if known else None) or "other"
    fashion, title = trained.info.is_fashion_mnist, one_line(trained.info.title)
    dataset = DATASET if fashion else re.sub(r"[^\w.-]+", "-", title)
    head = ModelCardData(
        library_name="fmnist" if ours else "timm",
        license=weights_licence if from_pretrained else own_licence(trained),
        pipeline_tag=TASK,
        tags=[TASK, *["fashion-mnist"] * fashion, "fmnist"],
        datasets=[DATASET] if fashion else None,  # names on the hub: others are on nobody's list
        metrics=["accuracy"],
        model_name=trained.name,
        eval_results=[EvalResult(TASK, dataset, title, "accuracy", metrics["top1"], dataset_split=measured.split)],
    )
    num_parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {escape(trained.name)}",
        f"{escape(trained.cfg.model.name)}, {num_parameters:,} parameters, classifies {escape(title)} at "
        f"{trained.size} px.",
        "## Measured",
        _headline(trained, measured),
        _class_table(metrics),
        "## Use",
        OWN_SNIPPET.replace("IMAGES", _images(trained.info)) if ours else _timm_snippet(trained),
        _stem(trained, ours=ours, from_pretrained=from_pretrained),
        "## Training",
        _training(trained, weights_licence if from_pretrained else None),
        "## Intended use and limits",
        USE if fashion else _other_use(trained.info),
        "## Data",
        FASHION_MNIST if fashion else _data(trained.info),
    ]
    return "\n\n".join(parts)


def own_licence(trained: Trained) -> str:
    """Return the licence of weights that began from none: that of the data's makers decides, where they are known.

    Those that began from another run may descend from anybody's.
    """
    return "mit" if trained.info.is_fashion_mnist and not trained.cfg.model.starts_from_run else "other"


def _images(info: DataInfo) -> str:
    """Say what the model takes."""
    shape = ", ".join(["N", *map(str, info.image_shape)])
    return f"uint8 [{shape}], " + ("light on black, as Fashion-MNIST" if info.is_fashion_mnist else "0 to 255")


def _form(info: DataInfo) -> str:
    channels, height, width = info.shape
    return f"{'grey' if channels == 1 else 'in colour'}, {height} x {width} pixels"


def _other_use(info: DataInfo) -> str:
    fitted = ", the whole padded to that shape" if info.fit == "pad" else ", the middle cut out in that shape"
    form = _form(info) + fitted
    return OTHER_USE.format(title=escape(info.title), form=form, num_classes=len(info.class_names))


def _data(info: DataInfo) -> str:
    counts = {"training": info.num_train, "validation": info.num_val, "test": info.num_test or 0}
    images = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return (
        f"{escape(info.title)}: {images} images, {_form(info)}, "
        f"in {len(info.class_names):,} classes. Source: {escape(info.source or 'not stated')}. Licence: "
        f"{escape(info.licence or 'not stated')}.\n"
    )


def _headline(trained: Trained, measured: Measured) -> str:
    metrics = measured.metrics
    low, high = (100 * bound for bound in metrics["top1_interval"])
    averaging = ", each image averaged with its mirror (the code below does not)" if measured.flip else ""
    held_out = "validation images" + " held out of the 60,000" * trained.info.is_fashion_mnist
    chosen = (
        f"The best epoch was chosen on {held_out if measured.split != 'val' else 'these very images'}; this is one run."
    )
    if trained.checkpoint:
        chosen = "These are the weights of one checkpoint; this is one run."
    elif not trained.info.num_val:
        chosen = "There were no validation images: these are the weights of the last step. This is one run."
    return (
        f"On {metrics['num_images']:,} {measured.split} images{averaging}: accuracy **{100 * metrics['top1']:.2f} %** "
        f"(95 % interval {low:.2f} to {high:.2f}), loss {metrics['loss']:.4f}, expected calibration error "
        f"{metrics['ece']:.4f} (15 bins). {chosen}"
    )


def _class_table(metrics: dict[str, Any]) -> str:
    lines = ["| class | precision | recall | F1 | images |", "|---|---|---|---|---|"]
    for name, row in metrics["per_class"].items():
        cells = ("-" if row[key] is None else f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))
        lines.append(f"| {escape(name)} | {' | '.join(cells)} | {row['support']:,} |")
    return "\n".join(lines)


def _timm_snippet(trained: Trained) -> str:
    size, mean, std = trained.size, trained.augment.mean, trained.augment.std
    kind, images = ("grey", "images[:, None]") if trained.info.shape[0] == 1 else ("colour", "images")
    level, definition, pixels = level_read(trained.info.shape, size), "", f"{images}.float()"
    if level:  # as the run's own evaluation: without it, fine patterns turn into coarse ones
        definition, pixels = f"\n\n{inspect.getsource(means)}", f"means({images}, {level})"
    return f"""\
```python
import timm
import torch
import torch.nn.functional as F

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # FOLDER: where this README.md is
mean, std = (torch.tensor(values)[:, None, None] for values in ({list(mean)}, {list(std)}))
{definition}

@torch.no_grad()
def logits(images: torch.Tensor) -> torch.Tensor:
    \"\"\"Take {_images(trained.info)}.\"\"\"
    {kind} = F.interpolate({pixels} / 255, ({size}, {size}), mode="bilinear", align_corners=False)
    return model(({kind} - mean) / std)
```"""


def _stem(trained: Trained, *, ours: bool, from_pretrained: bool) -> str:
    mean = trained.augment.mean
    if trained.info.shape[0] == 3:
        start = "its stem began as that of the pretrained weights" if from_pretrained else "trained so from the start"
        return f"The model reads three colour channels, each normalised with its own statistics; {start}."
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
    facts = [f"seed {cfg.seed}", *([trained.checkpoint] if trained.checkpoint else [])]
    if trained.checkpoint:  # the summary's length is that of the whole run
        summary = {name: value for name, value in summary.items() if name not in ("epochs", "steps")}
    facts += [f"{summary[key]:,} {key}" for key in ("epochs", "steps") if isinstance(summary.get(key), int | float)]
    facts += [f"on {escape(str(summary['device']))}"] if summary.get("device") else []
    versions = summary.get("versions") if isinstance(summary.get("versions"), dict) else {}
    facts += [f"{escape(str(name))} {escape(str(version))}" for name, version in (versions or {}).items()]
    start = "It was trained from scratch"
    if cfg.model.starts_from_run:
        start = "It started from the weights of another run"
    if pretrained_licence:
        start = f"It started from timm's pretrained weights (their licence: {escape(pretrained_licence)})"
    return f"{start}: {', '.join(facts)}. `config.yaml` holds every option."
