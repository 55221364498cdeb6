"""Build what the training loop works with from a config, and put it back from a checkpoint."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fmnist.checkpoint.contents import TrainState, read_state
from fmnist.checkpoint.fingerprint import WEIGHTS, digest_of_weights, fingerprint
from fmnist.checkpoint.store import Checkpoints
from fmnist.config.conflicts import Length, without_effect
from fmnist.config.same_run import of_all_ranks, recipe
from fmnist.config.schema import Config
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.data.info import DATA_FILE, DataInfo
from fmnist.data.split import Split
from fmnist.models.fast_layers import depthwise_without_effect
from fmnist.models.flops import flops_per_image
from fmnist.network import build_network
from fmnist.optim import Schedule, build_optimizer
from fmnist.run import Run
from fmnist.runtime.hardware import peak_flops
from fmnist.runtime.provenance import versions
from fmnist.runtime.weight_average import WeightAverage
from fmnist.tracking.progress import Progress
from fmnist.training.budget import fixed_steps, with_steps
from fmnist.training.clock import Clock
from fmnist.training.images import build_loader, load_splits
from fmnist.training.micro_batch import choose_micro_batch
from fmnist.training.non_finite import NonFiniteWatch
from fmnist.training.parts import Training
from fmnist.training.resume import continuation, find_start, restore
from fmnist.training.start_from_run import start_from_run

logger = logging.getLogger("fmnist")


def build(cfg: Config, run: Run, train_step: Callable[..., Any]) -> Training | None:
    """Build everything the loop needs and put back the newest valid checkpoint, if there is one.

    Args:
        cfg: every option.
        run: this process's view of the run.
        train_step: of the loop; what `schedule.minutes` allows is found by timing it.

    Returns:
        None where the run is finished.

    Raises:
        ValueError: data, weights, options or checkpoints that cannot be used; one line each.
    """
    run.agree_on_options(of_all_ranks(cfg))  # before anything is done together

    # data: all three splits, so that a damaged file is found now and not after the training
    splits, placement = load_splits(cfg, run)
    train_split, val_split, test_split = splits.values()
    info = replace(train_split.info, num_train=len(train_split), num_val=len(val_split), num_test=len(test_split))
    run.kept[DATA_FILE] = info.to_json()
    loader = build_loader(cfg, run, train_split, placement)

    # where to begin: all processes see the same directory, data and weights, which are those of the run in it
    checkpoints = _checkpoints(cfg, run, splits, info)
    asked, minutes = cfg, cfg.schedule.minutes
    total_steps = 1 if minutes else Schedule.from_config(cfg, loader.steps_per_epoch).total_steps
    finished, newest = find_start(cfg, run, checkpoints, total_steps)
    if finished:
        return None
    micro_batch_size = None
    if minutes:  # the steps of the first start, whose clock said how many
        kept = read_state(newest).total_steps if newest is not None else None
        if kept is None:
            kept, micro_batch_size = fixed_steps(cfg, run, loader, info, splits, train_step)
        cfg = with_steps(cfg, kept)
    schedule = Schedule.from_config(cfg, loader.steps_per_epoch)
    for line in _idle_settings(cfg, run, loader, schedule, info):
        run.on_main(logger.warning, "%s", line)

    # model, what feeds it, and what updates it
    model, augment = _network(cfg, run, info, fresh=newest is None)
    optimizer = build_optimizer(model, cfg.optim)
    ema = WeightAverage(model, decay=cfg.optim.ema_decay, use_warmup=True) if cfg.optim.ema_decay else None

    # resume: weights, optimizer and step of the newest checkpoint
    state = TrainState() if newest is None else restore(newest, asked, model, ema, optimizer, run.fingerprint)
    state.total_steps = schedule.total_steps if minutes else None
    if newest is not None and not minutes and (said := continuation(newest, cfg, schedule, state)):
        logger.info("%s", said)
    if cfg.batch.micro_batch_size == "auto":
        found = state.micro_batch_size or micro_batch_size
        state.micro_batch_size = choose_micro_batch(model, optimizer, augment, loader, found, run)
        loader = loader.cut(state.micro_batch_size)
    else:
        state.micro_batch_size = None

    run.should_stop.expect_compiling(step - state.step for step in _compiling(augment, schedule, state.step))
    return Training(
        model=model,
        ema=ema,
        eval_model=ema.module if ema else model,
        optimizer=optimizer,
        augment=augment,
        loader=loader,
        placement=placement,
        schedule=schedule,
        val_split=val_split,
        test_split=test_split,
        checkpoints=checkpoints,
        state=state,
        clock=_clock(cfg, state, model, augment, loader, run),
        progress=_progress(cfg, state, schedule),
        non_finite=NonFiniteWatch(run, loader, augment, run.directory, cfg.log.every_steps),
    )


def _checkpoints(cfg: Config, run: Run, splits: dict[str, Split], info: DataInfo) -> Checkpoints:
    """Return the run's checkpoints, and let the run know its fingerprint, which each of them holds."""
    digests = {name: split.digest for name, split in splits.items()}
    statistics, changed = (*info.mean, *info.std), splits["train"].corrections_sha256
    run.fingerprint = run.together(
        lambda: fingerprint(digests, info.class_names, statistics, cfg.model.weights, changed)
    )
    about = {"model": cfg.model.name, "world_size": run.world_size, "versions": versions()}
    meta = about | {"config": recipe(cfg) | run.fingerprint}
    return Checkpoints(run.directory / "checkpoints", cfg.checkpoint.keep_last, meta)


def _idle_settings(cfg: Config, run: Run, loader: Loader, schedule: Schedule, info: DataInfo) -> list[str]:
    """Say, one line each, which options have no effect, or another one, in this run."""
    channels, _, side = info.shape
    length = Length(schedule.total_steps, schedule.steps_per_epoch, side, info.num_train, channels, info.num_val)
    lines = without_effect(cfg, length)
    if cfg.optim.class_weights != "none" and loader.class_weights is None:
        lines.append("optim.class_weights has no effect: all classes weigh the same")
    if cfg.data.where == "spread" and run.world_size == 1:
        lines.append("data.where spread has no effect: there is one process, which holds all images")
    if cfg.data.sampling != loader.sampling:
        lines.append("data.sampling balanced has no effect: all classes have as many images")
    return lines


def _network(cfg: Config, run: Run, info: DataInfo, *, fresh: bool) -> tuple[nn.Module, Augment]:
    """Build the model and what feeds it; pretrained weights are read where it is fresh: no checkpoint will fill it."""
    model, augment = build_network(cfg, info, run.device, load_weights=fresh)
    if not fresh:
        return model, augment
    idle = depthwise_without_effect(model, cfg.model.depthwise, len(augment.mean), augment.sizes.values())
    if idle:
        run.on_main(logger.warning, "model.depthwise %s", idle)
    if cfg.model.weights:
        another = cfg.model.starts_from_run  # a run's weights are read now
        digest = start_from_run(model, cfg.model, info.class_names) if another else digest_of_weights(cfg.model.weights)
        if digest != run.fingerprint[WEIGHTS]:
            raise ValueError(f"model.weights: {cfg.model.weights} was replaced while it was read; start again")
    return model, augment


def _compiling(augment: Augment, schedule: Schedule, done: int) -> list[int]:
    """Return the steps in which a compiler may be at work: the first of each image size, and its first validation."""
    first = [epoch * schedule.steps_per_epoch + 1 for epoch in augment.sizes]
    end = schedule.total_steps + 1
    validations = [next(filter(schedule.validates, range(max(step, done + 1), end)), 0) for step in first]
    return [*first, *validations]


def _clock(cfg: Config, state: TrainState, model: nn.Module, augment: Augment, loader: Loader, run: Run) -> Clock:
    """Return the clock, which knows how long a step of each image size takes all processes at their peak, if known."""
    batch, waited = cfg.batch.global_batch_size, None if loader.staging is None else loader.staging.waited
    peak, channels, epoch = peak_flops(run.device_name, run.precision), len(augment.mean), loader.steps_per_epoch
    least: dict[int, float] = {}
    if peak is not None:
        every = batch / (peak * run.world_size)
        least = {size: every * flops_per_image(model, channels, size)[1] for size in {*augment.sizes.values()}}

    def least_seconds() -> float:
        return least[augment.size((state.step - 1) // epoch)]

    def synchronize() -> None:
        if run.device.type != "cpu":
            torch.accelerator.synchronize(run.device)

    return Clock(batch, state.train_seconds, least_seconds if least else None, waited, synchronize)


def _progress(cfg: Config, state: TrainState, schedule: Schedule) -> Progress:
    """Return what people see of the run."""
    return Progress(
        lambda: state.step,
        schedule.validates,
        total_steps=schedule.total_steps,
        steps_per_epoch=schedule.steps_per_epoch,
        best=lambda: state.best_val.get(cfg.evaluation.best),
        by=cfg.evaluation.best,
    )
