"""schedule.minutes: a probe on a network of its own says how many steps fit, and from then on they are fixed."""

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from fmnist.checkpoint.contents import EMA, MODEL, OPTIMIZER, TrainState
from fmnist.checkpoint.store import Checkpoints
from fmnist.checkpoint.tensors import optimizer_tensors
from fmnist.config.conflicts import sizes_by_epoch
from fmnist.config.schema import MOST_STEPS, Config
from fmnist.data.batches import Loader
from fmnist.data.info import DataInfo
from fmnist.data.split import Split
from fmnist.metrics import validate
from fmnist.network import build_network
from fmnist.optim import build_optimizer
from fmnist.run import Run
from fmnist.runtime.files import temporary_folder
from fmnist.runtime.weight_average import WeightAverage
from fmnist.training.micro_batch import choose_micro_batch

logger = logging.getLogger("fmnist")
WARM_UP, PROBED, FEWEST = 5, 50, 5  # steps of each image size
PROBE_SHARE = 0.05  # of the minutes, which the probe of a slow model may take: it then makes fewer steps
REPORT_S = 6.0  # kept for what is not measured: train_batch.png, the libraries that draw, and the last figures


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of the parts of a run, of its slowest process.

    Attributes:
        steps: of one optimizer step, by image size as `sizes` orders them.
        epoch: what the first step of an epoch takes beyond that: order and augmentation of all images are drawn.
        evaluation: of the validation images, with the line that is logged.
        save: of a checkpoint.
        end: of all that follows the last step but the figures.
    """

    steps: tuple[float, ...]
    epoch: float
    evaluation: float
    save: float
    end: float


def with_steps(cfg: Config, steps: int) -> Config:
    """Return the config with its length in steps."""
    return replace(cfg, schedule=replace(cfg.schedule, steps=steps))


def fixed_steps(
    cfg: Config, run: Run, loader: Loader, info: DataInfo, splits: dict[str, Split], train_step: Callable[..., Any]
) -> tuple[int, int | None]:
    """Return the number of steps that `schedule.minutes` allows, and the micro-batch that the probe found.

    Both are the same on all processes; the micro-batch is None where `batch.micro_batch_size` is not auto.

    The minutes begin with the program and end with its last file. Nothing of the run is touched: weights, optimizer and
    random state are those of a run whose steps were given by hand.

    Args:
        cfg: of the run.
        run: this process's view of it; nothing is written to its directory.
        loader: of the training images.
        info: the data set.
        splits: by name; val and test count towards evaluations.
        train_step: `fmnist.step.train_step`.

    Raises:
        ValueError: not one step fits.
    """
    mine, micro_batch_size = measure(cfg, run, loader, info, splits, train_step)
    of_all = run.gather(mine)
    others = {name: max(getattr(each, name) for each in of_all) for name in ("epoch", "evaluation", "save", "end")}
    costs = Costs(steps=tuple(map(max, zip(*(each.steps for each in of_all), strict=True))), **others)
    used = max(run.gather(run.clock() - run.began))
    minutes = cfg.schedule.minutes or 0.0
    left = 60 * minutes - used - costs.end - REPORT_S
    total = largest_within(left, lambda count: seconds(cfg, count, costs, loader), cheaper_from(cfg, loader))
    if not total:
        least = (60 * minutes - left + seconds(cfg, 1, costs, loader)) / 60
        raise ValueError(
            f"schedule.minutes is {minutes}, too short for one step; valid here: {no_less(least)} and more"
        )
    by_size = ", ".join(
        f"{1000 * each:.3g} ms per step at {size} px" for each, size in zip(costs.steps, sizes(cfg), strict=True)
    )
    logger.info(
        f"schedule.minutes {minutes:g}: {total:,} steps, {total / loader.steps_per_epoch:.4g} epochs; {by_size}, "
        f"{costs.evaluation:.3g} s per evaluation, {costs.save:.2g} s per checkpoint; {used:.0f} s used, "
        f"{costs.end + REPORT_S:.0f} s reserved for the end"
    )
    return total, micro_batch_size


def no_less(number: float) -> str:
    """Return a number above 0 in two digits, rounded up."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return f"{math.ceil(number / unit) * unit:g}"


def sizes(cfg: Config) -> list[int]:
    """Return the image sizes of a long run, each once, in ascending order."""
    return sorted({*sizes_by_epoch(with_steps(cfg, 10**9)).values()})


def measure(
    cfg: Config, run: Run, loader: Loader, info: DataInfo, splits: dict[str, Split], train_step: Callable[..., Any]
) -> tuple[Costs, int | None]:
    """Time steps, an evaluation and a save of a network of the same kind, on all processes together."""
    random_state = torch.get_rng_state()
    long = with_steps(cfg, 10**9)
    network, augment = build_network(long, info, run.device, load_weights=True)  # wrong ones are refused now
    optimizer = build_optimizer(network, cfg.optim)
    ema = WeightAverage(network, decay=cfg.optim.ema_decay, use_warmup=True) if cfg.optim.ema_decay else None
    found = None
    if cfg.batch.micro_batch_size == "auto":
        found = choose_micro_batch(network, optimizer, augment, loader, None, run)
        loader = loader.cut(found)
    model, gradients = run.prepare(network, compiled=cfg.model.compile)
    update = run.captured(train_step, cfg.model.cuda_graph)
    model.train()

    def timed(first: int, count: int) -> float:
        """Seconds of one of so many steps, all done on the device."""
        start = run.clock()
        for step in range(first, first + count):
            micro_batches = loader.micro_batches(step)
            metrics = update(model, optimizer, micro_batches, augment, gradients, cfg.optim, ema)
        run.mean(metrics)
        return (run.clock() - start) / count

    first_epochs = {size: epoch for epoch, size in sorted(augment.sizes.items(), reverse=True)}
    each, per_epoch = {}, loader.steps_per_epoch
    for size, first in sorted(first_epochs.items()):
        at = first * per_epoch
        timed(at, min(WARM_UP, per_epoch))
        about = max(run.gather(timed(at, 1)))
        count = int(PROBE_SHARE * 60 * (cfg.schedule.minutes or 0) / len(first_epochs) / max(about, 1e-9))
        each[size] = timed(at, min(max(count, FEWEST), PROBED, per_epoch))
    new_epoch = max(0.0, timed((max(augment.sizes) + 1) * per_epoch, 1) - each[augment.final_size])

    val, test = splits["val"], splits["test"]
    if cfg.model.compile and ema is None:  # an average is not compiled
        validate(network, val, augment, cfg.evaluation, run)
    start = run.clock()
    validate(ema.module if ema else network, val, augment, cfg.evaluation, run)
    evaluation = run.clock() - start
    # a forward is about a third of a step
    of_image = evaluation / len(val) if len(val) else each[augment.final_size] / loader.global_batch_size / 3
    files = {MODEL: network.state_dict(), OPTIMIZER: optimizer_tensors(network, optimizer)}
    files |= {EMA: ema.module.state_dict()} if ema else {}
    start = run.clock()
    if not cfg.dry_run:
        run.on_main(_save, run, files)
    save = run.clock() - start
    torch.set_rng_state(random_state)
    run.release()
    end = of_image * (len(val) + len(test) * cfg.evaluation.test)
    return Costs(steps=tuple(each.values()), epoch=new_epoch, evaluation=evaluation, save=save, end=end), found


def _save(run: Run, files: dict[str, Any]) -> None:
    with temporary_folder(run.directory) as folder:  # beside the run: on the same disk
        Checkpoints(folder, 1, {}).save(TrainState(step=1, best_step=1), files)


def seconds(cfg: Config, steps: int, costs: Costs, loader: Loader) -> float:
    """Return how long a run of so many steps takes, from its first to its last, with evaluations and saves.

    At most: an evaluation counts as a save, which it is where no full one is due only if it is the best so far.
    """
    per_epoch = loader.steps_per_epoch
    of_size = dict(zip(sizes(cfg), costs.steps, strict=True))
    by_epoch = sizes_by_epoch(with_steps(cfg, steps), len(loader.split))
    starts = [min(steps, epoch * per_epoch) for epoch in by_epoch] + [steps]
    total = sum(
        of_size[size] * (end - start) for size, (start, end) in zip(by_epoch.values(), pairwise(starts), strict=True)
    )
    every = cfg.evaluation.every_steps or max(1, round(cfg.evaluation.every_epochs * per_epoch))
    evaluations = math.ceil(steps / every)  # one at the end, too
    saves, between = evaluations, cfg.checkpoint.every_steps
    if between:
        saves += steps // between - steps // math.lcm(between, every)
        saves -= steps % between == 0 and steps % every != 0  # at the end, which counts already
    return total + math.ceil(steps / per_epoch) * costs.epoch + evaluations * costs.evaluation + saves * costs.save


def cheaper_from(cfg: Config, loader: Loader) -> list[int]:
    """Return the numbers of steps from which a run may take less time: its first epochs are of smaller images then."""
    last = max(cfg.augment.sizes)  # the epoch whose size is the last
    return [math.ceil((epoch + 0.5) * loader.steps_per_epoch) for epoch in range(1, last + 2)] if last else []


def largest_within(limit: float, takes: Callable[[int], float], falls_at: Sequence[int] = ()) -> int:
    """Return the largest number of steps that takes no longer than the limit, seconds; 0 where not one fits.

    Args:
        limit: seconds.
        takes: the seconds of so many steps, which rise between two of `falls_at`.
        falls_at: numbers of steps, ascending, that may take less than one step fewer.
    """
    best = 0
    for low, high in pairwise((1, *falls_at, MOST_STEPS + 1)):
        if fitting := bisect_right(range(low, high), limit, key=takes):
            best = low + fitting - 1
    return best
