"""Options that contradict each other, or have no effect: one table of each kind, refused or said."""

from collections.abc import Callable
from dataclasses import dataclass

from fmnist.config.schema import Config, check_values, flatten

NUM_IMAGES, IMAGE_SIDE = 60_000, 28  # of the published training images


@dataclass(frozen=True)
class Length:
    """A run in steps.

    Attributes:
        total_steps, steps_per_epoch: optimizer updates.
        image_side: pixels per side of the stored images.
    """

    total_steps: int
    steps_per_epoch: int
    image_side: int = IMAGE_SIDE

    def rounds_to_none(self, epochs: float) -> bool:
        """Say whether a duration is not 0 and yet no step."""
        return epochs > 0 and not round(epochs * self.steps_per_epoch)


# What has no effect whatever the length of the run: option, when, why. Such a config is refused.
REFUSED: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    (
        "augment.mix_probability",
        lambda cfg: not (cfg.augment.mixup_alpha or cfg.augment.cutmix_alpha),
        "augment.mixup_alpha and augment.cutmix_alpha are 0",
    ),
    ("augment.mixup_alpha", lambda cfg: not cfg.augment.mix_probability, "augment.mix_probability is 0"),
    ("augment.cutmix_alpha", lambda cfg: not cfg.augment.mix_probability, "augment.mix_probability is 0"),
    ("augment.flip_in_turn", lambda cfg: cfg.augment.flip in (0, 1), "augment.flip is 0 or 1, which leaves no turn"),
    ("optim.beta2", lambda cfg: cfg.optim.name == "sgd", "optim.name is sgd, which uses beta1 only"),
    ("schedule.min_lr", lambda cfg: cfg.schedule.name == "constant", "schedule.name is constant"),
)
# What has none, or another, in a run of this length, as a short trial of a recipe is: said when the run begins.
SAID: tuple[tuple[str, Callable[[Config, Length], bool], str], ...] = (
    ("checkpoint.every_steps", lambda cfg, run: cfg.checkpoint.every_steps > run.total_steps, "the run is shorter"),
    ("log.every_steps", lambda cfg, run: cfg.log.every_steps > run.total_steps, "the run is shorter: one line, at its end"),
    (
        "evaluation.every_steps",
        lambda cfg, run: (cfg.evaluation.every_steps or 0) > run.total_steps,
        "the run is shorter: evaluated at its end",
    ),
    (
        "evaluation.every_epochs",
        lambda cfg, run: (
            cfg.evaluation.every_steps is None
            and cfg.evaluation.every_epochs * run.steps_per_epoch > run.total_steps
        ),
        "the run is shorter: evaluated at its end",
    ),
    ("profile", lambda cfg, run: run.total_steps <= 10, "it traces steps after the first ten, and the run has no more"),
    (
        "augment.flip_in_turn",
        lambda cfg, run: run.total_steps <= run.steps_per_epoch,
        "the run has no second epoch, in which an image would take its other turn",
    ),
    (
        "augment.shift",
        lambda cfg, run: (
            set(sizes_by_epoch(cfg).values()) == {run.image_side}
            and not (cfg.augment.rotation or cfg.augment.scale)
            and round(cfg.augment.shift * run.image_side) == 0
        ),
        "shifts are whole pixels where nothing else is interpolated, and this is less than half of one",
    ),
    (
        "schedule.warmup_epochs",
        lambda cfg, run: cfg.schedule.warmup_steps is None and run.rounds_to_none(cfg.schedule.warmup_epochs),
        "it is less than half a step",
    ),
    (
        "optim.head_only_epochs",
        lambda cfg, run: run.rounds_to_none(cfg.optim.head_only_epochs),
        "it is less than half a step",
    ),
    ("log.project", lambda cfg, run: cfg.log.wandb == "disabled", "log.wandb is disabled"),
    ("model.channels_last", lambda cfg, run: cfg.model.name == "mlp", "the MLP has no convolution"),
)  # fmt: skip


def validate(cfg: Config) -> None:
    """Refuse a config that no run could use, or that would silently ignore one of its options.

    Raises:
        ValueError: one line with the option, its value and what would be valid.
    """
    check_values(cfg)
    batch = cfg.batch
    for name, when, reason in REFUSED:
        if when(cfg) and (text := _given(cfg, name)):
            raise ValueError(f"{text} has no effect: {reason}")
    if cfg.exact:
        shard, rest = divmod(batch.global_batch_size, cfg.exact)
        if rest:
            raise ValueError(
                f"exact is {cfg.exact}; valid: a divisor of batch.global_batch_size {batch.global_batch_size}"
            )
        if batch.micro_batch_size not in (None, shard):
            reason = f"exact makes it {batch.global_batch_size} / {cfg.exact} = {shard}"
            raise ValueError(f"batch.micro_batch_size is {batch.micro_batch_size}, but {reason}: leave it out")
    if cfg.overwrite and cfg.resume != "never":
        raise ValueError("overwrite is true but resume is auto: give --resume never to start again")


def without_effect(cfg: Config, run: Length) -> list[str]:
    """Say, one line each, which options have no effect or another in a run of this length."""
    lines = [
        f"{text} has no effect: {why}" for name, when, why in SAID if when(cfg, run) and (text := _given(cfg, name))
    ]
    sizes = sizes_by_epoch(cfg)
    if isinstance(cfg.augment.size, dict) and sizes != cfg.augment.size:
        epochs = run.total_steps / run.steps_per_epoch
        lines.append(f"augment.size {cfg.augment.size} becomes {sizes}: the run has {epochs:.3g} epochs")
    return lines


def _given(cfg: Config, name: str) -> str:
    """Return an option with its value; nothing where it has its default."""
    value = flatten(cfg)[name]
    if value == flatten(Config())[name]:
        return ""
    return name if value is True else f"{name} {value}"


def sizes_by_epoch(cfg: Config) -> dict[int, int]:
    """Return augment.size as {first epoch: pixels}, in a short run fitted into it.

    A model is judged at the last size: one that has never seen it would be judged wrongly. So each size but the first
    begins early enough for one whole epoch of its own and of each that follows; in a run with fewer epochs than sizes
    the first sizes are left out. The number of images behind schedule.steps is that of the published data.
    """
    size = cfg.augment.size
    if isinstance(size, int):
        return {0: size}
    steps_per_epoch = max(1, (NUM_IMAGES - cfg.data.val_size) // cfg.batch.global_batch_size)
    epochs = cfg.schedule.steps / steps_per_epoch if cfg.schedule.steps else cfg.schedule.epochs
    fitted: dict[int, int] = {}
    latest = max(1, int(epochs)) - 1  # the last epoch that is whole
    for first in sorted(size, reverse=True):
        fitted[max(0, min(first, latest))] = size[first]
        if latest <= 0:
            break
        latest = min(first, latest) - 1
    return dict(sorted(fitted.items()))
