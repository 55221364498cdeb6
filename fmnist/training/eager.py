"""Whether the evaluation at the end is long enough to pay for a compilation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fmnist.config.schema import Config
from fmnist.models.flops import flops_per_image
from fmnist.run import Run
from fmnist.training.parts import Training

# Compiling takes about a minute and then saves about a third of the time: so it pays from three minutes on.
PAYS_FROM_S = 180.0
# Floating-point operations a second that an uncompiled model reaches. Not measured at the run: a decision by the clock
# would not be the same each time, nor would the last bits be.
ACCELERATOR_RATE, CPU_RATE = 1e14, 5e10


@contextmanager
def eager_unless_long(training: Training, cfg: Config, run: Run) -> Iterator[None]:
    """Run a compiled model uncompiled inside, unless the validation and test images are enough to compile it for."""
    if not cfg.model.compile:
        yield
        return
    augment, size = training.augment, cfg.evaluation.size or training.augment.final_size
    num_test = len(training.test_split) if cfg.evaluation.test else 0
    num_images = len(training.val_split) + num_test * (1 + (cfg.evaluation.tta == "flip"))
    rate = CPU_RATE if run.device.type == "cpu" else ACCELERATOR_RATE
    with torch.compiler.set_stance("force_eager"):
        forward, _ = flops_per_image(training.model, len(augment.mean), size)
        if forward * num_images < PAYS_FROM_S * rate * run.world_size:
            yield
            return
    run.should_stop.be_patient()
    yield
