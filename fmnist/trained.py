"""A trained run, or one of its checkpoints, as a function of images: logits and features."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmnist.checkpoint.contents import MODEL, read_state, verify, weights_to_use
from fmnist.checkpoint.run_directory import read_summary
from fmnist.checkpoint.store import Checkpoints
from fmnist.checkpoint.tensors import load_strict, non_finite, read_tensors_and_digest
from fmnist.config.parse import load_config
from fmnist.config.schema import Config
from fmnist.data.augment import Augment
from fmnist.data.fashion_mnist import CLASS_NAMES
from fmnist.models.head import feature_width, logits_and_features
from fmnist.network import build_network
from fmnist.runtime.hardware import autocast, find_device


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Trained weights and how to use them; the model is built, and the weights are read, when first asked for.

    Attributes:
        name: for titles and tables: the run's name, with the step for a checkpoint.
        directory: the run directory.
        checkpoint: the name of the checkpoint in it; empty for the run's own weights.
        weights: the safetensors file.
        cfg: the run's config.
        summary: the run's summary.json, empty while it has none.
        device: where the model lives.
    """

    name: str
    directory: Path
    checkpoint: str
    weights: Path
    cfg: Config
    summary: dict[str, Any]
    device: torch.device

    def folder(self, kind: str) -> Path:
        """Return where a command keeps what it makes of these weights.

        That is `<directory>/<kind>`, and in there a folder of its own for a checkpoint: a further file inside one would
        make it a damaged one.
        """
        return self.directory / kind / self.checkpoint

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Augment, str]:
        tensors, digest = read_tensors_and_digest(self.weights)
        if bad := non_finite(tensors):
            raise ValueError(f"{self.weights} holds non-finite values in {', '.join(bad[:3])}")
        model, augment = build_network(self.cfg, self.device, load_weights=False)
        load_strict(model, tensors, self.weights)
        return model.eval(), augment, digest

    def load(self) -> None:
        """Build the model and read the weights now.

        Raises:
            ValueError: see `model`.
        """
        _ = self._loaded

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
        return self.cfg.evaluation.size or self.augment.final_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the logits."""
        return CLASS_NAMES

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model over images.

        Args:
            images: uint8 [N, H, W], 0 to 255, as Fashion-MNIST: light on black.

        Returns:
            float32 [N, num_classes] logits and float32 [N, D] penultimate features, what the classifier takes, on
            the CPU.
        """
        logits, features = [], []
        for part in images.split(self.cfg.evaluation.batch_size):
            prepared = self.augment.evaluation(part.to(self.device), self.size)
            with autocast(self.device, self.augment.dtype):
                part_logits, part_features = logits_and_features(self.model, prepared)
            logits.append(part_logits)
            features.append(part_features)
        if not logits:
            return torch.zeros(0, self.augment.num_classes), torch.zeros(0, feature_width(self.model))
        return torch.cat(logits).cpu(), torch.cat(features).cpu()


def open_trained(path: Path, device: torch.device | str | None = None, batch_size: int | None = None) -> Trained:
    """Open a run directory (its weights to use; while it trains, its newest valid checkpoint) or a checkpoint.

    Args:
        path: what train.py wrote.
        device: as torch names it; None takes the accelerator where there is one, else the CPU.
        batch_size: images of one forward; None takes the run's.

    Raises:
        ValueError: one line, for a path that is neither, a checkpoint that does not verify, or a device that is not
            there.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory: give a run directory or one of its checkpoints")
    place = find_device(device)
    if not (path.parent.parent / "config.yaml").is_file():
        path = path.resolve()  # step_00000040 or . where that is the working directory, or a link
    if path.name.startswith("step_") and (path / "manifest.json").is_file():
        verify(path)
        return _open(path.parent.parent, path, place, batch_size)
    if (path / MODEL).is_file() and (path / "config.yaml").is_file():
        return _open(path, None, place, batch_size)
    newest = Checkpoints(path / "checkpoints", 1, {}).newest_good()
    if newest is None:
        raise ValueError(f"{path} holds no model.safetensors and no checkpoint: not a run directory of train.py")
    return _open(path, newest, place, batch_size)


def _open(directory: Path, checkpoint: Path | None, device: torch.device, batch_size: int | None) -> Trained:
    name = directory.resolve().name
    weights = directory / MODEL
    if checkpoint is not None:
        name += f" step {read_state(checkpoint).step}"
        weights = weights_to_use(checkpoint)
    cfg = load_config(directory / "config.yaml")
    if batch_size is not None:
        cfg = replace(cfg, evaluation=replace(cfg.evaluation, batch_size=batch_size))
    return Trained(
        name=name,
        directory=directory,
        checkpoint=checkpoint.name if checkpoint is not None else "",
        weights=weights,
        cfg=cfg,
        summary=read_summary(directory),
        device=device,
    )
