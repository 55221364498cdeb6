"""The two races: loaders alone, and the project's own train_step fed by each of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fmnist.benchmark import gate
from fmnist.benchmark.ceilings import bytes_per_image
from fmnist.benchmark.pipelines import Pipeline, Setting
from fmnist.benchmark.registry import build
from fmnist.benchmark.timing import Pace, race, summarize
from fmnist.config.schema import AugmentConfig, Config, ModelConfig, OptimConfig
from fmnist.data.batches import MicroBatch
from fmnist.models.flops import flops_per_image
from fmnist.network import build_network
from fmnist.optim import build_optimizer
from fmnist.runtime.compute import Compute
from fmnist.step import train_step

DATA_YARDSTICK, TRAIN_YARDSTICK = "torchvision-pil-2", "synthetic"  # what ratios are to
OPTIM = OptimConfig(lr=1e-4)  # AdamW; the rate is small: what is timed must not diverge


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the machine can do, measured at the head of this very run."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float


class Loading:
    """A loader alone."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.name, self.multiple = pipeline.name, pipeline.multiple
        self.start, self.stop, self._next = pipeline.start, pipeline.stop, pipeline.next

    def step(self) -> int:
        """Take one batch; its images are counted as they come."""
        return len(self._next()[1])


class Trainer:
    """A model, its optimizer and `train_step`, the function that train.py calls.

    Attributes:
        flops: floating-point operations of one image, forward and backward.
        loss: of the last step, on the device.
    """

    def __init__(self, cfg: Config, compute: Compute, size: int) -> None:
        torch.manual_seed(cfg.seed)
        model = build_network(cfg, compute.device, load_weights=False)[0]
        self.flops = flops_per_image(model, 1, size)[1]
        self.optimizer = build_optimizer(model, cfg.optim)
        self.cfg, self.compute = cfg, compute
        self.model, self.gradients = compute.prepare(model, compiled=cfg.model.compile)
        self.model.train()
        self.loss = torch.zeros(())

    def train(self, micro_batches: Sequence[MicroBatch], augment: Callable[[MicroBatch], tuple[Tensor, Tensor]]) -> int:
        """Update the weights once, and return the images trained: those that went through the model."""
        trained = 0

        def counted(batch: MicroBatch) -> tuple[Tensor, Tensor]:
            nonlocal trained
            images, targets = augment(batch)
            trained += len(targets)
            return images, targets

        # `augment` is annotated as the class; the step only calls it.
        metrics = train_step(self.model, self.optimizer, micro_batches, counted, self.gradients, self.cfg.optim)  # type: ignore[arg-type]
        self.loss = metrics["loss"]
        return trained


class Training:
    """A loader that feeds a model; all of a race share one model."""

    def __init__(self, pipeline: Pipeline, trainer: Trainer) -> None:
        self.name, self.multiple = pipeline.name, pipeline.multiple
        self.start, self.stop = pipeline.start, pipeline.stop
        self._pipeline, self._trainer = pipeline, trainer

    def step(self) -> int:
        """Train on one batch."""
        return self._trainer.train(self._pipeline.micro_batches(), self._pipeline.augment)


def admit(
    names: tuple[str, ...], setting: Setting, compute: Compute, on_verdict: Callable[[gate.Verdict], None]
) -> tuple[list[Pipeline], dict[str, str], list[gate.Verdict]]:
    """Build the loaders and send each through the gate; only those that pass, on every process, are returned."""
    pipelines, skipped = build(names, setting)
    verdicts = {}
    for pipeline in pipelines:
        if pipeline.checked:
            verdict = gate.check(pipeline)
            failures = int(compute.sum(torch.tensor(int(not verdict.passed), device=compute.device)))
            if failures and verdict.passed:
                verdict = replace(verdict, passed=False, reason="refused on another process")
            verdicts[pipeline.name] = verdict
            on_verdict(verdicts[pipeline.name])
    passed = [p for p in pipelines if p.name not in verdicts or verdicts[p.name].passed]
    return passed, skipped, list(verdicts.values())


def race_loaders(
    pipelines: list[Pipeline], pace: Pace, compute: Compute, ceilings: Ceilings, title: str
) -> dict[str, Any]:
    """Race the loaders alone.

    Returns:
        The table as JSON: what was raced, and one row per loader.
    """
    samples = race([Loading(pipeline) for pipeline in pipelines], pace, compute)
    rows = []
    for pipeline in pipelines:
        row = {"name": pipeline.name, "description": pipeline.description} | summarize(samples[pipeline.name])
        rows.append(row | memory_share(pipeline, row["images_per_second"]["median"], compute, ceilings))
    return finish_table("data", title, pipelines[0].setting, rows, DATA_YARDSTICK)


def memory_share(pipeline: Pipeline, rate: float, compute: Compute, ceilings: Ceilings) -> dict[str, Any]:
    """Return the bytes that an image costs, the rate in bytes, and where the roofline lies."""
    needed = bytes_per_image(pipeline)
    if needed is None:
        return {"bytes_per_image": None, "bytes_rule": "none"}
    per_process = rate / compute.world_size
    return {
        "bytes_per_image": needed,
        "bytes_rule": pipeline.bytes_rule,
        "bytes_per_second": per_process * needed,
        "share_of_copy_ceiling": per_process * needed / ceilings.copy_bytes_per_second,
        "roofline_images_per_second": ceilings.copy_bytes_per_second / needed * compute.world_size,
    }


def race_training(
    model: str, variant: str, pipelines: list[Pipeline], pace: Pace, compute: Compute, ceilings: Ceilings
) -> dict[str, Any]:
    """Race the loaders as they feed one model.

    Raises:
        FloatingPointError: the loss is not finite at the end: what was timed is not training.
    """
    setting = pipelines[0].setting
    cfg = training_config(model, variant, setting.size, compute.precision, setting.seed)
    trainer = Trainer(cfg, compute, setting.size)
    samples = race([Training(pipeline, trainer) for pipeline in pipelines], pace, compute)
    if not math.isfinite(float(trainer.loss)):
        raise FloatingPointError(f"the loss of {model} is {float(trainer.loss)} at the end of the race")
    roof = ceilings.matmul_flops_per_second / trainer.flops * compute.world_size
    rows = []
    for pipeline in pipelines:
        row = {"name": pipeline.name, "description": pipeline.description} | summarize(samples[pipeline.name])
        row |= {"mfu": row["images_per_second"]["median"] / roof, "roofline_images_per_second": roof}
        rows.append(row)
    title = f"training {model}, {setting.size} px, {variant}, batch {setting.batch_size}"
    table = finish_table("train", title, setting, rows, TRAIN_YARDSTICK)
    return table | {"model": model, "variant": variant, "flops_per_image": trainer.flops}


def training_config(model: str, variant: str, size: int, precision: Any, seed: int) -> Config:
    """Return the config of a stock model (timm's own, or ours) with random weights."""
    network = ModelConfig(name=model, compile=variant == "compiled", precision=precision)
    return replace(Config(), model=network, augment=AugmentConfig(size=size), optim=OPTIM, seed=seed)


def finish_table(mode: str, title: str, setting: Setting, rows: list[dict[str, Any]], yardstick: str) -> dict[str, Any]:
    """Add to each row its ratio to the yardstick's: of medians, and of best rounds; none where it did not run."""
    base = next((row["images_per_second"] for row in rows if row["name"] == yardstick), None)
    for row in rows:
        own = row["images_per_second"]
        row["ratio"] = own["median"] / base["median"] if base else None
        row["ratio_of_best"] = own["max"] / base["max"] if base else None
    return {
        "mode": mode,
        "title": title,
        "size": setting.size,
        "batch_size": setting.batch_size,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "ratio_to": yardstick if base else None,
        "rows": rows,
    }


def verdicts_as_json(verdicts: Sequence[gate.Verdict], size: int) -> list[dict[str, Any]]:
    """Return the gate's findings, each with the image size."""
    return [{"size": size} | asdict(verdict) for verdict in verdicts]
