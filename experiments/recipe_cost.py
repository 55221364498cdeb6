"""Measure what recipes cost in processor seconds on one thread, in interleaved rounds: a busy machine slows all alike.

python -m experiments.recipe_cost configs/cnn.yaml OTHER.yaml [--rounds 9] [--steps 8] [--out FILE]

Timed are real training steps (images, forward, backward, update, moving average) at each image size of a recipe, and
its evaluations; the lowest of all rounds is multiplied by how many of each a whole run has. Start, checkpoints and the
test images, about the same for all, are left out.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fmnist.benchmark.trainer import Trainer
from fmnist.config.parse import parse_config
from fmnist.config.schema import Config
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.data.split import Split
from fmnist.optim import Schedule, set_lr
from fmnist.runtime.compute import Compute
from fmnist.runtime.files import write_atomic
from fmnist.runtime.provenance import measured_now
from fmnist.runtime.weight_average import WeightAverage


class Recipe:
    """A recipe that can be trained for some steps at any of its sizes; times are processor seconds.

    Attributes:
        steps, evaluations: how many a whole run has, by image size in pixels.
        step_seconds, evaluation_seconds: the lowest seen of one, by image size.
    """

    def __init__(self, cfg: Config, compute: Compute) -> None:
        self.cfg = cfg
        self.trainer = Trainer(cfg, compute)
        model, augment = self.trainer.gradients.model, self.trainer.augment
        self.ema = WeightAverage(model, decay=cfg.optim.ema_decay, use_warmup=True) if cfg.optim.ema_decay else None
        train_split, self.val_split = (Split.load(name, cfg.data, compute.device) for name in ("train", "val"))
        self.loader = loader = Loader(train_split, global_batch_size=cfg.batch.global_batch_size, seed=cfg.seed)
        self.schedule = schedule = Schedule.from_config(cfg, loader.steps_per_epoch)
        self.steps: Counter[int] = Counter()
        self.evaluations: Counter[int] = Counter()
        self.first_step: dict[int, int] = {}
        for step in range(schedule.total_steps):
            size = augment.size(step // loader.steps_per_epoch)
            self.first_step.setdefault(size, step)
            self.steps[size] += 1
        evaluations = -(-schedule.total_steps // schedule.evaluation_steps)
        self.evaluations[cfg.evaluation.size or augment.final_size] = evaluations
        self.step_seconds = dict.fromkeys(self.steps, float("inf"))
        self.evaluation_seconds = dict.fromkeys(self.evaluations, float("inf"))

    def round(self, number: int, steps: int) -> None:
        """Time some steps at each size, and one evaluation, of a round from 0."""
        trainer, loader = self.trainer, self.loader
        model, augment = trainer.gradients.model, trainer.augment
        for size, first in self.first_step.items():
            numbers = [first + number * steps + i for i in range(steps)]
            augment(loader.micro_batches(numbers[0])[0])  # the epoch's tables, made once, are not part of a step
            began = time.process_time()
            for step in numbers:
                set_lr(trainer.optimizer, self.schedule, step)
                trainer.train(loader.micro_batches(step), augment)
                if self.ema is not None:
                    self.ema.update(model, step=step)
            self.step_seconds[size] = min(self.step_seconds[size], (time.process_time() - began) / steps)
        for size in self.evaluations:
            began = time.process_time()
            evaluate(model, self.val_split, augment, self.cfg, size)
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


@torch.inference_mode()
def evaluate(model: torch.nn.Module, split: Split, augment: Augment, cfg: Config, size: int) -> None:
    """Do the arithmetic of one evaluation on a split, as `fmnist.metrics.predict` does."""
    model.eval()
    for start in range(0, len(split), cfg.evaluation.batch_size):
        images = augment.evaluation(split.between(start, start + cfg.evaluation.batch_size), size)
        for view in (images, images.flip(-1)) if cfg.evaluation.tta == "flip" else (images,):
            model(view)
    model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="of each size and recipe in a round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    configs = {str(path): parse_config(["--config", str(path)], prog="cost") for path in args.configs}
    with Compute(precision="fp32") as compute:
        torch.set_num_threads(1)
        recipes = {name: Recipe(cfg, compute) for name, cfg in configs.items()}
        for number in range(args.rounds):
            for recipe in recipes.values():
                recipe.round(number, args.steps)
    first = next(iter(recipes.values())).result()["cpu_seconds"]
    result = {
        "name": "recipe_cost",
        "command": f"python -m experiments.recipe_cost {' '.join(map(str, args.configs))}",
        **measured_now(device="CPU, 1 thread"),
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "recipes": {
            name: (row := recipe.result()) | {"of_the_first": round(row["cpu_seconds"] / first, 3)}
            for name, recipe in recipes.items()
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    if args.out:
        write_atomic(args.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
