"""Where a start begins: what the run directory holds, compared between the processes, and put back."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from fmnist.checkpoint.contents import EMA, MANIFEST, MODEL, OPTIMIZER, STATE, TrainState, read_meta, read_state
from fmnist.checkpoint.fingerprint import kept_fingerprint, short, what_changed
from fmnist.checkpoint.run_directory import has_run, is_finished, read_summary, same_recipe
from fmnist.checkpoint.store import Checkpoints
from fmnist.checkpoint.tensors import load_optimizer_tensors, load_strict, read_tensors
from fmnist.config.same_run import changes, lengthened, recipe
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
    finished, again = run.together(lambda: _status(cfg, run, total_steps))
    state = "a finished run" if finished else "nothing to go on with" if again else "an unfinished run or none"
    run.agree({place: state}, shared)
    if finished:
        return True, None
    if not cfg.dry_run:
        run.claim()
    if again:
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


def _status(cfg: Config, run: Run, total_steps: int) -> tuple[bool, bool]:
    """Say whether the run is finished, and whether it is to be begun again over what lies there."""
    directory = run.directory
    if not has_run(directory):
        return False, cfg.overwrite
    about: dict[str, Any] = {}
    with suppress(ValueError):  # a run from before it was kept
        about = read_json(directory / DATA_FILE)
    changed = what_changed(kept_fingerprint(directory), run.fingerprint, about, run.kept.get(DATA_FILE, {}))
    if cfg.overwrite:
        restarted = ENVIRONMENT.get("SLURM_RESTART_COUNT", "0") > "0"  # by SLURM, not by a person
        ended = read_summary(directory).get("status") == "finished" and not restarted
        if changed or ended or not same_recipe(directory, cfg):
            return False, True
    elif changed:
        raise ValueError(
            f"{directory} holds a run that was made of something else: {'; '.join(changed)}. "
            "Give what it began with, or another --output_dir"
        )
    length = None if cfg.schedule.minutes is not None else "schedule.steps" if cfg.schedule.steps else "schedule.epochs"
    return is_finished(directory, test=cfg.evaluation.test, total_steps=total_steps, length=length), False


def _newest(cfg: Config, checkpoints: Checkpoints) -> Path | None:
    try:
        return checkpoints.newest_good()
    except ValueError:
        if cfg.overwrite:  # nothing to resume from, and leave to delete it
            return None
        raise


def continuation(path: Path, cfg: Config, schedule: Schedule, step: int) -> str:
    """Say what a longer schedule means for a run that had come to its end; empty where it is not longer.

    Args:
        path: the checkpoint that it resumes from, which knows how long the run was.
        cfg: the run's config now.
        schedule: of it.
        step: of the checkpoint.
    """
    meta = read_meta(path)["config"]
    length = {key: meta.get(f"schedule.{key}", getattr(cfg.schedule, key)) for key in ("epochs", "steps")}
    before = Schedule.from_config(replace(cfg, schedule=replace(cfg.schedule, **length)), schedule.steps_per_epoch)
    if before.total_steps == schedule.total_steps:
        return ""
    old, new = before.lr(before.total_steps - 1), schedule.lr(step)
    lr = f"the learning rate stays {new:.4g}"
    if old != new:
        lr = (
            f"the learning rate jumps from {old:.4g} to {new:.4g}, its value there in a run of that length; the result "
            "is not that of one run of that length"
        )
    return f"a run of {before.total_steps:,} steps is continued at step {step:,} to {schedule.total_steps:,}: {lr}"


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
    # Only what both know is compared: a checkpoint from before the fingerprint goes on without one.
    own = json.loads(json.dumps(recipe(cfg))) | dict(fingerprint or {})
    if changed := changes(lengthened(meta["config"], own), own):
        raise ValueError(f"{path / STATE} is of another config: {'; '.join(changed[:3])}")
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
