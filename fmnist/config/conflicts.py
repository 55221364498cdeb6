"""Options that contradict each other, or have no effect together."""

from fmnist.config.schema import Config, OptimConfig, check_values


def validate(cfg: Config) -> None:
    """Refuse a config that no run could use, or that would silently ignore one of its options.

    Raises:
        ValueError: one line with the option, its value and what would be valid.
    """
    check_values(cfg)
    augment, batch, optim, schedule = cfg.augment, cfg.batch, cfg.optim, cfg.schedule
    if augment.mix_probability < 1 and not (augment.mixup_alpha or augment.cutmix_alpha):
        reason = "mixup_alpha and cutmix_alpha are 0"
        raise ValueError(f"augment.mix_probability {augment.mix_probability} has no effect: {reason}")
    if augment.flip_in_turn and augment.flip in (0, 1):
        raise ValueError(f"augment.flip_in_turn has no effect: augment.flip is {augment.flip:g}, which leaves no turn")
    if optim.name == "sgd" and optim.beta2 != OptimConfig.beta2:
        raise ValueError(f"optim.beta2 {optim.beta2} has no effect: optim.name is sgd, which uses beta1 only")
    if schedule.name == "constant" and schedule.min_lr:
        raise ValueError(f"schedule.min_lr {schedule.min_lr} has no effect: schedule.name is constant")
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
