"""Save what a restart continues from."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fmnist.checkpoint.contents import EMA, MODEL, OPTIMIZER
from fmnist.checkpoint.tensors import non_finite, optimizer_tensors
from fmnist.run import Run
from fmnist.training.build import Training


def save(training: Training, run: Run) -> None:
    """Write a checkpoint, unless a value in it is not finite.

    Raises:
        FloatingPointError: on every process, naming the tensors; nothing is written.
        OSError: on the main process, which cannot write; the others end with it.
    """
    files: dict[str, Mapping[str, Tensor]] = {
        MODEL: training.model.state_dict(),
        OPTIMIZER: optimizer_tensors(training.model, training.optimizer),
    }
    if training.ema is not None:
        files[EMA] = training.ema.module.state_dict()

    # nothing broken is ever saved, and all processes find out together
    bad = [f"{file}: {name}" for file, tensors in files.items() for name in non_finite(tensors)]
    if run.mean({"bad": torch.tensor(len(bad), device=run.device)})["bad"]:
        names = next(filter(None, run.gather(bad)))
        training.non_finite.stop(f"{'; '.join(names[:3])} not finite, not saved,", training.state.step)

    training.state.train_seconds = training.clock.total_seconds
    run.on_main(training.checkpoints.save, training.state, files)
