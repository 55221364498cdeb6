"""train.py with a fault planted at one step: inject.py KIND[,KIND...] FLAGS...

Each kind is a run of its own, in OUTPUT_DIR/KIND, one after the other in the same processes. Each process writes
`rank_<rank>.json` there: the exit status and the step it stopped at.
"""

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

import fmnist.data.registry
import fmnist.step
import train
from fmnist.config.parse import parse_config
from fmnist.training.non_finite import NonFiniteWatch

STEP = 7  # the update that goes wrong, counted from 1
RANK, NAN = int(os.environ.get("RANK", "0")), float("nan")
LAST_RANK = int(os.environ.get("WORLD_SIZE", "1")) - 1


class Fault:
    """What the faults work on.

    Attributes:
        step: the update under way, counted from 1.
        training: what the run was built into.
        stopped_at: the step at which a value that is not finite was noticed.
        before, after: what happens around the update that goes wrong.
    """

    step = 0
    training: Any = None
    stopped_at: int | None = None
    before: Callable[[], None]
    after: Callable[[], None]

    def now(self) -> bool:
        return self.step == STEP


fault = Fault()


def bad_loss(value: float) -> None:
    fmnist.step.F = SimpleNamespace(
        cross_entropy=lambda *args, **kwargs: F.cross_entropy(*args, **kwargs) * (value if fault.now() else 1.0)
    )


def before_step(action: Callable[[], None]) -> None:
    fault.before = action


def after_step(action: Callable[[], None]) -> None:
    fault.after = action


def head() -> torch.Tensor:
    return fault.training.model.head.weight


def set_first(tensor: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[0] = value


def logits() -> None:
    fault.training.model.register_forward_hook(lambda *args: args[-1] * float("inf") if fault.now() else args[-1])


def gradient() -> None:
    head().register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), NAN) if fault.now() else grad)


def moment() -> None:
    after_step(lambda: set_first(fault.training.optimizer.state[head()]["exp_avg"], NAN))


def ema() -> None:
    after_step(lambda: set_first(fault.training.ema.module.head.bias, float("inf")))


def statistic() -> None:
    def break_one() -> None:  # looked up late: the wrapper gives the model other buffers
        buffers = fault.training.model.named_buffers()
        set_first(next(buffer for name, buffer in buffers if name.endswith("running_var")), float("inf"))

    after_step(break_one)


def normalization() -> None:
    def divide_by_zero() -> None:
        fault.training.augment.std = (0.0,)

    before_step(divide_by_zero)


def pixel() -> None:
    augment = fault.training.augment
    real = augment._make

    def one_bad_pixel(*args: Any) -> torch.Tensor:
        images = real(*args)
        if fault.now():
            images[0, 0, 14, 14] = NAN
        return images

    augment._make = one_bad_pixel


def learning_rate() -> None:
    real = train.set_lr

    def set_lr(optimizer: torch.optim.Optimizer, schedule: Any, step: int) -> float:
        lr = real(optimizer, schedule, step)
        if step + 1 == STEP:
            for group in optimizer.param_groups:
                group["lr"] = NAN
        return lr

    train.set_lr = set_lr


def only_on(rank: int, plant: Callable[[], None]) -> Callable[[], None]:
    return lambda: plant() if rank == RANK else None


def die(how: Callable[[], None], rank: int = LAST_RANK) -> Callable[[], None]:
    return only_on(rank, lambda: before_step(how))


def fail() -> None:
    raise KeyError("planted")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(1000)


def compiles(seconds: float) -> Callable[[], None]:
    def plant() -> None:
        time.sleep(seconds)  # before the first step
        before_step(lambda: time.sleep(seconds))

    return only_on(LAST_RANK, plant)


def in_exchange(how: Callable[[], None]) -> Callable[[], None]:
    """While the images of the next step are brought, on the thread that does it."""

    def plant() -> None:
        exchange = fault.training.loader.exchange
        real = exchange.fetch

        def fetch(*args: Any) -> torch.Tensor:
            if fault.now():
                how()
            return real(*args)

        exchange.fetch = fetch

    return only_on(LAST_RANK, plant)


def slow_exchange() -> None:
    exchange = fault.training.loader.exchange
    real = exchange.fetch
    exchange.fetch = lambda *args: time.sleep(0.2) or real(*args)


KINDS: dict[str, Callable[[], None]] = {
    "loss_nan": lambda: bad_loss(NAN),
    "loss_inf": lambda: bad_loss(float("inf")),
    "logits": logits,
    "one_gradient": gradient,
    "loss_of_one_rank": only_on(LAST_RANK, lambda: bad_loss(NAN)),
    "weight": lambda: before_step(lambda: set_first(head(), NAN)),
    "weight_after_the_log": lambda: after_step(lambda: set_first(head(), NAN)),
    "ema": ema,
    "moment": moment,
    "statistic": statistic,
    "learning_rate": learning_rate,
    "normalization": normalization,
    "pixel": pixel,
    "killed": die(be_killed),
    "rank_0_killed": die(be_killed, rank=0),
    "exception": die(fail),
    "hang": die(hang),
    "rank_0_hangs": die(hang, rank=0),
    "compiles": compiles(8),
    "compiles_for_a_minute": compiles(60),
    "killed_in_exchange": in_exchange(be_killed),
    "fails_in_exchange": in_exchange(fail),
    "hangs_in_exchange": in_exchange(hang),
    "slow_exchange": only_on(LAST_RANK, slow_exchange),
    "frozen": die(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
}


def run_one(kind: str, cfg: Any) -> None:
    directory = Path(cfg.output_dir) / kind
    fmnist.step.F, fault.training, fault.stopped_at, fault.step = F, None, None, 0
    fault.before = fault.after = lambda: None
    real = train.build, train.train_step, train.set_lr, NonFiniteWatch.stop

    def build(*args: Any) -> Any:
        fault.training = real[0](*args)
        if kind in KINDS:
            KINDS[kind]()
        return fault.training

    def train_step(model: Any, optimizer: Any, micro_batches: Any, *args: Any) -> Any:
        fault.step = micro_batches[0].step + 1
        if fault.now():
            fault.before()
        metrics = real[1](model, optimizer, micro_batches, *args)
        if fault.now():
            fault.after()
        return metrics

    def stop(self: NonFiniteWatch, message: str, step: int) -> None:
        fault.stopped_at = step
        real[3](self, message, step)

    train.build, train.train_step, NonFiniteWatch.stop = build, train_step, stop
    status = 0
    try:
        train.main(replace(cfg, output_dir=str(directory)))
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        train.build, train.train_step, train.set_lr, NonFiniteWatch.stop = real
    report = {"status": status, "step": fault.stopped_at}
    (directory / f"rank_{RANK}.json").write_text(json.dumps(report))


def main(kinds: list[str], flags: list[str]) -> None:
    fmnist.data.registry.load_indexed = functools.cache(fmnist.data.registry.load_indexed)
    cfg = parse_config(flags)
    for kind in kinds:
        run_one(kind, cfg)


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2:])
