"""Count the operations that one step dispatches on the host, by part: python -m experiments.dispatches LABEL

LABEL, before or after, is the part of experiments/results/dispatches.json that is written; for `before` run this file
in a checkout of the commit before. The counts depend on the model and the library's versions, not on the machine, and
not on sizes: so they are of two images on a CPU.
"""

import argparse
import inspect
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode

from fmnist.benchmark import trainer
from fmnist.config.schema import AugmentConfig, Config, ModelConfig, OptimConfig
from fmnist.data.batches import Loader
from fmnist.data.split import Split
from fmnist.runtime.compute import Compute
from fmnist.runtime.files import write_atomic
from fmnist.runtime.provenance import git_revision, versions

try:
    from fmnist.runtime.weight_average import WeightAverage
except ImportError:  # before
    WeightAverage = ModelEmaV3  # type: ignore[misc,assignment]

RESULT = Path(__file__).parent / "results/dispatches.json"
MODELS = {
    "mlp": (28, ModelConfig(name="mlp", precision="fp32"), None),
    "cnn": (28, ModelConfig(name="cnn", precision="fp32"), None),
    "convnext_tiny": (32, ModelConfig(name="convnext_tiny", precision="fp32", depthwise="conv"), 0.75),
}


class Count(TorchDispatchMode):
    """Count what is dispatched, under the name of the part at work."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.counts = "forward and backward", Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[self.part] += func.namespace == "aten"  # no mark of the profiler
        return func(*args, **(kwargs or {}))

    def within(self, part: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """Return the action, counted as this part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            outer, self.part = self.part, part
            try:
                return action(*args, **kwargs)
            finally:
                self.part = outer

        return call


def count_step(name: str) -> dict[str, int]:
    """Return the operations of a model's third step, by part."""
    size, model_config, layer_decay = MODELS[name]
    optim = OptimConfig(layer_decay=layer_decay, ema_decay=0.99)
    cfg = Config(augment=AugmentConfig(size=size, rotation=10), model=model_config, optim=optim)
    built = trainer.Trainer(cfg, Compute(precision="fp32"))
    split = Split(images=torch.zeros(20, 28, 28, dtype=torch.uint8), labels=torch.arange(20) % 10)
    optimizer, average = built.optimizer, WeightAverage(built.gradients.model, decay=0.99, use_warmup=True)
    loader, step = Loader(split, global_batch_size=2, seed=0), inspect.getmodule(trainer.train_step)
    for group in optimizer.param_groups:
        group["lr"] = 0.001 * group["lr_scale"]
    for number in range(3):
        count = Count()
        micro_batches = loader.micro_batches(number)
        images = count.within("data path", built.augment)
        real_step, real_update = optimizer.step, average.update
        optimizer.step = count.within("optimizer", real_step)  # type: ignore[method-assign]
        average.update = count.within("moving average", real_update)  # type: ignore[method-assign]
        names = {"clip", "clip_grad_norm_"} & vars(step).keys()
        real = {each: getattr(step, each) for each in names}
        for each, action in real.items():
            setattr(step, each, count.within("gradient norm", action))
        with count:
            trainer.train_step(built.model, optimizer, micro_batches, images, built.gradients, optim, average)  # type: ignore[arg-type]
        optimizer.step, average.update = real_step, real_update  # type: ignore[method-assign]
        for each, action in real.items():
            setattr(step, each, action)
    return dict(count.counts) | {"all": count.counts.total(), "parameter groups": len(optimizer.param_groups)}


def main() -> None:
    """Count, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("label", choices=("before", "after"))
    label = parser.parse_args().label
    found = {name: count_step(name) for name in MODELS}
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept[label] = {"git_revision": git_revision(), "versions": versions(), "operations": found}
    write_atomic(RESULT, json.dumps(kept, indent=2) + "\n")
    for name, parts in found.items():
        print(name, ", ".join(f"{part} {number}" for part, number in parts.items()))


if __name__ == "__main__":
    main()
