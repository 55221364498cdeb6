"""What the training loop works with: built from a config, put back from a checkpoint, saved, and concluded."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fmnist.checkpoint.contents import EMA, MODEL, OPTIMIZER, STATE, TrainState, read_meta, read_state
from fmnist.checkpoint.store import Checkpoints
from fmnist.clock import Clock
from fmnist.config import Config
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader, Split
from fmnist.data.fashion_mnist import CLASS_NAMES
from fmnist.directory import git_revision, versions
from fmnist.metrics import predict
from fmnist.network import build_network
from fmnist.non_finite import Watch, write_batch
from fmnist.optim import Schedule, build_optimizer
from fmnist.recipe import changes, recipe
from fmnist.run import Run
from fmnist.tensors import load_optimizer_tensors, load_strict, non_finite, optimizer_tensors, read_tensors

logger = logging.getLogger("fmnist")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the loop works with; `evaluated` is the weights' moving average where there is one, else the model."""

    model: nn.Module
    ema: ModelEmaV3 | None
    evaluated: nn.Module
    optimizer: torch.optim.Optimizer
    augment: Augment
    loader: Loader
    schedule: Schedule
    val_split: Split
    checkpoints: Checkpoints
    state: TrainState
    clock: Clock
    watch: Watch


def build(cfg: Config, run: Run) -> Training:
    """Build everything the loop needs and put back the newest good checkpoint, if there is one.

    Raises:
        ValueError: data, weights, options or checkpoints that cannot be used; one line each.
    """
    if cfg.exact and cfg.exact % run.world_size:
        raise ValueError(f"exact is {cfg.exact}; legal with {run.world_size} processes: a multiple of that")
    micro_batch_size = cfg.batch.global_batch_size // cfg.exact if cfg.exact else cfg.batch.micro_batch_size
    Split.load("test", cfg.data, run.device)  # not looked at, but a damaged file is said now, not after the training
    loader = Loader(
        Split.load("train", cfg.data, run.device),
        global_batch_size=cfg.batch.global_batch_size,
        micro_batch_size=micro_batch_size,
        seed=cfg.seed,
        rank=run.rank,
        world_size=run.world_size,
    )
    schedule = Schedule.from_config(cfg, loader.steps_per_epoch)
    checkpoints = Checkpoints(
        run.directory / "checkpoints",
        cfg.checkpoint.keep_last,
        {"model": cfg.model.name, "world_size": run.world_size, "versions": versions(), "config": recipe(cfg)},
    )
    newest = None if cfg.overwrite else checkpoints.newest_good()
    model, augment = build_network(cfg, run.device, load_weights=newest is None)
    optimizer = build_optimizer(model, cfg.optim)
    ema = ModelEmaV3(model, decay=cfg.optim.ema_decay, use_warmup=True) if cfg.optim.ema_decay else None
    state = TrainState() if newest is None else restore(newest, cfg, model, ema, optimizer)
    return Training(
        model=model,
        ema=ema,
        evaluated=ema.module if ema else model,
        optimizer=optimizer,
        augment=augment,
        loader=loader,
        schedule=schedule,
        val_split=Split.load("val", cfg.data, run.device),
        checkpoints=checkpoints,
        state=state,
        clock=Clock(cfg.batch.global_batch_size, state.train_seconds),
        watch=Watch(cfg.log.every_steps, run.device),
    )


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
    logger.info("continuing from %s", path)
    if (made_with := meta.get("versions", {}).get("torch", torch.__version__)) != torch.__version__:
        logger.warning(
            "it was written with torch %s, this is %s: the last bits may differ", made_with, torch.__version__
        )
    return state


def save(training: Training, run: Run) -> None:
    """Write a checkpoint, unless a value in it is not finite.

    Raises:
        FloatingPointError: on every process, naming the tensors; nothing is written.
        OSError: on the main process, which cannot write; the others end with it.
    """
    t = training
    groups: dict[str, Mapping[str, Tensor]] = {
        MODEL: t.model.state_dict(),
        OPTIMIZER: optimizer_tensors(t.model, t.optimizer),
    }
    if t.ema is not None:
        groups[EMA] = t.ema.module.state_dict()
    bad = [f"{file}: {name}" for file, tensors in groups.items() for name in non_finite(tensors)]
    if run.mean({"bad": torch.tensor(len(bad), device=run.device)})["bad"]:
        stop_not_finite(f"{'; '.join(next(filter(None, run.gather(bad)))[:3])} not finite, not saved,", t, run)
    t.state.train_seconds = t.clock.total_seconds
    run.on_main(t.checkpoints.save, t.state, groups)


def raise_if_not_finite(scalars: Mapping[str, float], training: Training, run: Run) -> None:
    """Raise FloatingPointError if a mean over processes, the same on each of them, is a NaN or an infinity."""
    if bad := [f"{name} is {value}" for name, value in scalars.items() if not math.isfinite(value)]:
        stop_not_finite(", ".join(bad), training, run)


def stop_not_finite(what: str, training: Training, run: Run) -> NoReturn:
    """Draw the batch of the first step that was not finite, and end all processes with one line."""
    t, noticed = training, training.state.step
    firsts = run.gather(t.watch.first(noticed))
    first = min((found[0] for found in firsts if found), default=noticed)
    ranks = [rank for rank, found in enumerate(firsts) if found == (first, True)]
    where = f" (the loss of rank {', '.join(map(str, ranks))})" if 0 < len(ranks) < len(firsts) else ""
    began = "" if first == noticed else f", begun at step {first}"
    picture = run.directory / f"non_finite_step_{first:08d}.png"
    run.on_main(write_batch, picture, t.loader, t.augment, first, CLASS_NAMES)
    raise FloatingPointError(
        f"{what} at step {noticed}{began}{where}; the batch is drawn in {picture}; the last checkpoint is from before"
    )


def conclude(training: Training, cfg: Config, run: Run, *, finished: bool) -> None:
    """Write the weights to use and the summary; after the last step also evaluate the test images, once, if wanted."""
    t, state = training, training.state
    summary: dict[str, Any] = {
        "model": cfg.model.name,
        "parameters": sum(p.numel() for p in t.model.parameters()),
        "epochs": round(t.schedule.epoch(state.step), 4),
        "steps": state.step,
        "world_size": run.world_size,
        "seed": cfg.seed,
        "val.top1": state.best_top1 if state.best_top1 >= 0 else None,
        "images_per_second": round(t.clock.median_rate(), 1),
        "train_seconds": round(state.train_seconds, 1),
        "device": run.device_name,
        "versions": versions(),
        "git_revision": git_revision(),
        "status": "finished" if finished else "stopped",
    }
    if state.best_step:
        run.on_main(t.checkpoints.export, state.best_step, run.directory / "model.safetensors")
    if finished and cfg.evaluation.test:
        summary |= evaluate_test(t, cfg, run)
    run.finish(summary)


def evaluate_test(training: Training, cfg: Config, run: Run) -> dict[str, float]:
    """Evaluate the weights to use on the test images; write `evaluation/test/` and the learning curves."""
    from fmnist.figures import plot_learning_curves  # three seconds of libraries, needed only here
    from fmnist.report import write_evaluation

    t, weights = training, run.directory / "model.safetensors"
    run.on_main(lambda: load_strict(t.model, read_tensors(weights), weights))
    run.broadcast(t.model.state_dict().values())
    split = Split.load("test", cfg.data, run.device)
    logits = predict(t.model, split, t.augment, cfg.evaluation, run).cpu()
    result = run.on_main(
        write_evaluation,
        run.directory / "evaluation" / "test",
        logits,
        split.labels.cpu(),
        torch.arange(len(split)),
        CLASS_NAMES,
        title=f"{run.directory.name}: test images",
    )
    if result is None:
        return {}
    scores = {key: result[key] for key in ("top1", "loss", "num_images")}
    run.log("test", scores, t.state.step, t.schedule.epoch(t.state.step))
    plot_learning_curves(run.directory / "metrics.jsonl", run.directory / "learning_curves.png", run.directory.name)
    logger.info((run.directory / "evaluation" / "test" / "report.txt").read_text())
    logger.info("test top1 %.2f %%; everything is in %s", 100 * result["top1"], run.directory)
    return {f"test.{key}": value for key, value in scores.items()}
