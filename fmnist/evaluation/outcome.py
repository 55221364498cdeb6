"""Evaluate a trained model on a split, or several together: logits, and what it costs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fmnist.data.fashion_mnist import INFO
from fmnist.data.info import DataInfo, SplitName
from fmnist.data.registry import Source, open_source
from fmnist.data.split import Split
from fmnist.evaluation.calibration import average_probabilities
from fmnist.evaluation.cost import BATCH_SIZES, Cost, measure_cost, sum_of_costs
from fmnist.metrics import predict
from fmnist.runtime.compute import Compute
from fmnist.runtime.ownership import check_writable
from fmnist.trained import Trained

logger = logging.getLogger("fmnist")
Tta = Literal["none", "flip"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate.

    Attributes:
        split: the images.
        tta: flip averages an image and its mirror; None takes the run's own setting.
        batch_size: images of one forward; None takes the run's own.
        root: where the data set lies; None takes the run's own.
        quick: metrics and figures only: skips accuracy on subsets, calibration, timing and report.html.
        output: folder of its files; None takes the run's `evaluation/<split>`.
        written: files will be written, so a folder that cannot be is refused before anything is computed.
    """

    split: Literal["test", "val", "train"] = "test"
    tta: Tta | None = None
    batch_size: int | None = None
    root: str | None = None
    quick: bool = False
    output: Path | None = None
    written: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a model, or several together, gave on a split; all on the CPU.

    Attributes:
        name: for titles and tables.
        model: its architecture.
        directory: where the files go.
        split, tta: as requested.
        images: uint8 [N, H, W] or [N, C, H, W]; none where quick, which shows none.
        labels: int64 [N].
        logits: float32 [N, C], by `tta`.
        by_tta: the same for none and for flip; empty where quick.
        validation: logits and labels of the validation images; none where there are none.
        class_names: C names, in label order.
        info: the data set that they are of.
        cost: none where quick.
        data, data_sha256: name of the data set, and digest of these images and labels.
        weights_sha256: of the file of weights; empty for an ensemble.
        trained: the run; none for an ensemble.
        members: names of an ensemble's models.
        published, val_published: int64, the positions of these images, and of the validation images, in the data set's
            own file; none: those in the split.
        files: of a folder of pictures: the file of each image; empty for others.
    """

    name: str
    model: str
    directory: Path
    split: str
    tta: Tta
    images: Tensor
    labels: Tensor
    logits: Tensor
    by_tta: Mapping[str, Tensor] = field(default_factory=dict)
    class_names: tuple[str, ...]
    info: DataInfo = INFO
    validation: tuple[Tensor, Tensor] | None = None
    cost: Cost | None = None
    data: str = "Fashion-MNIST"
    data_sha256: str = ""
    weights_sha256: str = ""
    trained: Trained | None = None
    members: tuple[str, ...] = ()
    published: Tensor | None = None
    val_published: Tensor | None = None
    files: tuple[str, ...] = ()

    @property
    def indices(self) -> list[int]:
        """By what files and tables name each image."""
        return list(range(len(self.labels))) if self.published is None else self.published.tolist()

    @property
    def title(self) -> str:
        """The heading of its files."""
        other = f" of {self.data} (sha256 {self.data_sha256[:8]})" if self.other_data else ""
        return f"{self.name}: {self.split} images{other}" + (", flip averaging" if self.tta == "flip" else "")

    @property
    def other_data(self) -> bool:
        """Whether these are other images than those of this split that the run was made with."""
        own = self.trained.images_sha256(self.split) if self.trained is not None else None
        return own is not None and own != self.data_sha256

    @property
    def correct(self) -> Tensor:
        """Which images it gets right: bool [N]."""
        return self.logits.argmax(dim=1) == self.labels


def evaluate(trained: Trained, compute: Compute, request: Request) -> Outcome | None:
    """Run one model over a split, on all processes.

    Returns:
        What it gave, on the main process.

    Raises:
        ValueError: the weights do not fit, or there are no images to evaluate on.
    """
    model, augment = trained.model, trained.augment
    data = trained.data(request.root)
    source = compute.together(lambda: open_source(data))
    split = _same_everywhere(request.split, source, compute)
    trained.check_split(request.split, split)
    own = trained.images_sha256(request.split)
    # Other images than the run's own have a folder of their own; a run from before it knew takes --data.root's word.
    other = split.digest != own if own else request.root not in (None, trained.cfg.data.root)
    directory = request.output or trained.folder("evaluation", request.split + other * f"-{split.digest[:8]}")
    if request.written:
        compute.on_main(check_writable, directory)
    if other:
        logger.info("%s was made with other %s images than these: see %s", trained.name, request.split, directory)
    cfg = trained.cfg.evaluation
    batch_size = request.batch_size or cfg.batch_size
    cfg = replace(cfg, tta=request.tta or cfg.tta, batch_size=batch_size, size=trained.size)

    def logits_of(images: Split, tta: Tta) -> Tensor:
        return predict(model, images, augment, replace(cfg, tta=tta), compute).cpu()

    logits, validation, val_published, cost = logits_of(split, cfg.tta), None, None, None
    by_tta: dict[str, Tensor] = {}
    if not request.quick:
        both: tuple[Tta, Tta] = ("none", "flip")
        by_tta = {tta: logits if tta == cfg.tta else logits_of(split, tta) for tta in both}
        if request.split == "val":
            validation, val_published = (logits, split.labels.cpu()), split.published
        elif trained.info.num_val:
            val_split = _same_everywhere("val", source, compute)
            validation, val_published = (logits_of(val_split, cfg.tta), val_split.labels.cpu()), val_split.published
        few = split.between(0, max(BATCH_SIZES))
        cost = compute.on_main(measure_cost, trained, few, compute.device_name, cfg.tta)
    outcome = Outcome(
        name=trained.name,
        model=trained.cfg.model.name,
        directory=directory,
        split=request.split,
        tta=cfg.tta,
        images=split.at_rows(range(0)),
        labels=split.labels.cpu(),
        logits=logits,
        by_tta=by_tta,
        class_names=split.class_names,
        info=split.info,
        validation=validation,
        cost=cost,
        data=split.title(),
        data_sha256=split.digest,
        weights_sha256=trained.digest,
        trained=trained,
        published=split.published,
        val_published=val_published,
        files=tuple(map(split.file, range(len(split)))) if split.files else (),
    )
    shown = range(0) if request.quick else None  # on the host of the main process, which draws pictures of them
    return compute.on_main(lambda: replace(outcome, images=split.at_rows(shown)))


def _same_everywhere(name: SplitName, source: Source, compute: Compute) -> Split:
    """Load a split on every process, each from its own place, and compare what they hold; images stay on the host."""
    split = compute.together(lambda: Split.load(name, source, read=False))
    compute.agree({f"as {name} images": f"sha256 {split.digest[:12]}"}, "all processes have to read the same data")
    return replace(split, labels=split.labels.to(compute.device), sha256=split.digest)


def same_places(one: Tensor | None, other: Tensor | None) -> bool:
    """Say whether images stand at the same positions of their data set: equal labels do not make them the same."""
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def check_same_images(outcomes: Sequence[Outcome]) -> None:
    """Refuse outcomes of different images or labels.

    The same pictures stored at another size, or padded, have another digest: labels and positions tell them apart.

    Raises:
        ValueError: one line with the first two that differ.
    """
    first = outcomes[0]
    for other in outcomes[1:]:
        as_stored = (other.info.shape, other.info.fit) == (first.info.shape, first.info.fit)
        if (
            not torch.equal(other.labels, first.labels)
            or not same_places(other.published, first.published)
            or (as_stored and other.data_sha256 != first.data_sha256)
        ):
            raise ValueError(
                f"{first.name} and {other.name} were evaluated on different {first.split} images: compare runs of the "
                "same data options, or give one --data.root for all"
            )


def ensemble(outcomes: list[Outcome], folder: Path) -> Outcome:
    """Average the probabilities of several models on the same images.

    Args:
        outcomes: two and more, of the same images.
        folder: its evaluation goes to `<folder>/ensemble/<split>/`.

    Raises:
        ValueError: the images differ.
    """
    check_same_images(outcomes)
    first = outcomes[0]
    pairs = [outcome.validation for outcome in outcomes]
    known = [pair for pair in pairs if pair is not None]
    # One run's validation images are another's training images where val_size differs: nothing to fit on then.
    shared = len(known) == len(pairs) and all(torch.equal(pair[1], known[0][1]) for pair in known)
    shared = shared and all(same_places(outcome.val_published, first.val_published) for outcome in outcomes)
    costs = [outcome.cost for outcome in outcomes if outcome.cost is not None]
    tta: Tta = "flip" if all(outcome.tta == "flip" for outcome in outcomes) else "none"
    return replace(
        first,
        name=f"ensemble of {len(outcomes)}",
        model=" + ".join(dict.fromkeys(outcome.model for outcome in outcomes)),
        directory=folder / "ensemble" / first.split,
        tta=tta,
        logits=average_probabilities([outcome.logits for outcome in outcomes]),
        by_tta={key: average_probabilities([outcome.by_tta[key] for outcome in outcomes]) for key in first.by_tta},
        validation=(average_probabilities([pair[0] for pair in known]), known[0][1]) if shared else None,
        cost=sum_of_costs(costs) if len(costs) == len(outcomes) else None,
        trained=None,
        weights_sha256="",
        members=tuple(outcome.name for outcome in outcomes),
    )
