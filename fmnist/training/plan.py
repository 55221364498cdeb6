"""What a run would do, before it does it: parameters, FLOPs, batches, steps and memory."""

from torch import nn
from torch.optim import Optimizer

from fmnist.checkpoint.tensors import expected_state
from fmnist.config.schema import Config
from fmnist.data.find import locate
from fmnist.models.flops import flops_per_image
from fmnist.run import Run
from fmnist.runtime.console import counted
from fmnist.training.build import Training


def memory_bytes(
    model: nn.Module, num_images: int, image_bytes: int, optimizer: Optimizer, *, ema: bool
) -> dict[str, int]:
    """Return the device memory of what stays for the whole run; activations come on top.

    Args:
        model: the network, fp32.
        num_images: of all splits on the device.
        image_bytes: of one uint8 image.
        optimizer: of its parameters.
        ema: a moving average of the weights is kept.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(
        len(expected_state(optimizer, group) - {"step"}) * p.numel() * p.element_size()
        for group in optimizer.param_groups
        for p in group["params"]
    )
    label_bytes = 8
    return {
        "data": num_images * (image_bytes + label_bytes),
        "weights": weights,
        "gradients": weights,
        "optimizer": moments,
        "ema": weights if ema else 0,
    }


def print_plan(training: Training, cfg: Config, run: Run) -> None:
    """Print on the main process what the run would do; nothing is trained or written."""
    t, loader, schedule = training, training.loader, training.schedule
    images = loader.split.images
    forward, both = flops_per_image(t.model, len(t.augment.mean), t.augment.final_size)
    parameters = sum(p.numel() for p in t.model.parameters())
    memory = memory_bytes(
        t.model,
        len(loader.split) + len(t.val_split) + len(t.test_split),
        images[0].numel(),
        t.optimizer,
        ema=t.ema is not None,
    )
    total = sum(memory.values())
    rows = {
        "data": f"{locate(cfg.data.root)}: {len(loader.split):,} train, {len(t.val_split):,} validation images",
        "model": f"{cfg.model.name}, {parameters:,} parameters, {counted(len(t.augment.mean), 'input channel')}",
        "image size": f"{cfg.augment.size} px in training, "
        f"{cfg.evaluation.size or t.augment.final_size} px in evaluation; made by: {t.augment.backend}",
        "FLOPs per image": f"{forward / 1e9:.4g} G forward, {both / 1e9:.4g} G forward and backward",
        "batch": f"{loader.global_batch_size} = {counted(loader.micro_batch_size, 'image')} x "
        f"{counted(loader.world_size, 'process', 'processes')} x "
        f"{counted(loader.accumulation_steps, 'accumulation step')}",
        "steps": f"{schedule.total_steps:,} = {schedule.epoch(schedule.total_steps):.4g} epochs x "
        f"{schedule.steps_per_epoch:,}; {schedule.warmup_steps:,} of warm-up; "
        f"evaluation every {schedule.evaluation_steps:,}",
        "learning rate": f"{schedule.lr(0):.4g} first, {schedule.peak_lr:.4g} at most, "
        f"{schedule.lr(schedule.total_steps - 1):.4g} last ({schedule.shape})",
        "device": f"{run.device_name} x {run.world_size}, {run.precision}",
        "memory": ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in memory.items() if size)
        + f"; {total / 2**20:.1f} MiB in all, activations apart",
        "run directory": f"{run.directory}, continuing from step {t.state.step}"
        if t.state.step
        else str(run.directory),
    }
    for name, text in rows.items():
        run.on_main(print, f"{name:>16}  {text}")
