"""Which values of the options are legal, by themselves and together."""

import json
import re
from pathlib import Path

from fmnist.config.schema import BatchConfig, Config, flatten

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
