"""Every option of a run, typed: one frozen dataclass per concern, and what is legal."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fmnist import strict_yaml

# What may differ between a run's two starts: nothing here changes which weights come out.
MAY_CHANGE = (
    "output_dir",
    "resume",
    "overwrite",
    "max_minutes",
    "dry_run",
    "timeout_s",
    "data.root",
    "model.weights",
    "log.",
    "checkpoint.",
)
# These change the arithmetic's order or its hardware, not the recipe: batches stay the same, results to rounding.
MAY_CHANGE_ROUNDING = (
    "batch.micro_batch_size",
    "augment.backend",
    "evaluation.batch_size",
    "model.compile",
    "model.channels_last",
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    root: str | None = None
    """Folder with the IDX files, plain or .gz; none: $FMNIST_DATA, data/, the distribution's folder, else fetched."""
    val_size: int = 5000
    """Images held out of the 60,000 for validation, stratified by class; 0 trains on all of them."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    global_batch_size: int = 128
    """Images per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: int | None = None
    """Images of one forward on one process; none: global_batch_size / processes, so no accumulation."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    size: int | dict[int, int] = 28
    """Pixels per side the model sees; or {first epoch: pixels}, e.g. {0: 96, 4: 128, 8: 224}."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rotation: float = 0.0
    """Largest rotation, degrees; the angle is uniform in +-rotation."""
    shift: float = 0.0
    """Largest shift per axis, as a fraction of the side; uniform, whole pixels where nothing is interpolated."""
    scale: float = 0.0
    """Largest zoom s: the factor is log-uniform in [1/(1+s), 1+s]."""
    erase: float = 0.0
    """Probability of erasing one rectangle of 2 to 33 % of the area (filled with the data's mean)."""
    mixup_alpha: float = 0.0
    """Beta parameter of mixup; 0 is off."""
    cutmix_alpha: float = 0.0
    """Beta parameter of CutMix; 0 is off. With both on, each sample takes one of them, half and half."""
    mix_probability: float = 1.0
    """Probability that a sample is mixed, where mixup or CutMix is on."""
    backend: Literal["auto", "triton", "compiled", "eager"] = "auto"
    """What makes the images: one fused Triton kernel, torch.compile, or plain torch; auto: the kernel on a GPU."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = "cnn"
    """mlp, cnn, or any timm classifier, e.g. convnext_tiny."""
    pretrained: bool = False
    """Start from timm's pretrained weights, from its hub or its cache."""
    weights: str | None = None
    """Start from this local file of pretrained weights (.safetensors, .pt); beats the hub."""
    drop_rate: float = 0.0
    """Dropout probability before the head (in the MLP: after each hidden layer)."""
    drop_path_rate: float = 0.0
    """Stochastic depth probability of the last block (timm models)."""
    options: dict[str, Any] = field(default_factory=dict)
    """More keyword arguments of the model, e.g. {depths: [2, 2, 6, 2]}."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward; auto: bf16 on a GPU that has it, fp32 elsewhere."""
    channels_last: bool = False
    """Keep images and convolution weights in the channels_last memory format."""
    compile: bool = False
    """Compile the model with torch.compile: a minute at the start, faster steps after it."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW (fused where it exists), or SGD with Nesterov momentum."""
    lr: float = 1e-3
    """Peak learning rate, for the global batch as it is (never rescaled behind your back)."""
    weight_decay: float = 0.05
    """Decay of matrices and kernels; norms, biases and layer scales have none."""
    beta1: float = 0.9
    """AdamW's first moment decay; SGD's momentum."""
    beta2: float = 0.999
    """AdamW's second moment decay."""
    layer_decay: float | None = None
    """Learning rate factor per layer below the head (timm models), e.g. 0.75; none is off."""
    head_lr_scale: float = 1.0
    """Learning rate factor of the classifier head."""
    head_only_epochs: float = 0.0
    """Epochs at the start in which only the head is updated."""
    grad_clip_norm: float | None = None
    """Clip the gradient to this global L2 norm; none is off."""
    label_smoothing: float = 0.0
    """Probability mass spread evenly over the classes."""
    ema_decay: float = 0.0
    """Decay per step of the weights' moving average, which is then what is evaluated; 0 is off."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    epochs: float = 10.0
    """Passes over the training images."""
    steps: int | None = None
    """Optimizer steps in all; beats epochs."""
    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; beats warmup_epochs."""
    min_lr: float = 0.0
    """Learning rate at the end of cosine and linear."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every_epochs: float = 1.0
    """Epochs between evaluations on the validation images; each saves a checkpoint."""
    every_steps: int | None = None
    """Steps between evaluations; beats every_epochs."""
    batch_size: int = 500
    """Images of one forward on one process."""
    size: int | None = None
    """Pixels per side; none: the last of augment.size."""
    tta: Literal["none", "flip"] = "none"
    """flip: average the probabilities of the image and of its mirror."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 0
    """Steps between checkpoints beside those of the evaluations; 0 is none."""
    keep_last: int = 2
    """Newest checkpoints kept; the best one is kept too."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int = 50
    """Steps between logged lines; each costs one device sync."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto: online where an API key is configured, else offline."""
    project: str = "fmnist"
    """Weights & Biases project."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: sections below, then what concerns all of it."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """How many images a step takes."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What happens to a training image, on the device."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The update."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How long, and the learning rate over time."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation in the run, and the test images at its end."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What a restart continues from."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is written while it runs."""
    seed: int = 0
    """Seed of everything random: initial weights, order, augmentation, dropout."""
    output_dir: str | None = None
    """Run directory; none: runs/<config name>."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the run directory's newest good checkpoint; never: refuse a directory in use."""
    overwrite: bool = False
    """With --resume never: delete the run in output_dir and start again."""
    max_minutes: float | None = None
    """Stop with a checkpoint after this many minutes; the same command goes on."""
    exact: int | None = None
    """V: cut each global batch into V shards and get the same bits on any process count that divides V; none is off."""
    timeout_s: float = 45.0
    """Seconds a process waits for the others in a step, then it ends with the name of the one that hangs."""
    dry_run: bool = False
    """Build everything, print the plan, train nothing."""


# (option, lowest, highest): legal ranges, both ends included.
RANGES: tuple[tuple[str, float, float], ...] = (
    ("data.val_size", 0, 59_000),
    ("batch.global_batch_size", 1, 60_000),
    ("batch.micro_batch_size", 1, 60_000),
    ("augment.flip", 0, 1),
    ("augment.rotation", 0, 180),
    ("augment.shift", 0, 0.5),
    ("augment.scale", 0, 1),
    ("augment.erase", 0, 1),
    ("augment.mixup_alpha", 0, 10),
    ("augment.cutmix_alpha", 0, 10),
    ("augment.mix_probability", 0, 1),
    ("model.drop_rate", 0, 0.95),
    ("model.drop_path_rate", 0, 0.95),
    ("optim.lr", 0, 100),
    ("optim.weight_decay", 0, 10),
    ("optim.beta1", 0, 0.9999),
    ("optim.beta2", 0, 0.99999),
    ("optim.layer_decay", 0.01, 1),
    ("optim.head_lr_scale", 0, 1000),
    ("optim.head_only_epochs", 0, 10_000),
    ("optim.grad_clip_norm", 1e-6, 1e6),
    ("optim.label_smoothing", 0, 0.9),
    ("optim.ema_decay", 0, 0.99999),
    ("schedule.epochs", 1e-6, 100_000),
    ("schedule.steps", 1, 10**9),
    ("schedule.warmup_epochs", 0, 100_000),
    ("schedule.warmup_steps", 0, 10**9),
    ("schedule.min_lr", 0, 100),
    ("evaluation.every_epochs", 1e-6, 100_000),
    ("evaluation.every_steps", 1, 10**9),
    ("evaluation.batch_size", 1, 60_000),
    ("evaluation.size", 8, 1024),
    ("checkpoint.every_steps", 0, 10**9),
    ("checkpoint.keep_last", 1, 10_000),
    ("log.every_steps", 1, 10**9),
    ("seed", 0, 2**31 - 1),
    ("max_minutes", 0.001, 10**7),
    ("exact", 1, 4096),
    ("timeout_s", 1, 86_400),
)


def flatten(cfg: Config) -> dict[str, Any]:
    """Return every option of a config under its dotted name, e.g. {"optim.lr": 0.001, ...}."""
    flat: dict[str, Any] = {}
    for key, value in asdict(cfg).items():
        section = getattr(cfg, key)
        flat |= (
            {f"{key}.{k}": v for k, v in value.items()} if hasattr(section, "__dataclass_fields__") else {key: value}
        )
    return flat


def validate(cfg: Config) -> None:
    """Refuse values that no run could use.

    Raises:
        ValueError: one line with the option, its value and what would be legal.
    """
    flat = flatten(cfg)
    for key, value in flat.items():
        if isinstance(value, str) and not (value.isprintable() and 0 < len(value) <= 4096 and value.strip()):
            raise ValueError(f"{key} is {value[:100]!r}; legal: 1 to 4096 printable characters")
    for key, low, high in RANGES:
        value = flat[key]
        if value is not None and not low <= value <= high:  # a NaN fails both comparisons
            raise ValueError(f"{key} is {value}; legal: {low:g} to {high:g}")
    sizes = cfg.augment.size if isinstance(cfg.augment.size, dict) else {0: cfg.augment.size}
    if 0 not in sizes or not all(epoch >= 0 and 8 <= size <= 1024 for epoch, size in sizes.items()):
        raise ValueError(
            f"augment.size is {cfg.augment.size}; legal: 8 to 1024 pixels, or {{0: pixels, epoch: pixels}}"
        )
    augment = cfg.augment
    if augment.mix_probability < 1 and not (augment.mixup_alpha or augment.cutmix_alpha):
        raise ValueError(
            f"augment.mix_probability {augment.mix_probability} has no effect: mixup_alpha and cutmix_alpha are 0"
        )
    if cfg.exact:
        _validate_exact(cfg.exact, cfg.batch)
    if cfg.overwrite and cfg.resume != "never":
        raise ValueError("overwrite is true but resume is auto: give --resume never to start again")
    try:  # nothing that JSON lacks: NaN would not equal itself at the next start
        json.dumps(cfg.model.options, allow_nan=False)
    except (ValueError, TypeError):
        raise ValueError(
            "model.options holds a number that is not finite; legal: numbers, text, lists, names"
        ) from None
    names = {"log.project": cfg.log.project}
    if cfg.output_dir is not None:
        names["output_dir"] = Path(cfg.output_dir).resolve().name  # the name of the run
    for key, name in names.items():
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
            last = "its last part" if key == "output_dir" else "it"
            raise ValueError(f"{key} is {flat[key]!r}; {last} must match [A-Za-z0-9._-]{{1,64}}")


def _validate_exact(exact: int, batch: BatchConfig) -> None:
    shard, rest = divmod(batch.global_batch_size, exact)
    if rest:
        raise ValueError(f"exact is {exact}; legal: a divisor of batch.global_batch_size {batch.global_batch_size}")
    if batch.micro_batch_size not in (None, shard):
        raise ValueError(
            f"batch.micro_batch_size is {batch.micro_batch_size}, but exact {exact} makes it "
            f"{batch.global_batch_size} / {exact} = {shard}: leave it out"
        )


def to_yaml(cfg: Config) -> str:
    """Return the resolved config as YAML that --config reads back to an equal Config."""
    return strict_yaml.dump(asdict(cfg))


def recipe(cfg: Config) -> dict[str, Any]:
    """Return the options that decide the result, under their dotted names."""
    return {key: value for key, value in flatten(cfg).items() if not key.startswith(MAY_CHANGE + MAY_CHANGE_ROUNDING)}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Name the options of both that differ, with both values."""
    differ = [key for key in before if key in after and before[key] != after[key]]
    return [f"{key} was {before[key]}, now {after[key]}" for key in differ]


def differences(old: Config, new: Config) -> list[str]:
    """Name the options that differ and would change the result, with both values."""
    return changes(recipe(old), recipe(new))
