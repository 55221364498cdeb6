"""Where a start begins: what the run directory holds, compared between the processes, and put back."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from timm.utils import ModelEmaV3
from torch import nn

from fmnist.checkpoint.contents import EMA, MANIFEST, MODEL, OPTIMIZER, STATE, TrainState, read_meta, read_state
from fmnist.checkpoint.fingerprint import kept_fingerprint, short, what_changed
from fmnist.checkpoint.run_directory import has_run, is_finished, read_summary, same_recipe
from fmnist.checkpoint.store import Checkpoints
from fmnist.checkpoint.tensors import load_optimizer_tensors, load_strict, read_tensors
from fmnist.config.conflicts import sizes_by_epoch
from fmnist.config.same_run import listed, not_of
from fmnist.config.schema import Config
from fmnist.data.info import DATA_FILE
from fmnist.optim import Schedule
from fmnist.run import Run
from fmnist.runtime.console import one_line
from fmnist.runtime.environment import ENVIRONMENT
from fmnist.runtime.files import read_json, sha256_of

logger = logging.getLogger("fmnist")


def find_start(cfg: Config, run: Run, checkpoints: Checkpoints, total_steps: int) -> tuple[bool, Path | None]:
    """Find out whether the run is finished, and else which checkpoint to resume from.

    With `overwrite`, a run of these very options and data that has not come to its end is one that this command began:
    it goes on, and is not deleted a second time. So is a finished one where SLURM itself started the job again.

    Returns:
        Whether it is finished, and the checkpoint; none to start at step 0.

    Raises:
        ValueError: the run is of other data or weights, its checkpoints cannot be used, or the processes see different
            directories, data or options.
    """
    made_of = {f"as {name}": short(digest) for name, digest in run.fingerprint.items()}
    run.agree(made_of, "all processes have to read the same data and weights")
    place, shared = f"in {run.directory}", "output_dir must be shared by all processes"
    standing = run.together(lambda: _standing(cfg, run, total_steps))
    run.agree({place: f"a run that is {standing}"}, shared)
    if standing == "finished":
        return True, None
    if not cfg.dry_run:
        run.claim()
    if standing == "replaced":
        return False, None
    newest = run.together(lambda: _newest(cfg, checkpoints))
    state = "no checkpoint" if newest is None else f"step {int(newest.name.removeprefix('step_'))}"
    run.agree({place: state}, shared)
    run.agree({f"{place} as the manifest of {state}": sha256_of(newest / MANIFEST) if newest else "none"}, shared)
    if newest is None and read_summary(run.directory).get("status") == "finished":  # else it would begin anew
        raise ValueError(
            f"{run.directory} is finished and holds no checkpoint to go on from: give another --output_dir"
        )
    if newest is not None and cfg.overwrite:
        logger.info(
            "overwrite is true, but %s holds the unfinished run that this command began: it resumes; "
            "delete the directory to start again",
            run.directory,
        )
    return False, newest


def _standing(cfg: Config, run: Run, total_steps: int) -> Literal["finished", "replaced", "unfinished or new"]:
    """Say what becomes of what lies in the run directory; replaced: the run begins again over it."""
    directory = run.directory
    if not has_run(directory):
        return "replaced" if cfg.overwrite else "unfinished or new"
    about: dict[str, Any] = {}
    with suppress(ValueError):  # it is damaged or missing: the digests are compared
        about = read_json(directory / DATA_FILE)
    changed = what_changed(kept_fingerprint(directory), run.fingerprint, about, run.kept.get(DATA_FILE, {}))
    if cfg.overwrite:
        restarted = ENVIRONMENT.get("SLURM_RESTART_COUNT", "0") > "0"  # by SLURM, not by a person
        ended = read_summary(directory).get("status") == "finished" and not restarted
        if changed or ended or not same_recipe(directory, cfg):
            return "replaced"
    elif changed:
        raise ValueError(
            f"{directory} holds a run on other data or weights: {'; '.join(changed)}. "
            "Restore what it began with, or give another --output_dir"
        )
    length = None if cfg.schedule.minutes is not None else "schedule.steps" if cfg.schedule.steps else "schedule.epochs"
    finished = is_finished(directory, test=cfg.evaluation.test, total_steps=total_steps, length=length)
    return "finished" if finished else "unfinished or new"


def _newest(cfg: Config, checkpoints: Checkpoints) -> Path | None:
    try:
        return checkpoints.newest_good()
    except ValueError:
        if cfg.overwrite:  # nothing to resume from, and leave to delete it
            return None
        raise


def continuation(path: Path, cfg: Config, schedule: Schedule, state: TrainState) -> str:
    """Say what a longer schedule means for a run that had come to its end; empty where it is not longer.

    Args:
        path: the checkpoint that it resumes from, which knows how long the run was.
        cfg: the run's config now.
        schedule: of it.
        state: of the checkpoint.
    """
    meta = read_meta(path)["config"]
    length = {key: meta.get(f"schedule.{key}", getattr(cfg.schedule, key)) for key in ("epochs", "steps")}
    shorter = replace(cfg, schedule=replace(cfg.schedule, **length))
    before = Schedule.from_config(shorter, schedule.steps_per_epoch)
    if before.total_steps == schedule.total_steps:
        return ""
    step, end = state.step, before.total_steps
    old, new = before.lr(end - 1), schedule.lr(step)
    lr = f"the learning rate stays {new:.4g}"
    if old != new:
        lr = f"the learning rate jumps from {old:.4g} to {new:.4g}, its value there in a run of that length"
    done, num_train = step / schedule.steps_per_epoch, schedule.steps_per_epoch * cfg.batch.global_batch_size
    had, would_have = (
        {first: size for first, size in sizes_by_epoch(each, num_train).items() if first < done}
        for each in (shorter, cfg)
    )
    same = before.shape == "constant" and before.warmup_steps == schedule.warmup_steps and had == would_have
    differs = "" if same else "; the result differs from a single run of that length"
    if state.best_val and state.best_step == end and not schedule.validates(end):
        differs += f"; step {end:,}, which a single run of that length does not validate, may stay the best"
    return f"continuing a run of {end:,} steps from step {step:,} to {schedule.total_steps:,}: {lr}{differs}"


def restore(
    path: Path,
    cfg: Config,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    optimizer: torch.optim.Optimizer,
    fingerprint: Mapping[str, str] | None = None,
) -> TrainState:
    """Put a verified checkpoint back, and return where training stood.

    Raises:
        ValueError: it is of another config, model, data or weights; one line naming the file and what differs.
    """
    state, meta = read_state(path), read_meta(path)
    if changed := not_of(meta["config"], cfg, fingerprint):
        raise ValueError(f"{path / STATE} is of another config: {listed(changed)}")
    load_strict(model, read_tensors(path / MODEL), path / MODEL)
    moments = path / OPTIMIZER
    load_optimizer_tensors(model, optimizer, read_tensors(moments), moments)
    if ema is not None:
        load_strict(ema.module, read_tensors(path / EMA), path / EMA)
    logger.info("resuming from %s", path)
    if (made_with := meta["versions"].get("torch", torch.__version__)) != torch.__version__:
        said = one_line(str(made_with), 40)
        logger.warning("it was written with torch %s, this is %s: the last bits may differ", said, torch.__version__)
    return state
