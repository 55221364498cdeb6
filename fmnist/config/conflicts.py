"""Options that contradict each other, or have no effect: one table of each kind, refused or said."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from fmnist.config.same_run import yaml_value
from fmnist.config.schema import Config, check_values, flatten

NUM_TRAIN, IMAGE_SIDE = 55_000, 28  # of the published training images, without 5,000 for validation


@dataclass(frozen=True)
class Length:
    """A run in steps.

    Attributes:
        total_steps, steps_per_epoch: optimizer updates.
        image_side: pixels per side of the stored images.
        num_train: images to train on.
        channels: of the stored images; 1 is grey.
        num_val: images to validate on.
    """

    total_steps: int
    steps_per_epoch: int
    image_side: int = IMAGE_SIDE
    num_train: int = NUM_TRAIN
    channels: int = 1
    num_val: int = 5_000

    def steps(self, epochs: float) -> int:
        """Return a duration in steps."""
        return round(epochs * self.steps_per_epoch)


# What has no effect whatever the length of the run: option, when, why. Such a config is refused.
REFUSED: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    (
        "augment.mix_probability",
        lambda cfg: not cfg.augment.mixes,
        "augment.mixup_alpha and augment.cutmix_alpha are 0",
    ),
    ("augment.mixup_alpha", lambda cfg: not cfg.augment.mix_probability, "augment.mix_probability is 0"),
    ("augment.cutmix_alpha", lambda cfg: not cfg.augment.mix_probability, "augment.mix_probability is 0"),
    ("augment.flip_in_turn", lambda cfg: cfg.augment.flip in (0, 1), "augment.flip is 0 or 1, which leaves no turn"),
    ("augment.crop_aspect", lambda cfg: cfg.augment.crop == 1, "augment.crop is 1, which crops nothing"),
    ("optim.beta2", lambda cfg: cfg.optim.name == "sgd", "optim.name is sgd, which uses beta1 only"),
    *(
        (name, lambda cfg: cfg.data.name != "folder", "data.name is not folder")
        for name in ("data.stored_size", "data.fit", "data.holdout", "data.bad_files")
    ),
    ("data.fold", lambda cfg: cfg.data.folds is None, "data.folds is null"),
    ("schedule.min_lr", lambda cfg: cfg.schedule.name == "constant", "schedule.name is constant"),
)
# What has none, or another, in a run of this length, as a short trial of a recipe is: said when the run begins.
SAID: tuple[tuple[str, Callable[[Config, Length], bool], str], ...] = (
    (
        "checkpoint.every_steps",
        lambda cfg, run: cfg.checkpoint.every_steps > run.total_steps,
        "has no effect: the run is shorter",
    ),
    (
        "log.every_steps",
        lambda cfg, run: cfg.log.every_steps > run.total_steps,
        "is longer than the run: one line, at its end",
    ),
    (
        "evaluation.every_steps",
        lambda cfg, run: (cfg.evaluation.every_steps or 0) > run.total_steps,
        "is longer than the run: one evaluation, at its end",
    ),
    (
        "evaluation.every_epochs",
        lambda cfg, run: not cfg.evaluation.every_steps and run.steps(cfg.evaluation.every_epochs) > run.total_steps,
        "is longer than the run: one evaluation, at its end",
    ),
    (
        "profile",
        lambda cfg, run: run.total_steps <= 10,
        "has no effect: it traces steps after the first ten, and the run has no more",
    ),
    (
        "augment.flip_in_turn",
        lambda cfg, run: run.total_steps <= run.steps_per_epoch,
        "has no effect: the run has no second epoch, in which an image would take its other turn",
    ),
    (
        "augment.shift",
        lambda cfg, run: (
            {*sizes_by_epoch(cfg, run.num_train).values()} == {run.image_side}
            and not cfg.augment.interpolates
            and round(cfg.augment.shift * run.image_side) == 0
        ),
        "has no effect: it is less than half a pixel, and shifts are whole where nothing else is interpolated",
    ),
    ("augment.saturation", lambda cfg, run: run.channels == 1, "has no effect: the images are grey"),
    ("augment.hue", lambda cfg, run: run.channels == 1, "has no effect: the images are grey"),
    (
        "schedule.warmup_epochs",
        lambda cfg, run: cfg.schedule.warmup_steps is None and not run.steps(cfg.schedule.warmup_epochs),
        "has no effect: it is less than half a step",
    ),
    (
        "optim.head_only_epochs",
        lambda cfg, run: not run.steps(cfg.optim.head_only_epochs),
        "has no effect: it is less than half a step",
    ),
    (
        "data.val_size",
        lambda cfg, run: cfg.data.folds is not None,
        "has no effect: data.folds holds a fold out in place of it",
    ),
    ("optim.lr", lambda cfg, run: cfg.optim.lr == 0, "has no effect: nothing is trained"),
    ("log.project", lambda cfg, run: cfg.log.wandb == "disabled", "has no effect: log.wandb is disabled"),
    ("model.channels_last", lambda cfg, run: cfg.model.name == "mlp", "has no effect: the MLP has no convolution"),
)


def validate(cfg: Config, flags: Collection[str] = ()) -> None:
    """Refuse a config that no run could use, or that would silently ignore one of its options.

    Args:
        cfg: every option.
        flags: the options that were given by hand: a recipe's epochs give way to schedule.minutes, a flag's do not.

    Raises:
        ValueError: one line with the option, its value and what would be valid.
    """
    check_values(cfg)
    batch = cfg.batch
    for name, when, reason in REFUSED:
        if _given(cfg, name) and when(cfg):
            raise ValueError(f"{_given(cfg, name)} has no effect: {reason}")
    for name in ("schedule.steps", *({"schedule.epochs"} & set(flags))):
        if cfg.schedule.minutes is not None and (given := _given(cfg, name)):
            raise ValueError(f"{given} and {_given(cfg, 'schedule.minutes')} are two lengths; valid: one of them")
    if cfg.exact:
        shard, rest = divmod(batch.global_batch_size, cfg.exact)
        if rest:
            raise ValueError(
                f"exact is {cfg.exact}; valid: a divisor of batch.global_batch_size {batch.global_batch_size}"
            )
        if batch.micro_batch_size not in (None, shard):
            reason = f"exact makes it {batch.global_batch_size} / {cfg.exact} = {shard}"
            raise ValueError(f"batch.micro_batch_size is {batch.micro_batch_size}, but {reason}: leave it out")
    if cfg.data.sampling == "balanced" and cfg.optim.class_weights == "balanced":
        raise ValueError(
            "data.sampling balanced with optim.class_weights balanced would count small classes twice over; valid: "
            "one of the two, or your own weights"
        )
    if cfg.data.folds is not None and not 0 <= (-1 if cfg.data.fold is None else cfg.data.fold) < cfg.data.folds:
        fold = yaml_value(cfg.data.fold)
        raise ValueError(f"data.fold is {fold}; valid with data.folds {cfg.data.folds}: 0 to {cfg.data.folds - 1}")
    if cfg.overwrite and cfg.resume != "never":
        raise ValueError("overwrite is true but resume is auto: give --resume never to start again")


def without_effect(cfg: Config, run: Length) -> list[str]:
    """Say, one line each, which options have no effect or another in a run of this length."""
    lines = [f"{_given(cfg, name)} {what}" for name, when, what in SAID if _given(cfg, name) and when(cfg, run)]
    if not run.num_val and (best := _given(cfg, "evaluation.best")):
        lines.append(f"{best} has no effect: there are no validation images")
    epochs, warmup = run.total_steps / run.steps_per_epoch, cfg.schedule.warmup_epochs
    sizes = sizes_by_epoch(cfg, run.num_train)
    reached = 1 - run.total_steps ** (-2 / 3)  # by the warm-up of timm's average
    if 1.25 * (1 - cfg.optim.ema_decay) < 1 - reached:
        lines.append(
            f"optim.ema_decay {cfg.optim.ema_decay} is not reached: in {run.total_steps:,} steps it warms up to "
            f"{reached:.4g}"
        )
    length = f"the run has {epochs:.3g} epoch{'s' * (epochs != 1)}"
    steps = warmup_steps(cfg, run)
    if cfg.schedule.warmup_steps is None and steps < run.steps(warmup):
        shown = f"{steps / run.steps_per_epoch:.3g}"
        lines.append(f"schedule.warmup_epochs {warmup} becomes {shown}, a tenth of the whole: {length}")
    if sizes != cfg.augment.sizes:
        lines.append(f"augment.size {cfg.augment.size} becomes {sizes}: {length}")
    return lines


def warmup_steps(cfg: Config, run: Length) -> int:
    """Return the steps of warm-up: in a short trial of a recipe, whose epochs of warm-up would be all of it, a tenth.

    Raises:
        ValueError: a warm-up given in steps is not shorter than the run.
    """
    steps = cfg.schedule.warmup_steps
    if steps is None:
        steps = run.steps(cfg.schedule.warmup_epochs)
        return steps if steps < run.total_steps else run.total_steps // 10
    if steps and steps >= run.total_steps:
        raise ValueError(
            f"schedule.warmup_steps is {steps}, but the run has {run.total_steps} steps; valid: less, and 0 disables it"
        )
    return steps


def _given(cfg: Config, name: str) -> str:
    """Return an option with its value; nothing where it has its default."""
    value = flatten(cfg)[name]
    if value == flatten(Config())[name]:
        return ""
    return name if value is True else f"{name} {value}"


def sizes_by_epoch(cfg: Config, num_train: int = NUM_TRAIN) -> dict[int, int]:
    """Return augment.size as {first epoch: pixels}, in a short run fitted into it.

    A model is judged at the last size: one that has never seen it would be judged wrongly. So each size but the first
    begins early enough for a whole epoch of its own, and of each that follows; the last for at least half of one. In a
    run with fewer epochs than sizes the first sizes are left out.
    """
    size = cfg.augment.sizes
    steps_per_epoch = max(1, num_train // cfg.batch.global_batch_size)
    epochs = cfg.schedule.steps / steps_per_epoch if cfg.schedule.steps else cfg.schedule.epochs
    fitted: dict[int, int] = {}
    latest = max(1, int(epochs + 0.5)) - 1  # the last epoch of which there is half at least
    for first in sorted(size, reverse=True):
        fitted[max(0, min(first, latest))] = size[first]
        if latest <= 0:
            break
        latest = min(first, latest) - 1
    return dict(sorted(fitted.items()))
