"""What a run is about to do: five lines before its first step, and with --dry_run batches, FLOPs and memory too."""

from fmnist.config.schema import Config
from fmnist.data.augment import pyramid_bytes
from fmnist.data.batches import Loader
from fmnist.data.placement import LABEL_BYTES
from fmnist.models.flops import flops_per_image
from fmnist.models.matmul_layers import describe_matmul
from fmnist.models.triton_layers import describe_triton
from fmnist.run import Run
from fmnist.runtime.console import counted
from fmnist.training.memory import activation_bytes, memory_bytes
from fmnist.training.parts import Training

BACKENDS = {"eager": "in plain PyTorch", "compiled": "compiled", "triton": "by the Triton kernel"}


def opening(training: Training, cfg: Config, run: Run) -> list[str]:
    """Return five lines that say what is about to be trained: data, model, recipe, device, directory."""
    t, loader, schedule, augment = training, training.loader, training.schedule, training.augment
    parameters = sum(p.numel() for p in t.model.parameters())
    origin = "from pretrained weights" if cfg.model.has_pretrained_input else "from scratch"
    origin = f"from {cfg.model.weights}" if cfg.model.starts_from_run else origin
    epochs = schedule.epoch(schedule.total_steps)
    images = len(augment.mean), tuple(augment.sizes.values())
    layers = describe_triton(t.model, *images) or describe_matmul(t.model, *images)
    graphs = run.captures and cfg.model.cuda_graph == "auto" and loader.staging is None
    minutes = cfg.schedule.minutes
    within = f" in {minutes:g} minute{'' if minutes == 1 else 's'}" if minutes else ""
    rows = {
        "data": f"{loader.split.location}: {len(loader.split):,} training, {len(t.val_split):,} validation, "
        f"{len(t.test_split):,} test images{t.placement}{exchange(loader, run)}",
        "model": f"{cfg.model.name} {origin}, {parameters:,} parameters, {counted(len(augment.mean), 'input channel')}",
        "recipe": f"{epochs:.4g} epoch{'' if epochs == 1 else 's'} = {schedule.total_steps:,} steps{within} of "
        f"{loader.global_batch_size} images at {sizes(t.augment.sizes)}; {cfg.optim.name}, "
        f"learning rate {schedule.peak_lr:.4g}, {schedule.shape}",
        "device": f"{run.device_name}: {counted(run.world_size, 'process', 'processes')}"
        f", {run.precision}; augmentation {BACKENDS[augment.backend]}{'; each step one CUDA graph' * graphs}"
        + (f"; {layers}" if layers else ""),
        "directory": f"{run.directory}: "
        + (f"resuming at step {t.state.step:,} of {schedule.total_steps:,}" if t.state.step else "a new run"),
    }
    return [f"{name:<9}  {text}" for name, text in rows.items()]


def exchange(loader: Loader, run: Run) -> str:
    """Say how much the processes exchange in a step, and how long a probe says that takes; empty where they do not.

    Called by all processes: those images travel beside the step, which waits only where they take longer than it does;
    how long it did is `data_wait_ms` in metrics.jsonl.
    """
    if loader.staging is None or loader.split.rows is None or run.world_size == 1:
        return ""
    num_bytes, seconds = (max(found) for found in zip(*run.gather(loader.staging.probe()), strict=True))
    steps = loader.accumulation_steps
    return (
        f"; exchange of {steps * num_bytes / 1e6:.3g} MB a step, about {1000 * steps * seconds:.3g} ms at "
        f"{num_bytes / seconds / 1e9:.3g} GB/s, measured in a probe"
    )


def print_plan(training: Training, cfg: Config, run: Run) -> None:
    """Print on the main process what the run would do; nothing is trained or written."""
    t, loader, schedule = training, training.loader, training.schedule
    forward, both = flops_per_image(t.model, len(t.augment.mean), t.augment.final_size)
    num_labels = len(loader.split) + len(t.val_split) + len(t.test_split)
    on_device = t.placement.num_bytes * (t.placement.where != "host")
    memory = memory_bytes(t.model, on_device + LABEL_BYTES * num_labels, t.optimizer, ema=t.ema is not None)
    if loader.staging is None:
        memory["pyramid"] = pyramid_bytes(t.augment.cfg, loader.split.images)
    else:
        memory["staging"] = loader.staging.num_bytes
    pixels = max(t.augment.sizes.values())
    activations = activation_bytes(t.model, t.augment, pixels, loader.micro_batch_size)
    rows = {
        "batch": f"{loader.global_batch_size} = {counted(loader.micro_batch_size, 'image')} x "
        f"{counted(loader.world_size, 'process', 'processes')} x "
        f"{counted(loader.accumulation_steps, 'accumulation step')}",
        "epoch": f"{schedule.steps_per_epoch:,} steps; {schedule.warmup_steps:,} of warm-up in all; "
        f"validation every {schedule.evaluation_steps:,}, at "
        + sizes({0: cfg.evaluation.size} if cfg.evaluation.size else t.augment.sizes),
        "lr": f"{schedule.lr(0):.4g} first, {schedule.peak_lr:.4g} at most, "
        f"{schedule.lr(schedule.total_steps - 1):.4g} last",
        "FLOPs": f"{forward / 1e9:.4g} G an image forward, {both / 1e9:.4g} G forward and backward",
        "memory": ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in memory.items() if size)
        + f"; {sum(memory.values()) / 2**20:.1f} MiB in all, and about {activations / 2**20:.1f} MiB of activations "
        f"for {counted(loader.micro_batch_size, 'image')} of {pixels} px",
    }
    for line in [*opening(training, cfg, run), *(f"{name:<9}  {text}" for name, text in rows.items())]:
        run.on_main(print, line)


def sizes(size: dict[int, int]) -> str:
    """Return the image size, and how it grows over the epochs: "20 px, 28 px after epoch 4"."""
    return ", ".join(f"{px} px after epoch {epoch}" if epoch else f"{px} px" for epoch, px in size.items())
