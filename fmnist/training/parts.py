"""What the training loop works with."""

from dataclasses import dataclass, replace

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fmnist.checkpoint.contents import TrainState
from fmnist.checkpoint.store import Checkpoints
from fmnist.config.schema import Config, EvaluationConfig
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.data.placement import Placement
from fmnist.data.split import Split
from fmnist.optim import Schedule
from fmnist.tracking.progress import Progress
from fmnist.training.clock import Clock
from fmnist.training.non_finite import NonFiniteWatch


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the training loop works with.

    Attributes:
        model: the network, not wrapped; its parameters are the optimizer's.
        ema: the moving average of its weights, if `optim.ema_decay` asks for one.
        eval_model: what is validated: the moving average where there is one, else the model.
        optimizer: AdamW, SGD or Muon over the parameter groups.
        augment: makes images and targets from a micro-batch.
        loader: cuts the training images into batches.
        placement: where the images lie.
        schedule: the learning rate and what is due, as functions of the step.
        val_split: the validation images; it may be empty.
        test_split: the test images, read once, after the last step.
        checkpoints: those of the run directory.
        state: where training stands.
        clock: images per second of training alone.
        progress: what people see of it.
        non_finite: traces a NaN to its step.
    """

    model: nn.Module
    ema: ModelEmaV3 | None
    eval_model: nn.Module
    optimizer: torch.optim.Optimizer
    augment: Augment
    loader: Loader
    placement: Placement
    schedule: Schedule
    val_split: Split
    test_split: Split
    checkpoints: Checkpoints
    state: TrainState
    clock: Clock
    progress: Progress
    non_finite: NonFiniteWatch

    def validation(self, cfg: Config) -> EvaluationConfig:
        """Return the options of the validation after this step: at the size of its epoch, where none is set."""
        size = self.size_at(self.state.step)
        own = cfg.evaluation.size or size == self.augment.final_size
        return cfg.evaluation if own else replace(cfg.evaluation, size=size)

    def trial(self) -> Tensor:
        """Return as many images as a micro-batch of the next step has, self.augment.dtype [B, C, S, S], all zeros."""
        size = self.size_at(self.state.step + 1)
        shape = self.loader.micro_batch_size, len(self.augment.mean), size, size
        return torch.zeros(shape, dtype=self.augment.dtype, device=next(self.model.parameters()).device)

    def size_at(self, step: int) -> int:
        """Return the pixels per side of the images of a step, from 1 on."""
        return self.augment.size((step - 1) // self.loader.steps_per_epoch)
