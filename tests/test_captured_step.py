"""The step as a CUDA graph: the same bits as without, and a step without where none can be recorded."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fmnist.config.same_run import recipe
from fmnist.config.schema import AugmentConfig, BatchConfig, Config, ModelConfig, OptimConfig, ScheduleConfig
from fmnist.data.batches import Loader
from fmnist.data.fashion_mnist import INFO
from fmnist.data.split import Split
from fmnist.network import build_network
from fmnist.optim import Schedule, build_optimizer, set_lr
from fmnist.runtime.captured_step import WARM_UP, CapturedStep
from fmnist.runtime.compute import Compute
from fmnist.runtime.cuda_graph import Metrics, record_cuda_graph
from fmnist.runtime.weight_average import WeightAverage
from fmnist.step import train_step

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CNN = ModelConfig(name="cnn", options={"widths": [4, 8]}, precision="fp32", drop_rate=0.3)
MLP = ModelConfig(name="mlp", options={"width": 16}, precision="fp32", drop_rate=0.3)
CONVNEXT = ModelConfig(
    name="convnext_atto",
    options={"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "patch_size": 2},
    precision="fp32",
    drop_path_rate=0.3,
)
GROWS = AugmentConfig(size={0: 20, 2: 28}, rotation=10)
MIXES = AugmentConfig(size=28, shift=0.1, mixup_alpha=0.4, cutmix_alpha=1.0, flip_in_turn=True)
CASES = {
    "dropout and a new size": Config(model=CNN, augment=GROWS),
    "mixing, flips in turn, an average": Config(model=MLP, augment=MIXES, optim=OptimConfig(ema_decay=0.9)),
    "drop path, clipping, layer decay": Config(
        model=CONVNEXT,
        augment=replace(GROWS, size={0: 32, 2: 40}),
        optim=OptimConfig(grad_clip_norm=0.1, layer_decay=0.7, ema_decay=0.9),
    ),
    "SGD with class weights": Config(model=CNN, augment=GROWS, optim=OptimConfig(name="sgd", class_weights="balanced")),
    "Muon, the head alone first": Config(
        model=CNN, augment=GROWS, optim=OptimConfig(name="muon", head_only_epochs=1, ema_decay=0.9)
    ),
    "micro-batches": Config(
        model=replace(CNN, drop_rate=0.0), augment=GROWS, batch=BatchConfig(global_batch_size=32, micro_batch_size=8)
    ),
}
EPOCHS, IMAGES, STEPS = 4, 32 * 4, 16  # 8 steps of each size


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Let the next test compute in another precision."""
    yield
    for compute in OPENED:
        compute.close()
    OPENED.clear()


OPENED: list[Compute] = []


class Training:
    """A small run: what train.py does in a step, and what is left at the end."""

    def __init__(self, cfg: Config, images: Split, device: str = "cpu") -> None:
        self.cfg = replace(cfg, batch=replace(cfg.batch, global_batch_size=32), schedule=ScheduleConfig(epochs=EPOCHS))
        self.compute = Compute(precision=cfg.model.precision, device=device)
        OPENED.append(self.compute)
        device_ = self.compute.device
        split = Split(images=images.images[:IMAGES].to(device_), labels=images.labels[:IMAGES].to(device_))
        self.model, self.augment = build_network(self.cfg, INFO, device_, load_weights=False)
        self.optimizer = build_optimizer(self.model, cfg.optim)
        decay = cfg.optim.ema_decay
        self.ema = WeightAverage(self.model, decay=decay, use_warmup=True) if decay else None
        weights = torch.linspace(0.5, 1.5, 10, device=device_) if cfg.optim.class_weights != "none" else None
        self.loader = Loader(
            split,
            global_batch_size=32,
            micro_batch_size=cfg.batch.micro_batch_size,
            seed=0,
            class_weights=weights,
            mixes=cfg.augment.mixes,
        )
        self.schedule = Schedule.from_config(self.cfg, self.loader.steps_per_epoch)
        self.wrapped, self.gradients = self.compute.prepare(self.model)
        self.wrapped.train()

    def run(self, update: Callable[..., Metrics], steps: range | None = None) -> list[Tensor]:
        """Return the loss and the gradient norm of each step, as they are at the end."""
        found = []
        for step in steps or range(self.schedule.total_steps):
            set_lr(self.optimizer, self.schedule, step)
            batches = self.loader.micro_batches(step)
            metrics = update(
                self.wrapped, self.optimizer, batches, self.augment, self.gradients, self.cfg.optim, self.ema
            )
            found += [metrics["loss"], metrics["grad_norm"]]
        return found

    def tensors(self) -> list[Tensor]:
        """Return weights, buffers, moments and the average."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        average = self.ema.module.state_dict().values() if self.ema else ()
        return [*self.model.state_dict().values(), *moments, *average]


class Played:
    """Record without a GPU: a replay calls the function again, and writes into the memory of the first call."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.recorded, self.replayed = model, 0, 0

    def __call__(self, action: Callable[[], Metrics]) -> tuple[Callable[[], None], Metrics]:
        parameters = list(self.model.parameters())
        before = {name: t.clone() for name, t in self.model.state_dict().items()}
        metrics = action()  # makes the memory; nothing of it counts
        self.model.load_state_dict(before)
        gradients = [p.grad for p in parameters]
        for out in (*metrics.values(), *(g for g in gradients if g is not None)):
            out.fill_(float("nan"))
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for p, gradient in zip(parameters, gradients, strict=True):
                assert p.grad is gradient, "the update reads other memory than the graph writes"
                p.grad = None
            with patch("fmnist.step.seed_generators"):  # the seed is the host's, set before
                again = action()
            for p, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    gradient.copy_(p.grad)
                p.grad = gradient
            for name, out in metrics.items():
                out.copy_(again[name])

        return replay, metrics


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_have_the_bits_of_plain_ones(case: str, train_images: Split) -> None:
    plain, captured = (Training(CASES[case], train_images) for _ in range(2))
    recorder = Played(captured.model)
    expected, found = plain.run(train_step), captured.run(CapturedStep(train_step, recorder))
    assert_equal(plain.tensors(), captured.tensors())
    assert_equal(expected, found)  # of each step: none is memory that a later one writes
    sizes = len(plain.augment.sizes)
    assert (recorder.recorded, recorder.replayed) == (sizes, STEPS - WARM_UP * sizes)


def test_a_run_that_is_resumed_ends_with_the_same_bits(train_images: Split) -> None:
    """A resumed run takes the first steps after its checkpoint as they are, where the unbroken one replays."""
    plain, captured = (Training(CASES["drop path, clipping, layer decay"], train_images) for _ in range(2))
    expected = plain.run(train_step)
    found = captured.run(CapturedStep(train_step, Played(captured.model)), range(6))
    captured.optimizer.zero_grad(set_to_none=True)
    found += captured.run(CapturedStep(train_step, Played(captured.model)), range(6, STEPS))
    assert_equal(plain.tensors(), captured.tensors())
    assert_equal(expected, found)


def test_gradients_that_are_cleared_between_steps_cost_no_update(train_images: Split) -> None:
    """A zero_grad in an evaluation, say: it did no harm to plain steps, and the replayed ones would train nothing."""
    plain, captured = (Training(CASES["mixing, flips in turn, an average"], train_images) for _ in range(2))
    update = CapturedStep(train_step, Played(captured.model))
    expected, found = [], []
    for step in range(STEPS):
        expected += plain.run(train_step, range(step, step + 1))
        found += captured.run(update, range(step, step + 1))
        captured.model.zero_grad(set_to_none=True)
    assert update.recorded is not None
    assert_equal(plain.tensors(), captured.tensors())
    assert_equal(expected, found)


def refuses(case: Config, images: Split, caplog: pytest.LogCaptureFixture, change: Callable[[Training], Any]) -> str:
    """Train with a change that leaves no graph, see the bits of plain steps, and return the one line that says why."""
    plain, captured = (Training(case, images) for _ in range(2))
    for training in (plain, captured):
        recorder = change(training)
    update = CapturedStep(train_step, recorder)
    assert_equal(plain.run(train_step), captured.run(update))
    assert_equal(plain.tensors(), captured.tensors())
    assert update.recorded is None
    (line,) = [record.message for record in caplog.records if "without a graph" in record.message]
    return line


def test_micro_batches_with_dropout_are_not_recorded(train_images: Split, caplog: pytest.LogCaptureFixture) -> None:
    case = Config(model=MLP, augment=AugmentConfig(), batch=BatchConfig(global_batch_size=32, micro_batch_size=8))
    assert "anew for each micro-batch" in refuses(case, train_images, caplog, lambda training: Played(training.model))


def test_a_model_that_draws_on_the_host_is_not_recorded(train_images: Split, caplog: pytest.LogCaptureFixture) -> None:
    def change(training: Training) -> Any:
        own = random.Random(1)  # the same for both; what is watched is the module's own state
        training.model.head.register_forward_pre_hook(
            lambda _, inputs: (inputs[0] * (own.random() < 0.5 + 0 * random.random()),)
        )
        return Played(training.model)

    assert "on the host" in refuses(Config(model=MLP, augment=AugmentConfig()), train_images, caplog, change)


class Schedules(nn.Module):
    """A network of one's own that changes from step to step what no graph would change."""

    def __init__(self, inner: nn.Module, what: str) -> None:
        super().__init__()
        self.inner, self.what, self.steps, self.last = inner, what, 0, torch.zeros(())
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("in_place", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.what == "counts":
            self.steps += 1
        elif self.what == "puts new buffers":
            self.scale = self.scale * 0.5 + 0.5
        elif self.what == "draws by NumPy":
            np.random.rand()  # noqa: NPY002 - what such a model would call
        self.in_place.mul_(0.9)
        self.last = logits = self.inner(images) * self.scale / (1 + self.steps)  # an output that is kept is no state
        return logits


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("counts", "counts its steps on the host"),
        ("puts new buffers", "new tensors in place of its buffers"),
        ("draws by NumPy", "draws random numbers on the host"),
    ],
)
def test_a_model_that_changes_on_the_host_is_not_recorded(
    what: str, said: str, train_images: Split, caplog: pytest.LogCaptureFixture
) -> None:
    def change(training: Training) -> Any:
        training.wrapped = Schedules(training.wrapped, what)
        return Played(training.model)

    assert said in refuses(Config(model=MLP, augment=AugmentConfig()), train_images, caplog, change)


def test_state_in_place_and_kept_outputs_are_recorded(train_images: Split) -> None:
    training = Training(Config(model=MLP, augment=AugmentConfig()), train_images)
    training.wrapped = Schedules(training.wrapped, "nothing")
    update = CapturedStep(train_step, Played(training.model))
    training.run(update)
    assert update.recorded is not None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_recording_that_breaks_leaves_the_stream_where_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own context does not, where CUDA cannot end the recording: all later steps would run in its stream."""
    now, states = ["default"], []

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        now[0] = "of the recording"
        yield
        now[0] = "default"

    generator = SimpleNamespace(graphsafe_set_state=states.append)
    cuda = SimpleNamespace(
        graph=graph,
        CUDAGraph=lambda: SimpleNamespace(replay="replay"),
        current_stream=lambda: now[0],
        set_stream=lambda stream: now.__setitem__(0, stream),
        current_device=lambda: 0,
        default_generators=[generator],
    )
    monkeypatch.setattr("fmnist.runtime.cuda_graph.torch", SimpleNamespace(cuda=cuda, device=Mock(), Generator=Mock()))

    def breaks() -> Metrics:
        raise error

    assert record_cuda_graph(dict)[1] == {} and not states
    with pytest.raises(error):
        record_cuda_graph(breaks)
    assert now == ["default"] and len(states) == 1


def test_a_recording_that_fails_costs_one_line(train_images: Split, caplog: pytest.LogCaptureFixture) -> None:
    def fails(training: Training) -> Any:
        def record(action: Callable[[], Metrics]) -> Any:
            before = {name: t.clone() for name, t in training.model.state_dict().items()}
            action()  # half of it may have been recorded: gradients in memory that nobody fills
            training.model.load_state_dict(before)
            for p in training.model.parameters():
                p.grad = torch.full_like(p, float("nan"))
            raise RuntimeError("CUDA out of memory.\nTried to allocate 1 TiB")

        return record

    line = refuses(CASES["drop path, clipping, layer decay"], train_images, caplog, fails)
    assert line.endswith("CUDA out of memory. Tried to allocate 1 TiB")


def test_images_that_are_staged_are_not_recorded() -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("nothing may be recorded")

    update = CapturedStep(lambda *arguments: {"loss": len(arguments)}, fail)  # type: ignore[dict-item]
    batch = SimpleNamespace(pixels=lambda: None)
    assert [update(None, None, [batch], None, None, None) for _ in range(6)] == [{"loss": 7}] * 6  # type: ignore[arg-type]


def test_graphs_may_come_and_go_between_two_starts_of_a_run() -> None:
    assert not [key for key in recipe(Config()) if "graph" in key]


def test_only_one_process_on_a_cuda_device_captures() -> None:
    compute = Compute(precision="fp32", device="cpu")
    assert compute.captured(train_step, "auto") is train_step
    compute.device = torch.device("cuda")
    assert isinstance(compute.captured(train_step, "auto"), CapturedStep)
    assert compute.captured(train_step, "never") is train_step
    compute.world_size = 2
    assert compute.captured(train_step, "auto") is train_step
    compute.world_size, compute.shards = 1, 2
    assert compute.captured(train_step, "auto") is train_step


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_graph_on_a_gpu_has_the_bits_of_plain_steps(case: str, precision: Any, train_images: Split) -> None:
    cfg = replace(CASES[case], model=replace(CASES[case].model, precision=precision))
    plain, captured = (Training(cfg, train_images, "cuda") for _ in range(2))
    update = CapturedStep(train_step, record_cuda_graph)
    expected, found = plain.run(train_step), captured.run(update)
    assert update.recorded is not None
    assert_equal(plain.tensors(), captured.tensors())
    assert_equal(expected, found)


@pytest.mark.gpu
@needs_cuda
def test_a_resumed_start_on_a_gpu_has_the_same_bits(train_images: Split) -> None:
    case = CASES["drop path, clipping, layer decay"]
    plain, captured = (Training(case, train_images, "cuda") for _ in range(2))
    expected = plain.run(train_step)
    found = captured.run(CapturedStep(train_step, record_cuda_graph), range(6))
    captured.optimizer.zero_grad(set_to_none=True)
    found += captured.run(CapturedStep(train_step, record_cuda_graph), range(6, STEPS))
    assert_equal(plain.tensors(), captured.tensors())
    assert_equal(expected, found)


@pytest.mark.gpu
@needs_cuda
def test_a_replayed_step_does_not_wait_for_the_device(train_images: Split) -> None:
    training = Training(CASES["mixing, flips in turn, an average"], train_images, "cuda")
    update = CapturedStep(train_step, record_cuda_graph)
    training.run(update, range(6))
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.run(update, range(6, STEPS))  # two new epochs among them
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert update.recorded is not None


class Waits(nn.Module):
    """A network that asks the device for a number, and one that draws on the host."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, images: Tensor) -> Tensor:
        if self.how == "waits" and images.sum().item() > 1e30:
            images = images * 0
        if self.how == "draws":
            images = images * float(torch.rand(()))
        return self.inner(images)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("how", "watched"), [("waits", True), ("waits", False), ("draws", True), ("large", True)])
def test_a_model_that_cannot_be_recorded_trains_without_a_graph(
    how: str, watched: bool, train_images: Split, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, captured = (Training(CASES["dropout and a new size"], train_images, "cuda") for _ in range(2))
    for training in (plain, captured):
        training.wrapped = Waits(training.wrapped, how)
    update = CapturedStep(train_step, record_cuda_graph)
    if how == "large":
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, 2**30))
    if not watched:  # then the recording itself breaks
        monkeypatch.setattr("fmnist.runtime.captured_step.watched", lambda *_: nullcontext([]))
    expected, found = plain.run(train_step), captured.run(update)
    assert_equal(plain.tensors(), captured.tensors())
    assert_equal(expected, found)
    assert len([r for r in caplog.records if "without a graph" in r.message]) == 1
