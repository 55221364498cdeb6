"""The whole step in the race: train.py's own `train_step`, fed by any loader."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from fmnist.benchmark.pipelines import Pipeline
from fmnist.config.schema import Config
from fmnist.data.augment import Augment
from fmnist.data.batches import MicroBatch
from fmnist.data.fashion_mnist import published
from fmnist.models.flops import flops_per_image
from fmnist.network import build_network
from fmnist.optim import build_optimizer
from fmnist.runtime.compute import Compute
from fmnist.step import train_step


class Trainer:
    """A model with random weights, its optimizer, and `train_step`, the function that train.py calls.

    Attributes:
        augment: the config's own data path.
        compiled: whether the model is.
        flops: of one image, forward and backward.
        loss: of the last step, on the device.
    """

    def __init__(self, cfg: Config, compute: Compute) -> None:
        torch.manual_seed(cfg.seed)
        model, self.augment = build_network(cfg, published(cfg.data.val_size), compute.device, load_weights=False)
        self.flops = flops_per_image(model, len(self.augment.mean), self.augment.final_size)[1]
        self.optimizer = build_optimizer(model, cfg.optim)
        self.model, self.gradients = compute.prepare(model, compiled=cfg.model.compile)
        self.step = compute.captured(train_step, cfg.model.cuda_graph)
        self.model.train()
        self.cfg, self.compiled, self.loss = cfg.optim, cfg.model.compile, torch.zeros(())

    def train(self, micro_batches: Sequence[MicroBatch], augment: Augment) -> None:
        """Update the weights once."""
        self.loss = self.step(self.model, self.optimizer, micro_batches, augment, self.gradients, self.cfg)["loss"]

    def train_on(self, pipeline: Pipeline) -> int:
        """Update the weights once, on a loader's next batch, and return the images that went through the model."""
        images, labels = pipeline.next()
        # of a micro-batch the step itself reads only these; one with pixels of its own is not recorded as a graph
        batch: Any = SimpleNamespace(seed=0, class_weights=None, pixels=pipeline)
        augment: Any = lambda _: (images, labels)  # noqa: E731 the step only calls it
        self.train([batch], augment)
        return len(labels)
