"""The step: accumulation, dropout keyed by the batch, and no host sync in the source."""

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fmnist.config.schema import AugmentConfig, ModelConfig, OptimConfig
from fmnist.data.augment import Augment
from fmnist.data.augment_table import _beta_table
from fmnist.data.batches import Loader, MicroBatch
from fmnist.data.fashion_mnist import MEAN, STD, load_split
from fmnist.data.split import Split
from fmnist.models import build_model
from fmnist.models.cnn import Cnn
from fmnist.models.mlp import Mlp
from fmnist.optim import build_optimizer
from fmnist.runtime.compute import Compute
from fmnist.runtime.gradients import AllReduce
from fmnist.runtime.weight_average import WeightAverage
from fmnist.step import clip, train_step

ROOT = Path(__file__).parent.parent


@pytest.fixture
def compute() -> Compute:
    return Compute(precision="fp32")


def one_step(
    compute: Compute, split: Split, micro: int, drop: float = 0.0, cfg: OptimConfig | None = None, step: int = 3
):
    cfg = cfg or OptimConfig(name="sgd", lr=0.1, beta1=0.0, weight_decay=0.0)
    torch.manual_seed(0)
    model = Mlp(10, drop_rate=drop, image_size=28).to(compute.device)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    split = Split(images=split.images.to(compute.device), labels=split.labels.to(compute.device))
    augment = Augment(
        AugmentConfig(flip=0.5, rotation=10, shift=0.1, mixup_alpha=0.4), num_classes=10, mean=(0.286,), std=(0.353,)
    )
    loader = Loader(split, global_batch_size=64, micro_batch_size=micro, seed=0)
    optimizer = build_optimizer(model, cfg)
    ema = ModelEmaV3(model, decay=0.5) if cfg.ema_decay else None
    gradients = AllReduce(model, compute.accelerator)
    metrics = train_step(model, optimizer, loader.micro_batches(step), augment, gradients, cfg, ema)
    updates = {name: start[name] - p.detach() for name, p in model.named_parameters()}
    return metrics, updates, model, start, ema


def test_accumulation_k_times_b_equals_one_batch_of_kb(compute: Compute, train_images: Split) -> None:
    whole, whole_updates, *_ = one_step(compute, train_images, 64)
    parts, parts_updates, *_ = one_step(compute, train_images, 16)
    assert abs(float(whole["loss"] - parts["loss"])) < 1e-6
    for name, update in whole_updates.items():
        assert (update / 0.1 - parts_updates[name] / 0.1).abs().max() < 1e-6  # the gradient: update / lr


def test_dropout_depends_on_the_batch_and_not_on_what_ran_before(compute: Compute, train_images: Split) -> None:
    first, *_ = one_step(compute, train_images, 64, drop=0.5)
    torch.rand(1234)
    again, *_ = one_step(compute, train_images, 64, drop=0.5)
    other, *_ = one_step(compute, train_images, 64, drop=0.5, step=4)
    assert torch.equal(first["loss"], again["loss"])
    assert not torch.equal(first["loss"], other["loss"])


def test_dropout_masks_differ_from_step_to_step_for_the_same_images(compute: Compute, train_images: Split) -> None:
    torch.manual_seed(0)
    model = Mlp(10, drop_rate=0.5, image_size=28, width=16).to(compute.device)
    split = Split(images=train_images.images.to(compute.device), labels=train_images.labels.to(compute.device))
    augment = Augment(AugmentConfig(), num_classes=10, mean=(0.286,), std=(0.353,))
    cfg = OptimConfig(name="sgd", lr=0.0, beta1=0.0)  # the weights stay: only the masks can change the loss
    optimizer = build_optimizer(model, cfg)
    (batch,) = Loader(split, global_batch_size=64, seed=0).micro_batches(3)
    keys = [(0, 3, 0), (0, 4, 0), (0, 3, 64), (1, 3, 0), (0, 3, 0)]  # seed, step, first sample
    gradients = AllReduce(model, compute.accelerator)
    losses = [
        float(train_step(model, optimizer, [replace(batch, key=key)], augment, gradients, cfg)["loss"]) for key in keys
    ]
    assert len(set(losses)) == 4
    assert losses[0] == losses[-1]


def test_grad_norm_is_before_clipping_and_the_update_after(compute: Compute, train_images: Split) -> None:
    cfg = OptimConfig(name="sgd", lr=1.0, beta1=0.0, weight_decay=0.0, grad_clip_norm=0.01)
    metrics, updates, *_ = one_step(compute, train_images, 64, cfg=cfg)
    assert metrics["grad_norm"] > 0.1
    norm = torch.stack([update.square().sum() for update in updates.values()]).sum().sqrt()
    assert abs(float(norm) - 0.01) < 1e-5  # lr 1: the update is the clipped gradient


def test_the_moving_average_follows_the_weights(compute: Compute, train_images: Split) -> None:
    _, _, model, start, ema = one_step(compute, train_images, 64, cfg=OptimConfig(lr=0.01, ema_decay=0.5))
    for name, average in ema.module.named_parameters():
        expected = (start[name] + dict(model.named_parameters())[name].detach()) / 2  # decay 0.5
        assert torch.allclose(average, expected, atol=1e-7)


def test_the_moving_average_warms_up_by_the_steps_of_the_run_not_of_this_start(
    compute: Compute, train_images: Split
) -> None:
    torch.manual_seed(0)
    model = Mlp(10, image_size=28, width=16).to(compute.device)
    ema = ModelEmaV3(model, decay=0.99, use_warmup=True)
    cfg = OptimConfig(name="sgd", lr=0.1, beta1=0.0, ema_decay=0.99)
    optimizer = build_optimizer(model, cfg)
    split = Split(images=train_images.images.to(compute.device), labels=train_images.labels.to(compute.device))
    augment = Augment(AugmentConfig(), num_classes=10, mean=(0.286,), std=(0.353,))
    before = model.head.weight.detach().clone()
    (batch,) = Loader(split, global_batch_size=64, seed=0).micro_batches(9)
    train_step(model, optimizer, [batch], augment, AllReduce(model, compute.accelerator), cfg, ema)
    # timm's warm-up at step 9: decay 1 - (1 + (9 - 1)) ** (-2 / 3) = 0.7689; a start that counts anew has 0.
    expected = 0.768880 * before + 0.231120 * model.head.weight.detach()
    assert torch.allclose(ema.module.head.weight, expected, atol=1e-6)
    assert not torch.allclose(ema.module.head.weight, model.head.weight, atol=1e-5)


def test_the_average_has_timms_bits_and_follows_weights_that_are_loaded() -> None:
    torch.manual_seed(0)
    model = Cnn(10, widths=(4, 8))  # with BatchNorm: statistics are averaged, counts copied
    kinds = [kind(model, decay=0.9, use_warmup=True) for kind in (WeightAverage, ModelEmaV3)]
    for step in range(6):
        if step == 4:
            model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
        model(torch.randn(8, 1, 28, 28))
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        for average in kinds:
            average.update(model, step=step)
    one, other = (average.module.state_dict() for average in kinds)
    assert all(torch.equal(one[name], other[name]) for name in other) and one.keys() == other.keys()
    with patch("torch._foreach_lerp_") as lerp, patch("torch._foreach_copy_") as copy:
        kinds[0].update(model, step=6)
    assert (lerp.call_count, copy.call_count) == (1, 1)  # whatever the number of tensors
    counts = [t for name, t in one.items() if name.endswith("num_batches_tracked")]
    assert counts and all(count == 6 + 1 for count in counts)  # six forwards, and the one that was loaded on top


def test_the_average_moves_a_tensor_of_several_names_once() -> None:
    model = nn.Module()
    model.first = model.second = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.first.weight)
    average = WeightAverage(model, decay=0.9)
    nn.init.ones_(model.first.weight)
    average.update(model)
    assert float(average.module.second.weight) == pytest.approx(0.1)  # 0.9 * 0 + 0.1 * 1; twice it would be 0.19


def test_gradients_that_are_not_clipped_are_not_touched() -> None:
    optimizer = build_optimizer(Mlp(2, image_size=2, width=8), OptimConfig())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters[1:]:
        p.grad = torch.full_like(p, float("inf"))
    assert clip(optimizer, None) == float("inf")
    assert all(p.grad.isinf().all() for p in parameters[1:])  # times one of an infinite norm they would be NaN
    for p in parameters[1:]:
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in parameters[1:])
    assert float(clip(optimizer, None)) == pytest.approx(math.sqrt(count)) == float(clip(optimizer, 1e6))


def test_label_smoothing_spreads_its_mass_evenly(compute: Compute, train_images: Split) -> None:
    plain = OptimConfig(name="sgd", lr=0.1, beta1=0.0, weight_decay=0.0)
    losses = [
        float(one_step(compute, train_images, 64, cfg=replace(plain, label_smoothing=mass))[0]["loss"])
        for mass in (0.0, 0.5, 0.9)
    ]
    # The loss is (1 - s) * own + s * even, linear in s: at 0.9 it lies 0.9 / 0.5 as far from the plain one as at 0.5.
    assert abs(losses[1] - losses[0]) > 1e-3
    assert (losses[2] - losses[0]) / (losses[1] - losses[0]) == pytest.approx(1.8, abs=1e-2)


@pytest.mark.parametrize(
    "file",
    [
        "step",
        "runtime/gradients",
        "data/augment",
        "data/augment_table",
        "data/augment_torch",
        "data/augment_triton",
        "data/batches",
        "data/colour",
        "data/pyramid",
        "data/whole_pixels",
    ],
)
def test_the_source_never_waits_for_the_device(file: str) -> None:
    tree = ast.parse((ROOT / f"fmnist/{file}.py").read_text())
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls}
    assert not names & {"item", "tolist", "cpu", "numpy", "nonzero", "print", "synchronize"} - {"numpy"}
    # The one numpy() is of a table made on the host before anything runs.
    assert "numpy" not in names or file == "data/augment_table"


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_step_reads_nothing_from_the_device(compute: Compute, train_images: Split, name: str) -> None:
    """Its tensors have no numbers: whatever asks for one raises."""
    loader = Loader(train_images, global_batch_size=32, micro_batch_size=16, seed=0)
    cfg = AugmentConfig(size={0: 20, 1: 28}, flip=0.5, rotation=10, erase=0.5, mixup_alpha=0.4, cutmix_alpha=1.0)
    augment = Augment(cfg, num_classes=10, mean=(MEAN,), std=(STD,))
    optim = OptimConfig(name=name, ema_decay=0.9, grad_clip_norm=1.0, label_smoothing=0.1)
    after = loader.steps_per_epoch
    real = {step: loader.micro_batches(step) for step in (0, after - 1, after)}
    model = Cnn(10, widths=[8, 16], drop_rate=0.2)
    ema = WeightAverage(model, decay=0.9, use_warmup=True)
    quantiles = _beta_table(0.4, torch.device("cpu"))  # made once for a device, on the host

    def own(tensors: dict[str, Any]) -> list[tuple[str, Any]]:
        return [(key, tensor) for key, tensor in tensors.items() if tensor is not None]

    with FakeTensorMode() as fake, patch("fmnist.data.augment_table._beta_table") as beta_table:
        beta_table.return_value = fake.from_tensor(quantiles)

        def without_numbers(batch: MicroBatch) -> MicroBatch:
            split = Split(images=fake.from_tensor(batch.split.images), labels=fake.from_tensor(batch.split.labels))
            tensors = {key: fake.from_tensor(getattr(batch, key)) for key in ("indices", "partners", "uniforms")}
            return replace(batch, split=split, **tensors)

        for module in (*model.modules(), *ema.modules()):
            module._parameters |= {key: nn.Parameter(torch.empty(p.shape)) for key, p in own(module._parameters)}
            module._buffers |= {key: torch.empty(each.shape, dtype=each.dtype) for key, each in own(module._buffers)}
        optimizer, gradients = build_optimizer(model, optim), AllReduce(model, compute.accelerator)
        for batches in real.values():
            micro_batches = [without_numbers(batch) for batch in batches]
            metrics = train_step(model, optimizer, micro_batches, augment, gradients, optim, ema)
        for number in metrics.values():
            assert number.shape == () and number.dtype == torch.float32
            with pytest.raises(DataDependentOutputException):
                float(number)


@pytest.mark.slow
def test_ten_real_steps_of_convnext_tiny_at_224_px(compute: Compute) -> None:
    """Ten updates on one batch of eight real images: enough to learn it by heart."""
    images, labels = load_split("train", None, 5000)
    split = Split(images=images[:8].to(compute.device), labels=labels[:8].to(compute.device))
    cfg = ModelConfig(name="convnext_tiny")
    torch.manual_seed(0)
    model, normalization = build_model(cfg, num_classes=10, mean=(MEAN,), std=(STD,), image_size=224)
    model = model.to(compute.device)
    augment = Augment(AugmentConfig(size=224), num_classes=10, mean=normalization.mean, std=normalization.std)
    loader = Loader(split, global_batch_size=8, micro_batch_size=4, seed=0)
    optim = OptimConfig(lr=3e-4, grad_clip_norm=1.0)
    optimizer = build_optimizer(model, optim)
    gradients = AllReduce(model, compute.accelerator)
    losses = [
        float(train_step(model, optimizer, loader.micro_batches(step), augment, gradients, optim)["loss"])
        for step in range(10)
    ]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] > 2.0  # ten classes, nothing learnt: ln 10 = 2.30
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_step_runs_without_a_host_sync(train_images: Split, name: str) -> None:
    """Neither within an epoch nor where the next one begins."""
    with Compute(precision="bf16") as compute:
        model, _ = build_model(
            ModelConfig(name=name, drop_rate=0.1), num_classes=10, mean=(MEAN,), std=(STD,), image_size=28
        )
        model = model.to(compute.device, memory_format=torch.channels_last)
        split = Split(images=train_images.images.to(compute.device), labels=train_images.labels.to(compute.device))
        cfg = AugmentConfig(flip=0.5, rotation=10, shift=0.1, mixup_alpha=0.4)
        augment = Augment(cfg, num_classes=10, mean=(MEAN,), std=(STD,), dtype=torch.bfloat16, device=compute.device)
        loader = Loader(split, global_batch_size=64, micro_batch_size=32, seed=0)
        optim = OptimConfig(ema_decay=0.9, grad_clip_norm=1.0)
        optimizer, ema = build_optimizer(model, optim), WeightAverage(model, decay=0.9)
        wrapped, gradients = compute.prepare(model)
        for step in range(loader.steps_per_epoch - 3, loader.steps_per_epoch + 2):
            if step >= loader.steps_per_epoch - 1:  # kernels and the optimizer's state have been made
                torch.cuda.set_sync_debug_mode("error")
            try:
                batches = loader.micro_batches(step)
                metrics = train_step(wrapped, optimizer, batches, augment, gradients, optim, ema)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert metrics["loss"].isfinite()
