"""What the tests of predict, unlike and monitor share: a model that has learned a little, and pictures on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import train
from sklearn.datasets import load_digits
from torch import Tensor

LEARNED_RUN = """
data: {val_size: 2000}
batch: {global_batch_size: 128}
augment: {size: 28, flip: 0.5}
model: {name: cnn, options: {widths: [8, 16, 32]}}
optim: {lr: 0.01, ema_decay: 0.0}
schedule: {steps: 150, warmup_steps: 20}
checkpoint: {every_steps: 0}
log: {every_steps: 50, wandb: disabled}
"""


def learned_run(factory: pytest.TempPathFactory) -> Path:
    """Train a small CNN for 150 steps on real images, once for all tests; return its run directory."""
    folder = factory.getbasetemp() / "learned"
    if not (folder / "run" / "summary.json").is_file():
        folder.mkdir(exist_ok=True)
        (folder / "learned.yaml").write_text(LEARNED_RUN)
        train("--config", folder / "learned.yaml", "--output_dir", folder / "run")
    return folder / "run"


def digits() -> Tensor:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8, enlarged: uint8 [1797, 28, 28], light on black."""
    images = torch.from_numpy(load_digits().images).float()[:, None] / 16 * 255
    enlarged = F.interpolate(images, (28, 28), mode="bicubic", align_corners=False)
    return enlarged.clamp(0, 255).byte()[:, 0]


def noise(number: int) -> Tensor:
    """Uniform noise: uint8 [number, 28, 28]."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (number, 28, 28), dtype=np.uint8))
