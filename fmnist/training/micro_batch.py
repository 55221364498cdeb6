"""The largest micro-batch that fits into memory: found at the start, and named where memory runs out."""

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from fmnist.config.schema import Config
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.runtime.gradients import as_it_was
from fmnist.runtime.hardware import autocast, free_memory, is_out_of_memory
from fmnist.runtime.processes import Processes
from fmnist.training.memory import memory_bytes
from fmnist.training.parts import Training

logger = logging.getLogger("fmnist")


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest size that fits, or None: doubled until one does not, then halving what lies between.

    From below, because a trial far beyond what fits may not fail but end the process, on a CPU.

    Args:
        sizes: ascending.
        fits: says whether one does; it is asked about each at most once.
    """
    good, bad, at = -1, len(sizes), 0
    while good < at < bad:
        if not fits(sizes[at]):
            bad = at
            break
        good = at
        at = next((i for i in range(at, len(sizes)) if sizes[i] >= 2 * sizes[at]), len(sizes) - 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(sizes[middle]) else (good, middle)
    return sizes[good] if good >= 0 else None


def micro_batch_sizes(loader: Loader, below: int | None = None) -> list[int]:
    """Return the sizes that cut the global batch evenly among the processes, ascending; 1 only if there is no other.

    Args:
        loader: of the run.
        below: leave out this size and larger ones.
    """
    share = loader.global_batch_size // loader.world_size
    sizes = [size for size in range(1, share + 1) if share % size == 0 and (below is None or size < below)]
    return [size for size in sizes if size > 1] or sizes  # BatchNorm cannot be trained on one image


def fitting_micro_batch(
    model: nn.Module, optimizer: Optimizer, augment: Augment, loader: Loader, sizes: Sequence[int]
) -> int | None:
    """Return the largest micro-batch whose forward and backward fit beside all that stays; None if none does.

    Args:
        model: not wrapped, in training mode; it is not changed.
        optimizer: of its parameters; the room that its state will take is kept free.
        augment: makes the images, at the largest size of the run.
        loader: of the run.
        sizes: to choose from, ascending.
    """
    device = next(model.parameters()).device
    epoch = max(augment.sizes, key=lambda first: augment.sizes[first])
    later = 0 if optimizer.state else memory_bytes(model, 0, optimizer, ema=False)["optimizer"]
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    later += gradients * (loader.world_size > 1)  # DDP's copy of them

    def fits(size: int) -> bool:
        batch = loader.cut(size).trial(epoch * loader.steps_per_epoch)
        try:
            held = gradients * (size * loader.world_size < loader.global_batch_size)  # of the micro-batches before
            room = torch.empty(later + held, dtype=torch.uint8, device=device)
            with as_it_was(model):
                images, targets = augment(batch)
                with autocast(device, augment.dtype):
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), targets)
                # not backward(), whose hooks would begin to sum over processes: another may be elsewhere
                torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
            del room
        except (RuntimeError, ValueError) as error:
            if not is_out_of_memory(error) and size > 1:  # a single image is no batch to BatchNorm
                raise
            traceback.clear_frames(error.__traceback__)  # which hold what did fit
            return False
        finally:
            free_memory(device)
        return True

    return largest_that_fits(sizes, fits)


def choose_micro_batch(
    model: nn.Module, optimizer: Optimizer, augment: Augment, loader: Loader, kept: int | None, processes: Processes
) -> int:
    """Return the micro-batch of `batch.micro_batch_size: auto`, the same on all processes.

    Args:
        model, optimizer, augment, loader: see `fitting_micro_batch`.
        kept: what an earlier start of the run found; taken again wherever it cuts the batch evenly.
        processes: the smallest that any of them finds fits all.

    Raises:
        ValueError: nothing fits.
    """
    sizes = micro_batch_sizes(loader)
    if kept is not None and (loader.global_batch_size // loader.world_size) % kept == 0:
        return kept
    found = processes.gather(fitting_micro_batch(model, optimizer, augment, loader, sizes) or 0)
    if not min(found):
        raise ValueError(
            f"batch.micro_batch_size is auto, but not even {sizes[0]} images of {max(augment.sizes.values())} px fit "
            "into memory; valid: a smaller model or augment.size"
        )
    logger.info("batch.micro_batch_size auto: %d images fit", min(found))
    return min(found)


@contextmanager
def say_what_would_fit(training: Training, cfg: Config) -> Iterator[None]:
    """End a training that runs out of memory with one line that names the size that would do.

    Raises:
        ValueError: in its place, on the process that ran out.
    """
    try:
        yield
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        evaluating = "predict" in {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        traceback.clear_frames(error.__traceback__)  # which hold the activations
    raise ValueError(_what_would_fit(training, cfg, evaluating=evaluating))


def _what_would_fit(training: Training, cfg: Config, *, evaluating: bool) -> str:
    loader, step = training.loader, training.state.step
    if evaluating:
        size = cfg.evaluation.batch_size
        return (
            f"out of memory in the evaluation after step {step:,}: evaluation.batch_size is {size}; valid: a smaller "
            f"one, such as --evaluation.batch_size {max(1, size // 2)}"
        )
    ended = f"out of memory at step {step + 1:,} with micro-batches of {loader.micro_batch_size} images"
    if cfg.exact:
        return f"{ended}, which exact {cfg.exact} makes; valid: a larger --exact, in another --output_dir"
    training.optimizer.zero_grad(set_to_none=True)
    free_memory(loader.split.labels.device)
    sizes = micro_batch_sizes(loader, below=loader.micro_batch_size)
    fitting = fitting_micro_batch(training.model, training.optimizer, training.augment, loader, sizes)
    if fitting is None:
        return f"{ended}, and no smaller one fits; valid: a smaller model or augment.size"
    return f"{ended}; {fitting} fit: --batch.micro_batch_size {fitting} resumes it, with the same batches"
