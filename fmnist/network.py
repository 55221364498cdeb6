"""A network on the device with what feeds it: new from a config, or opened from what train.py left."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmnist.checkpoint.contents import MODEL, read_state, verify, weights_to_use
from fmnist.checkpoint.store import Checkpoints
from fmnist.checkpoint.tensors import load_strict, non_finite, read_tensors
from fmnist.config.parse import load_config
from fmnist.config.schema import Config
from fmnist.data.augment import Augment
from fmnist.data.fashion_mnist import NUM_CLASSES
from fmnist.models import build_model
from fmnist.runtime.hardware import resolve_precision


def build_network(cfg: Config, device: torch.device, *, load_weights: bool) -> tuple[nn.Module, Augment]:
    """Build the model on the device, and the augmentation that feeds it the channels and statistics it wants.

    Args:
        cfg: the run's config.
        device: where the parameters live.
        load_weights: read pretrained weights; false where a checkpoint will fill the model.

    Raises:
        ValueError: an unknown model, an option or size it does not take, or weights that do not fit.
    """
    size = cfg.augment.size
    sizes = tuple(size.values()) if isinstance(size, dict) else (size,)
    final = cfg.evaluation.size or sizes[-1]
    model, normalization = build_model(
        cfg.model, num_classes=NUM_CLASSES, image_size=final, image_sizes=sizes, load_weights=load_weights
    )
    memory_format = torch.channels_last if cfg.model.channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=memory_format)
    augment = Augment(
        cfg.augment,
        num_classes=NUM_CLASSES,
        mean=normalization.mean,
        std=normalization.std,
        channels_last=cfg.model.channels_last,
        dtype=torch.bfloat16 if resolve_precision(cfg.model.precision) == "bf16" else torch.float32,
        device=device,
    )
    return model, augment


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Trained weights and how to use them.

    Attributes:
        name: for titles and tables: the run's name, with the step for a checkpoint.
        directory: the run directory.
        checkpoint: the name of the checkpoint in it; empty for the run's own weights.
        weights: the safetensors file.
        cfg: the run's config.
        summary: the run's summary.json, empty while it has none.
    """

    name: str
    directory: Path
    checkpoint: str = ""
    weights: Path
    cfg: Config
    summary: dict[str, Any]

    def folder(self, kind: str) -> Path:
        """Return where a command keeps what it makes of these weights.

        That is `<directory>/<kind>`, and in there a folder of its own for a checkpoint: a further file inside one would
        make it a damaged one.
        """
        return self.directory / kind / self.checkpoint

    @property
    def output(self) -> Path:
        """Where an evaluation of these weights is written, `<output>/<split>/`."""
        return self.folder("evaluation")

    def load(self, device: torch.device) -> tuple[nn.Module, Augment]:
        """Build the model in evaluation mode with these weights, and what prepares its images.

        Raises:
            ValueError: the weights do not fit the config's model, or hold a non-finite value.
        """
        tensors = read_tensors(self.weights)
        if bad := non_finite(tensors):
            raise ValueError(f"{self.weights} holds non-finite values in {', '.join(bad[:3])}")
        model, augment = build_network(self.cfg, device, load_weights=False)
        load_strict(model, tensors, self.weights)
        return model.eval(), augment


def open_trained(path: Path) -> Trained:
    """Open a run directory (its weights to use; while it trains, its newest good checkpoint) or a checkpoint.

    Raises:
        ValueError: one line, for a path that is neither, or a checkpoint that does not verify.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory: give a run directory or one of its checkpoints")
    if path.name.startswith("step_") and (path / "manifest.json").is_file():
        verify(path)
        return _open(path.parent.parent, path)
    if (path / "model.safetensors").is_file() and (path / "config.yaml").is_file():
        return _open(path, None)
    newest = Checkpoints(path / "checkpoints", 1, {}).newest_good()
    if newest is None:
        raise ValueError(f"{path} holds no model.safetensors and no checkpoint: not a run directory of train.py")
    return _open(path, newest)


def _open(directory: Path, checkpoint: Path | None) -> Trained:
    cfg = load_config(directory / "config.yaml")
    name = directory.resolve().name
    weights = directory / MODEL
    if checkpoint is not None:
        name += f" step {read_state(checkpoint).step}"
        weights = weights_to_use(checkpoint)
    try:
        summary = json.loads((directory / "summary.json").read_bytes())
    except (OSError, ValueError):
        summary = {}
    return Trained(
        name=name,
        directory=directory,
        checkpoint=checkpoint.name if checkpoint is not None else "",
        weights=weights,
        cfg=cfg,
        summary=summary,
    )
