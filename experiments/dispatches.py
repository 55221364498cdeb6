"""Count the operations that one step dispatches on the host, by part: python -m experiments.dispatches LABEL

LABEL, before or after, is the part of experiments/results/dispatches.json that is written; for `before` run this file
in a checkout of the commit before. The counts depend on the model and the library's versions, not on the machine, and
not on sizes: so they are of two images on a CPU.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode

from fmnist.benchmark.trainer import Trainer
from fmnist.config.schema import AugmentConfig, Config, ModelConfig, OptimConfig
from fmnist.data.batches import Loader
from fmnist.data.split import Split
from fmnist.runtime.compute import Compute
from fmnist.runtime.files import write_json
from fmnist.runtime.provenance import measured_now

try:
    from fmnist.runtime.weight_average import WeightAverage
except ImportError:  # before
    WeightAverage = ModelEmaV3  # type: ignore[misc,assignment]

FORWARD = "forward and backward"
RESULT = Path(__file__).parent / "results/dispatches.json"
MODELS = {
    "mlp": (28, ModelConfig(name="mlp", precision="fp32"), None),
    "cnn": (28, ModelConfig(name="cnn", precision="fp32"), None),
    "mlp, muon": (28, ModelConfig(name="mlp", precision="fp32"), None),
    "cnn, muon": (28, ModelConfig(name="cnn", precision="fp32"), None),
    "convnext_tiny": (32, ModelConfig(name="convnext_tiny", precision="fp32", depthwise="conv"), 0.75),
}


class Count(TorchDispatchMode):
    """Count what is dispatched, under the name of the part at work."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.counts = FORWARD, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[self.part] += func.namespace == "aten"  # no mark of the profiler
        return func(*args, **(kwargs or {}))

    def within(self, part: str, action: Callable[..., Any], then: str) -> Callable[..., Any]:
        """Return the action, counted as this part; what follows it is counted as `then`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.part = part
            result = action(*args, **kwargs)
            self.part = then
            return result

        return call


def count_step(name: str) -> dict[str, int]:
    """Return the operations of a model's third step, by part."""
    size, model_config, layer_decay = MODELS[name]
    optim = OptimConfig(name="muon" if name.endswith("muon") else "adamw", layer_decay=layer_decay)
    cfg = Config(augment=AugmentConfig(size=size, rotation=10), model=model_config, optim=optim)
    trainer = Trainer(cfg, Compute(precision="fp32"))
    optimizer, gradients = trainer.optimizer, trainer.gradients
    average = WeightAverage(gradients.model, decay=0.99, use_warmup=True)
    for group in optimizer.param_groups:  # as the schedule sets it
        group["lr"] = 0.001 * group["lr_scale"]
    split = Split(images=torch.zeros(20, 28, 28, dtype=torch.uint8), labels=torch.arange(20) % 10)
    loader = Loader(split, global_batch_size=2, seed=0)
    step, total = optimizer.step, gradients.total
    for number in range(3):
        count, micro_batches = Count(), loader.micro_batches(number)
        augment: Any = count.within("data path", trainer.augment, FORWARD)
        gradients.total = count.within(FORWARD, total, "gradient norm")  # type: ignore[method-assign]
        optimizer.step = count.within("optimizer", step, FORWARD)  # type: ignore[method-assign]
        with count:
            trainer.train(micro_batches, augment)
            count.within("moving average", average.update, FORWARD)(gradients.model, step=number)
    return dict(count.counts) | {"all": count.counts.total(), "parameter groups": len(optimizer.param_groups)}


def main() -> None:
    """Count, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("label", choices=("before", "after"))
    label = parser.parse_args().label
    found = {name: count_step(name) for name in MODELS}
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept[label] = {"command": f"python -m experiments.dispatches {label}", **measured_now(), "operations": found}
    write_json(RESULT, kept)
    for name, parts in found.items():
        print(name, ", ".join(f"{part} {number}" for part, number in parts.items()))


if __name__ == "__main__":
    main()
