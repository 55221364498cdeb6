"""What the training loop works with: built from a config, and put back from a checkpoint."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

from fmnist.checkpoint.contents import EMA, MODEL, OPTIMIZER, STATE, TrainState, read_meta, read_state
from fmnist.checkpoint.store import Checkpoints
from fmnist.checkpoint.tensors import load_optimizer_tensors, load_strict, read_tensors
from fmnist.config.conflicts import Length, without_effect
from fmnist.config.same_run import changes, recipe
from fmnist.config.schema import Config
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader, Split
from fmnist.models.flops import flops_per_image
from fmnist.network import build_network
from fmnist.optim import Schedule, build_optimizer
from fmnist.run import Run
from fmnist.runtime.hardware import peak_flops
from fmnist.runtime.provenance import versions
from fmnist.training.clock import Clock
from fmnist.training.non_finite import NonFiniteWatch

logger = logging.getLogger("fmnist")


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
        schedule: the learning rate and what is due, as functions of the step.
        val_split: the validation images; it may be empty.
        test_split: the test images, read once, after the last step.
        checkpoints: those of the run directory.
        state: where training stands.
        clock: images per second of training alone.
        non_finite: traces a NaN to its step.
    """

    model: nn.Module
    ema: ModelEmaV3 | None
    eval_model: nn.Module
    optimizer: torch.optim.Optimizer
    augment: Augment
    loader: Loader
    schedule: Schedule
    val_split: Split
    test_split: Split
    checkpoints: Checkpoints
    state: TrainState
    clock: Clock
    non_finite: NonFiniteWatch


def build(cfg: Config, run: Run) -> Training:
    """Build everything the loop needs and put back the newest valid checkpoint, if there is one.

    Raises:
        ValueError: data, weights, options or checkpoints that cannot be used; one line each.
    """
    # data: all three splits, so that a damaged file is found now and not after the training
    train_split, val_split, test_split = (
        Split.load(name, cfg.data, run.device, fetch=True) for name in ("train", "val", "test")
    )
    if cfg.exact and cfg.exact % run.world_size:
        raise ValueError(f"exact is {cfg.exact}; valid with {run.world_size} processes: a multiple of that")
    loader = Loader(
        train_split,
        global_batch_size=cfg.batch.global_batch_size,
        micro_batch_size=cfg.batch.global_batch_size // cfg.exact if cfg.exact else cfg.batch.micro_batch_size,
        seed=cfg.seed,
        rank=run.rank,
        world_size=run.world_size,
    )

    # model, and what feeds it: pretrained weights only where no checkpoint will fill it
    schedule = Schedule.from_config(cfg, loader.steps_per_epoch)
    side = train_split.images.shape[-1]
    for line in without_effect(cfg, Length(schedule.total_steps, schedule.steps_per_epoch, side)):
        logger.warning("%s", line)
    meta = {"model": cfg.model.name, "world_size": run.world_size, "versions": versions(), "config": recipe(cfg)}
    checkpoints = Checkpoints(run.directory / "checkpoints", cfg.checkpoint.keep_last, meta)
    newest = None if cfg.overwrite else checkpoints.newest_good()
    model, augment = build_network(cfg, run.device, load_weights=newest is None)

    logger.info("augmentation: %s", augment.backend)

    # optimizer, and the moving average of the weights
    optimizer = build_optimizer(model, cfg.optim)
    ema = ModelEmaV3(model, decay=cfg.optim.ema_decay, use_warmup=True) if cfg.optim.ema_decay else None

    # resume: weights, optimizer and step of the newest checkpoint
    state = TrainState() if newest is None else restore(newest, cfg, model, ema, optimizer)

    return Training(
        model=model,
        ema=ema,
        eval_model=ema.module if ema else model,
        optimizer=optimizer,
        augment=augment,
        loader=loader,
        schedule=schedule,
        val_split=val_split,
        test_split=test_split,
        checkpoints=checkpoints,
        state=state,
        clock=Clock(cfg.batch.global_batch_size, state.train_seconds, peak_images_per_second(model, augment, run)),
        non_finite=NonFiniteWatch(run, loader, augment, run.directory, cfg.log.every_steps),
    )


def peak_images_per_second(model: nn.Module, augment: Augment, run: Run) -> float | None:
    """Return what the peak arithmetic of all processes' hardware would allow; None where it is not known."""
    peak = peak_flops(run.device_name, run.precision)
    if peak is None:
        return None
    return peak * run.world_size / flops_per_image(model, len(augment.mean), augment.final_size)[1]


def restore(
    path: Path, cfg: Config, model: nn.Module, ema: ModelEmaV3 | None, optimizer: torch.optim.Optimizer
) -> TrainState:
    """Put a verified checkpoint back, and return where training stood.

    Raises:
        ValueError: it is of another config or model; one line naming the file and what differs.
    """
    state, meta = read_state(path), read_meta(path)
    if changed := changes(meta.get("config", {}), json.loads(json.dumps(recipe(cfg)))):
        raise ValueError(f"{path / STATE} is of another config: {'; '.join(changed[:3])}")
    load_strict(model, read_tensors(path / MODEL), path / MODEL)
    moments = path / OPTIMIZER
    load_optimizer_tensors(model, optimizer, read_tensors(moments), moments)
    if ema is not None:
        load_strict(ema.module, read_tensors(path / EMA), path / EMA)
    logger.info("resuming from %s", path)
    if (made_with := meta.get("versions", {}).get("torch", torch.__version__)) != torch.__version__:
        logger.warning(
            "it was written with torch %s, this is %s: the last bits may differ", made_with, torch.__version__
        )
    return state
