"""Golden losses: twenty steps of three models give the numbers that are kept in `golden/`, on one thread.

Row R15 of the table in README.md. `python tests/test_golden.py` makes the files again, where other results are meant;
say in the commit why.
"""

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3

from fmnist.config.schema import AugmentConfig, BatchConfig, Config, ModelConfig, OptimConfig, ScheduleConfig
from fmnist.data.batches import Loader
from fmnist.data.fashion_mnist import INFO, load_split
from fmnist.data.split import Split
from fmnist.metrics import predict, score
from fmnist.network import build_network
from fmnist.optim import Schedule, build_optimizer, set_lr
from fmnist.runtime.compute import Compute
from fmnist.runtime.gradients import AllReduce
from fmnist.runtime.provenance import versions
from fmnist.step import train_step

FOLDER = Path(__file__).parent / "golden"
STEPS = 20
AUGMENT = {"flip": 0.5, "rotation": 10, "shift": 0.1, "scale": 0.1, "erase": 0.25, "mixup_alpha": 0.2}
MODELS: dict[str, tuple[AugmentConfig, ModelConfig]] = {
    "mlp": (AugmentConfig(size=28, **AUGMENT), ModelConfig(name="mlp", drop_rate=0.1, precision="fp32")),
    "cnn": (AugmentConfig(size=28, **AUGMENT), ModelConfig(name="cnn", drop_rate=0.1, precision="fp32")),
    "convnext": (
        AugmentConfig(size=32, **AUGMENT),
        ModelConfig(
            name="convnext_atto",
            drop_path_rate=0.1,
            precision="fp32",
            depthwise="conv",  # tests/test_depthwise.py compares the matrix products with these numbers
            options={
                "depths": [1, 1, 2, 1],
                "dims": [24, 48, 96, 192],
                "patch_size": 2,
                "conv_mlp": False,
                "ls_init_value": 0.1,
            },
        ),
    ),
}


def golden_config(name: str) -> Config:
    augment, model = MODELS[name]
    # SGD for the CNN: BatchNorm makes many gradients mere rounding, and AdamW's first steps look at their sign alone.
    optim = {"name": "sgd", "lr": 0.01} if name == "cnn" else {"name": "adamw", "lr": 0.0005}
    return Config(
        batch=BatchConfig(global_batch_size=64, micro_batch_size=32),
        augment=augment,
        model=model,
        optim=OptimConfig(**optim, weight_decay=0.05, label_smoothing=0.1, grad_clip_norm=1.0, ema_decay=0.9),
        schedule=ScheduleConfig(steps=STEPS, warmup_steps=2),
    )


def train_and_record(name: str) -> dict[str, Any]:
    """Train on the first 1,000 images: every loss and gradient norm, and the moving average's loss on 200 others."""
    cfg = golden_config(name)
    compute = Compute(precision=cfg.model.precision, seed=cfg.seed)
    images, labels = (tensor.to(compute.device) for tensor in load_split("train", None, 5000))
    split = Split(images=images[:1000], labels=labels[:1000])
    held_out = Split(images=images[1000:1200], labels=labels[1000:1200])
    model, augment = build_network(cfg, INFO, compute.device, load_weights=True)
    gradients = AllReduce(model, compute.accelerator)
    optimizer, average = build_optimizer(model, cfg.optim), ModelEmaV3(model, decay=0.9, use_warmup=True)
    loader = Loader(split, global_batch_size=64, micro_batch_size=32, seed=cfg.seed)
    schedule = Schedule.from_config(cfg, loader.steps_per_epoch)
    found: dict[str, Any] = {"loss": [], "grad_norm": []}
    model.train()
    for step in range(STEPS):
        set_lr(optimizer, schedule, step)
        metrics = train_step(model, optimizer, loader.micro_batches(step), augment, gradients, cfg.optim, average)
        for key in found:
            found[key].append(float(metrics[key]))
    logits = predict(average.module, held_out, augment, cfg.evaluation, compute)
    return found | {"val_loss": float(score(logits, held_out.labels)["loss"])}


def machine() -> dict[str, str]:
    """What the bits depend on beside the source: versions, the instruction set, and the processor's make."""
    fields = ("vendor_id", "cpu family", "model")
    info = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in info.read_text().splitlines()) if info.exists() else ()
    first = {key.strip(): value.strip() for key, _, value in reversed(list(lines))}
    return versions() | {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": ", ".join(f"{field} {first.get(field, '?')}" for field in fields) + f", {platform.machine()}",
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_losses_are_the_golden_ones(name: str, one_thread: None) -> None:
    kept = json.loads((FOLDER / f"{name}.json").read_text())
    found = train_and_record(name)
    assert len(found["loss"]) == len(kept["found"]["loss"]) == STEPS
    assert found["loss"][-1] < found["loss"][0]
    here = machine() | {"device": Compute().device.type}
    if here == kept["made_on"]:
        assert found == kept["found"]
        return
    different = {key: (kept["made_on"][key], value) for key, value in here.items() if value != kept["made_on"][key]}
    for key in ("loss", "val_loss"):
        assert found[key] == pytest.approx(kept["found"][key], rel=0, abs=1e-5), different


def remake() -> None:
    """Write the golden files."""
    torch.set_num_threads(1)
    for name in MODELS:
        found = train_and_record(name)
        made_on = machine() | {"device": Compute().device.type}
        (FOLDER / f"{name}.json").write_text(json.dumps({"made_on": made_on, "found": found}, indent=1) + "\n")
        print(name, found["loss"][0], "to", found["loss"][-1], "val", found["val_loss"])


if __name__ == "__main__":
    remake()
