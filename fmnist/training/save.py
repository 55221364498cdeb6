"""Save what a restart continues from: copied between two steps, written beside the next ones."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor

from fmnist.checkpoint.contents import EMA, MODEL, OPTIMIZER, weights_to_use
from fmnist.checkpoint.tensors import apart, non_finite, optimizer_tensors
from fmnist.run import Run
from fmnist.training.parts import Training


def save(training: Training, run: Run, *, full: bool = True) -> None:
    """Copy what a checkpoint holds and begin to write it, unless a value in it is not finite.

    The copy takes as much host memory as the checkpoint, on the main process; pinned memory is kept for the next one.

    Args:
        training: what is trained.
        run: this process's view of the run.
        full: everything that a restart needs; else the weights to use alone.

    Raises:
        FloatingPointError: on every process, naming the tensors; nothing is written.
        OSError: on the main process, where the save before could not be written, or the run directory is gone; the
            others end with it.
    """
    with training.clock.saving():
        run.wait_for_save()
        files: dict[str, Mapping[str, Tensor]] = {
            MODEL: training.model.state_dict(),
            OPTIMIZER: optimizer_tensors(training.model, training.optimizer),
        }
        if training.ema is not None:
            files[EMA] = training.ema.module.state_dict()
        if not full:
            to_use = weights_to_use(run.directory, files).name
            files = {to_use: files[to_use]}

        # nothing broken is ever saved, and all processes find out together
        bad = [f"{file}: {name}" for file, tensors in files.items() for name in non_finite(tensors)]
        if run.mean({"bad": torch.tensor(len(bad), device=run.device)})["bad"]:
            names = next(filter(None, run.gather(bad)))
            training.non_finite.stop(f"{'; '.join(names[:3])}: not finite, so nothing is saved,", training.state.step)

        training.state.train_seconds = training.clock.total_seconds
        training.state.size = training.size_at(training.state.step)
        run.on_main(_begin, training, run, files)


def _begin(training: Training, run: Run, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    copies = {name: apart(tensors) for name, tensors in files.items()}  # before the next step changes anything
    run.writing.start(training.checkpoints.save, deepcopy(training.state), copies)
