"""A compiled model: one graph for each size, none with a symbol in it, and none for a short evaluation at the end."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fmnist.training.eager
from fmnist.config.schema import AugmentConfig, Config, EvaluationConfig, ModelConfig
from fmnist.data.batches import Loader
from fmnist.data.fashion_mnist import INFO
from fmnist.data.split import Split
from fmnist.metrics import predict
from fmnist.network import build_network
from fmnist.optim import build_optimizer
from fmnist.runtime.compute import Compute
from fmnist.step import train_step
from fmnist.training.eager import eager_unless_long


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Any]]]:
    """Shapes and numbers that each graph takes, as the compiler is given them; nothing is compiled further."""
    found: list[list[Any]] = []
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.fixture
def noted(graphs: list[list[Any]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have what is compiled from here on noted, with its own options but for those given."""
    real = nn.Module.compile

    def note(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append([number for each in inputs for number in getattr(each, "shape", [each])])
        return graph.forward

    def compile_noted(**changed: Any) -> None:
        monkeypatch.setattr(
            nn.Module, "compile", lambda self, **options: real(self, backend=note, **(options | changed))
        )

    return compile_noted


def grow(graphs: list[list[Any]], train_images: Split) -> tuple[SimpleNamespace, list[int]]:
    """Train three steps at 20 px and three at 28, each with a validation at its size, as a run does.

    Return the parts, and how many graphs there were after each step.
    """
    cfg = Config(
        augment=AugmentConfig(size={0: 20, 1: 28}),
        model=ModelConfig(name="cnn", options={"widths": [4, 8]}, precision="fp32", compile=True),
        evaluation=EvaluationConfig(batch_size=40),
    )
    compute = Compute(precision="fp32")
    train, held_out = (Split(images=train_images.images[part], labels=train_images.labels[part]) for part in PARTS)
    model, augment = build_network(cfg, INFO, compute.device, load_weights=False)
    optimizer = build_optimizer(model, cfg.optim)
    wrapped, gradients = compute.prepare(model, compiled=True)
    loader = Loader(train, global_batch_size=32, seed=0)
    augment.sizes = {0: 20, 1: 28}
    model.train()
    counts = []
    for step in range(6):  # three an epoch
        train_step(wrapped, optimizer, loader.micro_batches(step), augment, gradients, cfg.optim)
        predict(model, held_out, augment, replace(cfg.evaluation, size=augment.size(step // 3)), compute)
        counts.append(len(graphs))
    return SimpleNamespace(cfg=cfg, compute=compute, model=model, augment=augment, held_out=held_out), counts


def test_two_sizes_in_training_and_evaluation_are_six_graphs_without_a_symbol(
    graphs: list[list[Any]], noted: Callable[..., None], train_images: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted()
    parts, counts = grow(graphs, train_images)
    cfg, compute, model, augment, held_out = vars(parts).values()
    # at each size one for training, and two for the evaluation in batches of 40, 40 and 20
    assert counts == [3, 3, 3, 6, 6, 6]
    assert all(type(number) is int for graph in graphs for number in graph)
    assert {32, 40, 20} <= {number for graph in graphs for number in graph}

    torch._dynamo.reset()  # as where the moving average was evaluated so far, which is never compiled
    empty = Split(images=held_out.images[:0], labels=held_out.labels[:0])
    training = SimpleNamespace(model=model, augment=augment, val_split=empty, test_split=held_out)
    patience: list[bool] = []
    run = SimpleNamespace(
        device=compute.device, world_size=1, should_stop=SimpleNamespace(be_patient=lambda: patience.append(True))
    )
    for pays_from, more in ((fmnist.training.eager.PAYS_FROM_S, 0), (0.0, 2)):
        monkeypatch.setattr("fmnist.training.eager.PAYS_FROM_S", pays_from)
        with eager_unless_long(training, cfg, run):  # type: ignore[arg-type]
            predict(model, held_out, augment, cfg.evaluation, compute)
        assert (len(graphs), len(patience)) == (6 + more, more // 2)


def test_as_the_compiler_would_by_itself_the_second_size_is_symbols(
    graphs: list[list[Any]], noted: Callable[..., None], train_images: Split
) -> None:
    noted(dynamic=None)
    grow(graphs, train_images)
    symbolic = [any(type(number) is not int for number in graph) for graph in graphs]
    assert not symbolic[0] and any(symbolic)


PARTS = slice(0, 96), slice(96, 196)
