"""A trained run, or one of its checkpoints, as a function of images: logits and features."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmnist.checkpoint.contents import MODEL, is_checkpoint, read_meta, read_state, verify, weights_to_use
from fmnist.checkpoint.fingerprint import IMAGES, about_data, class_changes, kept_fingerprint
from fmnist.checkpoint.run_directory import SUMMARY, read_summary
from fmnist.checkpoint.store import Checkpoints, newer_than_weights
from fmnist.checkpoint.tensors import load_strict, non_finite, read_tensors_and_digest
from fmnist.config.conflicts import sizes_by_epoch
from fmnist.config.parse import load_config
from fmnist.config.same_run import changes, listed, not_of
from fmnist.config.schema import Config, DataConfig
from fmnist.data.augment import Augment
from fmnist.data.info import DATA_FILE, DataInfo, SplitName, read_info
from fmnist.data.split import Split
from fmnist.models.head import feature_width, logits_and_features
from fmnist.network import build_network
from fmnist.runtime.console import one_line
from fmnist.runtime.hardware import autocast, open_device

if TYPE_CHECKING:
    from fmnist.runtime.compute import Compute  # half a second of accelerate, which only several processes need
logger = logging.getLogger("fmnist")
LOWEST, HIGHEST = 0.05, 20.0  # temperatures that `fit_temperature` searches


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Trained weights and how to use them; the model is built, and the weights are read, when first asked for.

    Attributes:
        name: for titles and tables: the run's name, with the step for a checkpoint.
        directory: the run directory.
        checkpoint: the name of the checkpoint in it; empty for the run's own weights.
        weights: the safetensors file.
        cfg: the run's config.
        info: of its data set.
        summary: the run's summary.json, empty while it has none.
        device: where the model lives.
        sha256: what the weights have to have: in the checkpoint's manifest, or in summary.json; empty where a run from
            before it stood there says nothing.
        fingerprint: of the run's data and first weights; empty for a run from before there was one.
        seen_size: pixels per side at which the weights were validated, or trained where they were not; None: the last.
    """

    name: str
    directory: Path
    checkpoint: str
    weights: Path
    cfg: Config
    info: DataInfo
    summary: dict[str, Any]
    device: torch.device
    sha256: str = ""
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    seen_size: int | None = None

    @property
    def temperature(self) -> float:
        """What logits are divided by; 1 for a checkpoint, and for a run that fitted none on validation images.

        Raises:
            ValueError: summary.json holds something else under that name.
        """
        value = self.summary.get("temperature") if not self.checkpoint else None
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not LOWEST <= value <= HIGHEST:
            raise ValueError(f"{self.directory / SUMMARY}: temperature is {value!r:.40}; valid: {LOWEST} to {HIGHEST}")
        return float(value)

    def probabilities(self, logits: Tensor, *, calibrate: bool = True) -> Tensor:
        """Return the probability of each class, float64 [N, num_classes], of logits of the same shape."""
        return (logits.double() / (self.temperature if calibrate else 1.0)).softmax(dim=-1)

    def folder(self, kind: str, *more: str) -> Path:
        """Return where a command keeps what it makes of these weights.

        That is `<directory>/<kind>`, and in there a folder of its own for a checkpoint, which no command writes into.

        Raises:
            ValueError: a link there leads out of the run directory.
        """
        folder = self.directory.joinpath(kind, self.checkpoint, *more)
        if not folder.resolve().is_relative_to(self.directory.resolve()):
            raise ValueError(f"{folder} is a link out of the run directory: remove it, or name another place: --output")
        return folder

    def data(self, root: str | None = None) -> DataConfig:
        """Return the options of its data set, with another place where one is given."""
        return replace(self.cfg.data, root=root or self.cfg.data.root, corrections=self._corrections)

    @cached_property
    def _corrections(self) -> str | None:
        corrections = self.cfg.data.corrections
        if corrections is not None and not os.path.exists(os.path.expanduser(corrections)):
            logger.warning("%s: data.corrections: %s is gone: labels are used as given", self.name, corrections)
            return None
        return corrections

    def split(self, name: SplitName, root: str | None = None, *, own: bool = False) -> Split:
        """Read a split as the run divides its data set, on the CPU.

        Args:
            name: train, val or test.
            root: where the data set lies; None takes the run's.
            own: refuse other images or labels than the run was made with; else they are one warning.

        Raises:
            ValueError: it cannot be found or read, has no images, or see `own`.
        """
        split = self.check_split(name, Split.load(name, self.data(root)))
        if self.images_sha256(name) not in (None, split.digest):
            kind = {"train": "training", "val": "validation", "test": "test"}[name]
            said = f"{split.location} holds other {kind} images or labels than {self.name} was made with"
            if own:
                raise ValueError(said)
            logger.warning("%s", said)
        return split

    def check_split(self, name: SplitName, split: Split) -> Split:
        """Refuse a split that holds no images, or is of other classes than the run."""
        if split.class_names != self.class_names:
            differ = class_changes(self.class_names, split.class_names)
            raise ValueError(f"{split.location} does not hold the classes of {self.name}: {differ}")
        if not len(split) and name == "val":
            raise ValueError(f"{self.name} was trained without validation images")
        if not len(split):
            raise ValueError(f"{split.info.title} has no {name} images; {self.name} has {', '.join(self.splits)}")
        return split

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """Those of its data set that hold images."""
        held = {"train": True, "val": self.info.num_val, "test": self.info.num_test != 0}
        return tuple(name for name, some in held.items() if some)  # type: ignore[misc]

    def images_sha256(self, split: str) -> str | None:
        """Return the digest of the run's own split; None for a run from before it was kept."""
        return self.fingerprint.get(IMAGES[split])

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Augment, str]:
        tensors, digest = read_tensors_and_digest(self.weights)
        if self.sha256 and digest != self.sha256:
            origin = "its checkpoint's manifest" if self.checkpoint else SUMMARY
            raise ValueError(f"{self.weights} does not have the hash in {origin}: it was changed afterwards")
        if bad := non_finite(tensors):
            raise ValueError(f"{self.weights} holds non-finite values in {', '.join(bad[:3])}")
        model, augment = build_network(self.cfg, self.info, self.device, load_weights=False)
        load_strict(model, tensors, self.weights)
        return model.eval(), augment, digest

    @property
    def model(self) -> nn.Module:
        """The network in evaluation mode with these weights.

        Raises:
            ValueError: the weights do not fit the config's model, or hold a non-finite value.
        """
        return self._loaded[0]

    @property
    def augment(self) -> Augment:
        """What resizes and normalises images as the run did."""
        return self._loaded[1]

    @property
    def digest(self) -> str:
        """The sha256 of the very bytes that the weights were read from."""
        return self._loaded[2]

    @property
    def size(self) -> int:
        """Pixels per side that the model sees."""
        return self.cfg.evaluation.size or self.seen_size or self.augment.final_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the logits."""
        return self.info.class_names

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model over images.

        Args:
            images: uint8 [N, H, W] or [N, C, H, W], 0 to 255, as those that the run was trained on.

        Returns:
            float32 [N, num_classes] logits and float32 [N, D] penultimate features, what the classifier takes, on
            the CPU.
        """
        logits, features = [], []
        for part in images.split(self.cfg.evaluation.batch_size) if len(images) else ():
            prepared = self.augment.evaluation(part.to(self.device), self.size)
            with autocast(self.device, self.augment.dtype):
                part_logits, part_features = logits_and_features(self.model, prepared)
            logits.append(part_logits)
            features.append(part_features)
        if not logits:
            return torch.zeros(0, self.augment.num_classes), torch.zeros(0, feature_width(self.model))
        return torch.cat(logits).cpu(), torch.cat(features).cpu()


def open_trained(
    path: Path, device: torch.device | str | None = None, batch_size: int | None = None, **model: Any
) -> Trained:
    """Open a run directory or a checkpoint.

    Of a run directory that is its weights to use; where it was trained further since they were written, or is still
    training, its newest valid checkpoint.

    Args:
        path: what train.py wrote.
        device: as torch names it; None takes the accelerator where there is one, else the CPU.
        batch_size: images of one forward; None takes the run's.
        model: options of the section `model` that replace the run's, e.g. precision="fp32".

    Raises:
        ValueError: one line, for a path that is neither, a checkpoint that does not verify, or a device that is not
            there.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory: give a run directory or one of its checkpoints")
    place = open_device(device)
    real = path.resolve()
    named = is_checkpoint(real)
    if named and not (path.name == real.name and (path.parent.parent / "config.yaml").is_file()):
        path = real  # step_00000040 or . where that is the working directory, or a link
    run = path.parent.parent if named else path
    summary = read_summary(run)

    def opened(checkpoint: Path | None) -> Trained:
        return _open(run, checkpoint, summary, place, batch_size, model)

    if named:
        return opened(path)
    while (newest := newer_than_weights(run, summary)) is not None:
        try:
            trained = opened(newest)
            _ = trained.model  # now: a run that is training drops its older checkpoints
        except ValueError:
            if newest.is_dir():
                raise
            continue  # the run is training and dropped it: there is a newer one
        finished, whole = summary.get("status") == "finished", (run / MODEL).is_file()
        why = f"has no {MODEL}" if finished and not whole else "is not finished"
        logger.info("%s %s: %s, its newest valid checkpoint, is used", path, why, newest.name)
        return trained
    return opened(None)


def open_together(path: Path, compute: "Compute") -> Trained:
    """Open the same weights on all processes: what the main one found and read goes to the others.

    A run that is training writes and drops checkpoints meanwhile, and the disk of another process may hold other ones.

    Raises:
        ValueError: on the main process, see `open_trained`; the others end with it.
    """

    def load() -> tuple[Trained, str]:
        trained = open_trained(path, compute.device)
        return trained, trained.digest

    mine = compute.on_main(load)
    about = compute.gather(mine and (replace(mine[0], device=torch.device("cpu")), mine[1]))[0]  # without the tensors
    assert about is not None  # the main process has one, or all have ended
    if mine is not None:
        trained = mine[0]
    else:
        trained, digest = replace(about[0], device=compute.device), about[1]
        model, augment = build_network(trained.cfg, trained.info, compute.device, load_weights=False)
        trained.__dict__["_loaded"] = model.eval(), augment, digest  # where the cached property keeps it
    compute.broadcast(trained.model.state_dict().values())
    return trained


def _newest_meta(directory: Path) -> dict[str, Any]:
    """Return what a run's newest checkpoint says about itself; nothing where there is none that can be read."""
    checkpoints = Checkpoints(directory / "checkpoints", 1, {})
    for step in checkpoints.steps()[-1:]:
        with suppress(ValueError):
            return read_meta(checkpoints.path(step))
    return {}


def _open(
    directory: Path,
    checkpoint: Path | None,
    summary: dict[str, Any],
    device: torch.device,
    batch_size: int | None,
    model: Mapping[str, Any],
) -> Trained:
    name = one_line(directory.resolve().name)
    cfg, kept = load_config(directory / "config.yaml"), kept_fingerprint(directory)
    if checkpoint is None:
        weights, sha256 = directory / MODEL, summary.get("weights_sha256")
        size = summary.get("val.size" if summary.get("val.top1") is not None else "weights_size")
        if changed := not_of(_newest_meta(directory).get("config", {}), cfg, kept):
            changes_made = one_line(listed(changed))
            raise ValueError(f"{directory / 'config.yaml'} was changed after the training: {changes_made}")
    else:
        digests, state = verify(checkpoint), read_state(checkpoint)
        if changed := not_of(read_meta(checkpoint)["config"], cfg, kept):
            raise ValueError(f"{checkpoint} is of another run: {one_line(listed(changed))}")
        name += f" step {state.step}"
        weights = weights_to_use(checkpoint, digests)
        sha256 = digests[weights.name]
        size = state.best_val.get("size") if state.best_val and state.best_step == state.step else state.size
    info = read_info(directory)
    if changed := changes(kept, about_data(info.class_names, (*info.mean, *info.std))):
        what = " and ".join(line.partition(" in ")[0] for line in changed)
        raise ValueError(
            f"{directory / DATA_FILE} does not hold the {what} that the run was trained with: it was changed"
        )
    cfg = replace(cfg, model=replace(cfg.model, **model))
    if batch_size is not None:
        cfg = replace(cfg, evaluation=replace(cfg.evaluation, batch_size=batch_size))
    planned = sizes_by_epoch(cfg, info.num_train)
    final = planned[max(planned)]
    seen_size = int(size) if isinstance(size, int | float) and size != final and not cfg.evaluation.size else None
    if seen_size:
        logger.info("%s has seen smaller images so far, and is used at %d px", name, seen_size)
    return Trained(
        name=name,
        directory=directory,
        checkpoint=checkpoint.name if checkpoint is not None else "",
        weights=weights,
        cfg=cfg,
        info=info,
        summary=summary,
        device=device,
        sha256=sha256 if isinstance(sha256, str) else "",
        fingerprint=kept,
        seen_size=seen_size,
    )
