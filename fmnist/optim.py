"""Parameter groups, the optimizer, and the schedule: everything that is a function of the step."""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from fmnist.config.conflicts import Length, warmup_steps
from fmnist.config.schema import MOST_STEPS, Config, OptimConfig
from fmnist.models.head import head_parameters
from fmnist.runtime.adamw import FusedAdamW
from fmnist.runtime.muon import Muon, suits_muon


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Step counts of a run and its learning rate; each method is a pure function of the step.

    Attributes:
        shape: cosine, linear or constant, after the warm-up.
        peak_lr, min_lr: learning rates after the warm-up and at the end.
        steps_per_epoch, total_steps, warmup_steps, head_only_steps: optimizer updates.
        log_steps, evaluation_steps, checkpoint_steps: updates between logged lines, evaluations and checkpoints;
            checkpoint_steps 0: one with every evaluation.
    """

    shape: str
    peak_lr: float
    min_lr: float
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    head_only_steps: int
    log_steps: int
    evaluation_steps: int
    checkpoint_steps: int

    @classmethod
    def from_config(cls, cfg: Config, steps_per_epoch: int) -> "Schedule":
        """Turn durations in epochs into steps.

        Raises:
            ValueError: a warm-up in steps is as long as the run, the head-only phase longer, min_lr lies above lr, or
                the run has more steps than a checkpoint's name has digits for.
        """
        schedule, evaluation = cfg.schedule, cfg.evaluation
        total = schedule.steps or max(1, round(schedule.epochs * steps_per_epoch))
        if total > MOST_STEPS:
            raise ValueError(f"schedule.epochs {schedule.epochs} are {total:,} steps; valid: at most {MOST_STEPS:,}")
        head_only = round(cfg.optim.head_only_epochs * steps_per_epoch)
        if head_only > total:
            raise ValueError(
                f"optim.head_only_epochs is {cfg.optim.head_only_epochs}, {head_only} steps, but the run has {total}; "
                f"valid range: 0 to {total / steps_per_epoch:.4g}"
            )
        if schedule.min_lr > cfg.optim.lr:
            raise ValueError(f"schedule.min_lr is {schedule.min_lr}; valid range: 0 to optim.lr {cfg.optim.lr}")
        return cls(
            shape=schedule.name,
            peak_lr=cfg.optim.lr,
            min_lr=schedule.min_lr,
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            warmup_steps=warmup_steps(cfg, Length(total, steps_per_epoch)),
            head_only_steps=head_only,
            log_steps=cfg.log.every_steps,
            evaluation_steps=evaluation.every_steps or max(1, round(evaluation.every_epochs * steps_per_epoch)),
            checkpoint_steps=cfg.checkpoint.every_steps,
        )

    def lr(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` completed ones."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak_lr
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        remaining = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.min_lr + (self.peak_lr - self.min_lr) * remaining

    def logs(self, step: int) -> bool:
        """Say whether a line is logged after this many updates."""
        return self._is_due(step, self.log_steps)

    def validates(self, step: int) -> bool:
        """Say whether the validation images are evaluated after this many updates."""
        return self._is_due(step, self.evaluation_steps)

    def saves(self, step: int) -> bool:
        """Say whether a full checkpoint is written after this many updates."""
        return self._is_due(step, self.checkpoint_steps or self.evaluation_steps)

    def _is_due(self, step: int, every: int) -> bool:
        """What happens every so many steps happens at the end too."""
        return step % every == 0 or step == self.total_steps

    def epoch(self, step: int) -> float:
        """Return the passes over the training images after `step` updates, with the fraction."""
        return step / self.steps_per_epoch


def parameter_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, Any]]:
    """Split parameters by weight decay, layer, head and kind of update.

    Norms, biases, layer scales and what the model itself names have no weight decay. Each group has `lr_scale`, the
    factor on the schedule's learning rate, `is_head`, and `muon`: whether Muon updates it, where optim.name is muon.

    Raises:
        ValueError: layer decay is asked of a model without layers known to timm.

    Source:
        timm.optim.param_groups_weight_decay and param_groups_layer_decay.
    """
    network: Any = model  # timm's methods, where it has them
    excluded = tuple(network.no_weight_decay()) if hasattr(model, "no_weight_decay") else ()
    if cfg.layer_decay is None:
        groups = param_groups_weight_decay(model, cfg.weight_decay, no_weight_decay_list=excluded)
    elif hasattr(model, "group_matcher"):
        groups = param_groups_layer_decay(model, cfg.weight_decay, excluded, layer_decay=cfg.layer_decay)
    else:
        raise ValueError(f"optim.layer_decay is {cfg.layer_decay} but this model has no layers known to timm")
    head = {id(p) for p in head_parameters(model)}
    # such as tables of position biases: no matrices that images pass through
    spared = {id(p) for name, p in model.named_parameters() if any(fnmatchcase(name, pattern) for pattern in excluded)}

    def kind(parameter: nn.Parameter) -> tuple[bool, bool]:
        is_head = id(parameter) in head
        muon = cfg.name == "muon" and suits_muon(parameter) and not is_head and id(parameter) not in spared
        return is_head, muon

    split = []
    for group in groups:
        for is_head, muon in ((True, False), (False, True), (False, False)):
            if params := [p for p in group["params"] if kind(p) == (is_head, muon)]:
                split.append(
                    {
                        "params": params,
                        "weight_decay": group["weight_decay"],
                        "lr_scale": group.get("lr_scale", 1.0) * (cfg.head_lr_scale if is_head else 1.0),
                        "is_head": is_head,
                        "muon": muon,
                    }
                )
    return split


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer over `parameter_groups`; parameters must be on their device already."""
    groups = parameter_groups(model, cfg)
    if cfg.name == "muon":
        return Muon(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.beta1, nesterov=cfg.beta1 > 0, fused=True)
    return FusedAdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    """Set every group's learning rate for the update that follows `step` completed ones, and return the schedule's.

    While only the head is trained the others' learning rate is 0: their weights stand still (weight decay is
    multiplied by the learning rate too) while their moments warm up.
    """
    lr = schedule.lr(step)
    for group in optimizer.param_groups:
        frozen = step < schedule.head_only_steps and not group["is_head"]
        group["lr"] = 0.0 if frozen else lr * group["lr_scale"]
    return lr
