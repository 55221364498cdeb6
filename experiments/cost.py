"""Measure what recipes cost in processor seconds on one thread, in interleaved rounds: a busy machine slows all alike.

python -m experiments.cost configs/cnn.yaml OTHER.yaml [--rounds 9] [--steps 8] [--out experiments/results/cost.json]

Timed are real training steps (images, forward, backward, update, moving average) at each image size of a recipe, and
its evaluations; the lowest of all rounds is multiplied by how many of each a whole run has. Start, checkpoints and the
test images, about the same for all, are left out.
"""

import argparse
import datetime
import json
import os
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from fmnist.config import Config
from fmnist.data.batches import Loader, Split
from fmnist.directory import git_revision, versions
from fmnist.files import write_atomic
from fmnist.hardware import processor
from fmnist.metrics import predict
from fmnist.network import build_network
from fmnist.optim import Schedule, build_optimizer, set_lr
from fmnist.options import parse_config
from fmnist.run import Run
from fmnist.step import train_step


class Recipe:
    """A recipe that can be trained for some steps at any of its sizes; times are processor seconds.

    Attributes:
        steps, evaluations: how many a whole run has, by image size in pixels.
        step_seconds, evaluation_seconds: the lowest seen of one, by image size.
    """

    def __init__(self, cfg: Config, run: Run) -> None:
        self.cfg, self.run = cfg, run
        torch.manual_seed(cfg.seed)
        self.model, self.augment = build_network(cfg, run.device, load_weights=True)
        self.model.train()
        self.optimizer = build_optimizer(self.model, cfg.optim)
        self.ema = ModelEmaV3(self.model, decay=cfg.optim.ema_decay, use_warmup=True) if cfg.optim.ema_decay else None
        split = Split.load("train", cfg.data, run.device)
        self.loader = Loader(split, global_batch_size=cfg.batch.global_batch_size, seed=cfg.seed)
        self.val_split = Split.load("val", cfg.data, run.device)
        self.schedule = Schedule.from_config(cfg, self.loader.steps_per_epoch)
        self.steps: Counter[int] = Counter()
        self.evaluations: Counter[int] = Counter()
        self.first_step: dict[int, int] = {}
        for step in range(self.schedule.total_steps):
            size = self.augment.size(step // self.loader.steps_per_epoch)
            self.first_step.setdefault(size, step)
            self.steps[size] += 1
        evaluations = -(-self.schedule.total_steps // self.schedule.evaluation_steps)
        self.evaluations[cfg.evaluation.size or self.augment.final_size] = evaluations
        self.step_seconds = dict.fromkeys(self.steps, float("inf"))
        self.evaluation_seconds = dict.fromkeys(self.evaluations, float("inf"))

    def round(self, number: int, steps: int) -> None:
        """Time some steps at each size, and one evaluation, of a round from 0."""
        for size, first in self.first_step.items():
            numbers = [first + number * steps + i for i in range(steps)]
            self.loader.micro_batches(numbers[0])  # the epoch's tables, made once an epoch, are not part of a step
            self.augment(self.loader.micro_batches(numbers[0])[0])
            began = time.process_time()
            for step in numbers:
                set_lr(self.optimizer, self.schedule, step)
                micro_batches = self.loader.micro_batches(step)
                train_step(self.model, self.optimizer, micro_batches, self.augment, self.cfg.optim, self.run, self.ema)
            self.step_seconds[size] = min(self.step_seconds[size], (time.process_time() - began) / steps)
        for size in self.evaluations:
            began = time.process_time()
            predict(self.model, self.val_split, self.augment, replace(self.cfg.evaluation, size=size), self.run)
            self.evaluation_seconds[size] = min(self.evaluation_seconds[size], time.process_time() - began)

    def result(self) -> dict[str, Any]:
        """Return the times of one and of all."""
        training = sum(count * self.step_seconds[size] for size, count in self.steps.items())
        evaluating = sum(count * self.evaluation_seconds[size] for size, count in self.evaluations.items())
        return {
            "steps": dict(self.steps),
            "step_ms": {size: round(1000 * seconds, 2) for size, seconds in self.step_seconds.items()},
            "evaluations": dict(self.evaluations),
            "evaluation_ms": {size: round(1000 * seconds, 1) for size, seconds in self.evaluation_seconds.items()},
            "training_cpu_seconds": round(training, 1),
            "cpu_seconds": round(training + evaluating, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="of each size and recipe in a round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    configs = {str(path): parse_config(["--config", str(path)], prog="cost") for path in args.configs}
    with tempfile.TemporaryDirectory() as folder:
        run = Run(next(iter(configs.values())), Path(folder))
        torch.set_num_threads(1)
        recipes = {name: Recipe(cfg, run) for name, cfg in configs.items()}
        for number in range(args.rounds):
            for recipe in recipes.values():
                recipe.round(number, args.steps)
        run.close()
    first = next(iter(recipes.values())).result()["cpu_seconds"]
    result = {
        "name": "cost",
        "command": f"python -m experiments.cost {' '.join(map(str, args.configs))}",
        "date": datetime.date.today().isoformat(),
        "hardware": {"device": "CPU, 1 thread", "processor": processor(), "cpu_cores": os.cpu_count()},
        "versions": versions(),
        "git_revision": git_revision(),
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "recipes": {
            name: (row := recipe.result()) | {"of_the_first": round(row["cpu_seconds"] / first, 3)}
            for name, recipe in recipes.items()
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    if args.out:
        write_atomic(args.out, text.encode())
    print(text, end="")


if __name__ == "__main__":
    main()
