"""Classes of different size: weights of the loss, and epochs that draw all classes equally often."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from conftest import warm_train as train
from other_sets import write_npz
from sklearn.utils.class_weight import compute_class_weight
from small import refused

from fmnist.config.schema import AugmentConfig, OptimConfig
from fmnist.data.augment import Augment
from fmnist.data.balance import balanced_order, class_members, class_weights, own_draws
from fmnist.data.batches import Loader, epoch_generator
from fmnist.data.split import Split
from fmnist.models.mlp import Mlp
from fmnist.optim import build_optimizer
from fmnist.runtime.compute import Compute
from fmnist.runtime.exchange import Exchange
from fmnist.runtime.gradients import AllReduce, ShardSum
from fmnist.step import train_step


@pytest.fixture(scope="module")
def uneven(train_images: Split) -> Split:
    """Real images, class 0 whole, class c thinned to a 2^c-th: 193 of class 0 and so on, and none of class 9."""
    kept = [torch.nonzero(train_images.labels == c).flatten()[:: 2**c] for c in range(9)]
    positions = torch.cat(kept)
    return replace(train_images, images=train_images.images[positions], labels=train_images.labels[positions])


# Weights


def test_balanced_weights_are_those_of_scikit_learn(uneven: Split) -> None:
    labels = uneven.labels.numpy()
    weights = class_weights("balanced", uneven.labels, 10)
    expected = compute_class_weight("balanced", classes=np.arange(9), y=labels)
    assert np.allclose(weights[:9].numpy(), expected, rtol=1e-6)
    assert weights[9] == 0 and weights.dtype == torch.float32  # without images
    # 3, 1 and 0 images of three classes: 4 / (2 * 3) and 4 / (2 * 1).
    assert class_weights("balanced", torch.tensor([0, 0, 0, 1]), 3).tolist() == pytest.approx([2 / 3, 2, 0])


def test_weights_without_effect_are_none(train_images: Split) -> None:
    assert class_weights("none", train_images.labels, 10) is None
    assert class_weights("balanced", torch.arange(10).repeat(5), 10) is None
    assert class_weights([2.0] * 10, train_images.labels, 10) is None
    assert class_weights([1.0, 2.0], torch.tensor([0, 1]), 2).tolist() == [1, 2]
    with pytest.raises(ValueError, match="class_weights has 2 numbers, but there are 10 classes; valid: none, balance"):
        class_weights([1.0, 2.0], train_images.labels, 10)


def step_of(compute: Compute, split: Split, micro: int, *, smoothing: float = 0.0, exact: bool = False, **augment):
    """One SGD step of 64 images with balanced weights: its loss, gradients, and the logits and targets it saw."""
    torch.manual_seed(0)
    model = Mlp(10, image_size=28, width=16).to(compute.device)
    split = replace(split, images=split.images.to(compute.device), labels=split.labels.to(compute.device))
    cfg = OptimConfig(name="sgd", lr=1.0, beta1=0.0, weight_decay=0.0, label_smoothing=smoothing)
    weights = class_weights("balanced", split.labels, 10)
    loader = Loader(split, global_batch_size=64, micro_batch_size=micro, seed=0, class_weights=weights)
    maker = Augment(AugmentConfig(flip=0.5, **augment), num_classes=10, mean=(0.286,), std=(0.353,))
    (whole,) = Loader(split, global_batch_size=64, seed=0).micro_batches(2)
    images, targets = maker(whole)
    with torch.no_grad():
        logits = model(images)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = ShardSum(model, compute.accelerator, 64 // micro, lambda rows: rows) if exact else None
    gradients = gradients or AllReduce(model, compute.accelerator)
    metrics = train_step(model, build_optimizer(model, cfg), loader.micro_batches(2), maker, gradients, cfg)
    moved = torch.cat([(before[name] - p.detach()).flatten() for name, p in model.named_parameters()])
    return float(metrics["loss"]), moved, logits, targets, weights, split.labels[whole.indices]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("micro", [64, 16, 1])
def test_the_loss_of_hard_labels_is_torchs_over_the_whole_batch(uneven: Split, micro: int, smoothing: float) -> None:
    loss, _, logits, targets, weights, _ = step_of(Compute(precision="fp32"), uneven, micro, smoothing=smoothing)
    expected = F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert abs(loss - float(F.cross_entropy(logits, targets, label_smoothing=smoothing))) > 0.01


@pytest.mark.parametrize("mix", [{}, {"mixup_alpha": 0.4}, {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}])
def test_the_weighted_gradient_does_not_depend_on_how_the_batch_is_cut(uneven: Split, mix: dict[str, float]) -> None:
    compute = Compute(precision="fp32")
    loss, moved, *_ = step_of(compute, uneven, 64, smoothing=0.1, **mix)
    for micro, exact in ((16, False), (4, False), (16, True)):
        other, other_moved, *_ = step_of(compute, uneven, micro, smoothing=0.1, exact=exact, **mix)
        assert other == pytest.approx(loss, rel=1e-5)
        assert (moved - other_moved).abs().max() < 1e-5


def test_mixed_targets_are_weighted_class_by_class(uneven: Split) -> None:
    loss, _, logits, targets, weights, labels = step_of(Compute(precision="fp32"), uneven, 16, mixup_alpha=0.4)
    assert targets.shape == (64, 10)
    by_hand = -(weights * targets * logits.log_softmax(1)).sum() / weights[labels].sum()
    assert loss == pytest.approx(float(by_hand), rel=1e-5)


# Sampling


def test_a_balanced_epoch_draws_every_class_equally_often(uneven: Split) -> None:
    labels = uneven.labels
    order = balanced_order(class_members(labels), torch.Generator().manual_seed(0))
    counts = torch.bincount(labels[order], minlength=10).tolist()
    share = len(labels) // 9
    assert len(order) == len(labels) and counts[9] == 0
    assert sorted(set(counts[:9])) in ([share], [share, share + 1])
    for label in range(9):  # each image of a class is taken as often as any other, to within once
        taken = Counter(order[labels[order] == label].tolist())
        size = int((labels == label).sum())
        times = [taken[position] for position in torch.nonzero(labels == label).flatten().tolist()]
        assert max(times) - min(times) <= 1 and sum(times) == counts[label], (label, size)


def test_the_balanced_order_is_a_function_of_seed_and_epoch_for_every_process_count(uneven: Split) -> None:
    def drawn(step: int, world: int, seed: int = 0) -> list[int]:
        parts = []
        for rank in range(world):
            loader = Loader(
                uneven, global_batch_size=64, micro_batch_size=16, seed=seed, rank=rank, world_size=world,
                sampling="balanced",
            )  # fmt: skip
            parts += loader.micro_batches(step)
        return torch.cat([part.indices for part in sorted(parts, key=lambda part: part.key)]).tolist()

    assert drawn(7, 1) == drawn(7, 2) == drawn(7, 4)
    assert len({tuple(drawn(step, 1, seed)) for step in (0, 7) for seed in (0, 1)}) == 4
    epoch = [index for step in range(len(uneven) // 64) for index in drawn(step, 1)]
    assert epoch == balanced_order(class_members(uneven.labels), epoch_generator(0, 0, 0))[: len(epoch)].tolist()
    counts = torch.bincount(uneven.labels[epoch], minlength=10)[:9]
    assert counts.max() - counts.min() <= 64  # what the last, incomplete batch would have held


def test_uniform_sampling_keeps_every_bit(train_images: Split) -> None:
    (batch,) = Loader(train_images, global_batch_size=64, seed=3, sampling="uniform").micro_batches(40)
    order = torch.randperm(2000, generator=epoch_generator(3, 1, 0))
    assert batch.indices.tolist() == order[9 * 64 : 10 * 64].tolist()  # step 40 of 31 an epoch
    assert batch.class_weights is None and batch.total_weight is None


def test_balanced_sampling_of_equal_classes_is_uniform(train_images: Split) -> None:
    kept = torch.cat([torch.nonzero(train_images.labels == c).flatten()[:64] for c in range(10)])
    equal = replace(train_images, images=train_images.images[kept], labels=train_images.labels[kept])
    loader = Loader(equal, global_batch_size=64, seed=0, sampling="balanced").cut(16).whole()
    uniform = Loader(equal, global_batch_size=64, micro_batch_size=16, seed=0)
    for one, other in zip(loader.micro_batches(3), uniform.micro_batches(3), strict=True):
        assert torch.equal(one.indices, other.indices)
    assert loader.sampling == "uniform"  # by which `build` says that the option has no effect


def test_the_loader_of_one_process_makes_what_all_make_together(uneven: Split) -> None:
    weights = class_weights("balanced", uneven.labels, 10)
    kinds = {"global_batch_size": 64, "micro_batch_size": 16, "seed": 5, "sampling": "balanced"}
    second = Loader(uneven, rank=1, world_size=2, class_weights=weights, **kinds)
    whole = {part.key: part for part in second.whole().micro_batches(3)}
    for part in second.micro_batches(3):
        assert torch.equal(part.indices, whole[part.key].indices)
        assert torch.equal(part.total_weight, whole[part.key].total_weight)


def test_each_draw_of_an_epoch_has_augmentation_parameters_of_its_own() -> None:
    order = torch.tensor([3, 0, 3, 1, 3, 1])  # 2, 4 and 5 are not drawn
    assert own_draws(order).tolist() == [3, 0, 4, 1, 5, 2]  # by image, then by place: the second 1, two more of 3
    assert own_draws(torch.tensor([2, 0, 1])).tolist() == [2, 0, 1]


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_an_image_that_is_drawn_again_is_augmented_anew(uneven: Split, mixup: float) -> None:
    cfg = AugmentConfig(rotation=20.0, shift=0.1, mixup_alpha=mixup)
    kinds: dict[str, Any] = {"global_batch_size": 64, "seed": 5, "sampling": "balanced", "mixes": mixup > 0}

    def made(step: int, **more: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        augment = Augment(cfg, num_classes=10, mean=(0.286,), std=(0.353,))
        parts = Loader(uneven, **kinds, **more).micro_batches(step)
        images, targets = zip(*map(augment, parts), strict=True)
        return torch.cat([part.indices for part in parts]), torch.cat(images), torch.cat(targets)

    indices, images, targets = made(1)
    values, counts = indices.unique(return_counts=True)
    again = torch.nonzero(indices == values[counts.argmax()]).flatten()
    assert len(again) > 5  # the one image of a class of 1, of 64 drawn
    assert len(images[again].flatten(1).unique(dim=0)) == len(again)
    # the same for any way to cut and bring them
    for more in ({"micro_batch_size": 16}, {"exchange": Exchange()}, {"exchange": Exchange(), "micro_batch_size": 16}):
        other = made(1, **more)
        assert all(torch.equal(*pair) for pair in zip(other, (indices, images, targets), strict=True))


def test_a_graph_of_its_own_memory_takes_all_that_a_batch_chooses(uneven: Split) -> None:
    weights = torch.linspace(1, 2, 10)  # as a list of them: balanced ones are refused beside balanced epochs
    loader = Loader(uneven, global_batch_size=64, seed=5, sampling="balanced", class_weights=weights)
    first, other = (loader.micro_batches(step)[0] for step in (0, 1))
    augment = Augment(AugmentConfig(rotation=20.0), num_classes=10, mean=(0.286,), std=(0.353,))
    table = augment.table(first)
    own = first.standing(table)
    own.take(other)
    for name in ("indices", "partners", "draws", "total_weight"):
        assert torch.equal(getattr(own, name), getattr(other, name)), name
    assert torch.equal(augment(own)[0], augment(other)[0])


# Options


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.class_weights", "[1, 0]"], "optim.class_weights is [1.0, 0.0]; valid range: 1e-06 to 1000000"),
        (["--optim.class_weights", "[1, -2]"], "valid range: 1e-06"),
        (["--optim.class_weights", "[1, .nan]"], "valid range: 1e-06"),
        (["--optim.class_weights", "[]"], "optim.class_weights is []; expected none|balanced|[float, ...]"),
        (["--optim.class_weights", "[1, null]"], "expected none|balanced|[float, ...]"),
        (["--optim.class_weights", "inverse"], "optim.class_weights is 'inverse'; expected none|balanced"),
        (["--optim.class_weights", "2"], "expected none|balanced"),
        (["--data.sampling", "even"], "data.sampling is 'even'; expected uniform|balanced"),
        (["--data.sampling", "balanced", "--optim.class_weights", "balanced"], "count small classes twice over"),
    ],
)
def test_a_wrong_option_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *flags)


@pytest.mark.thorough
def test_a_run_with_weights_and_one_with_balanced_epochs_train_and_resume(tmp_path: Path, small_config: Path) -> None:
    common = ("--config", small_config, "--evaluation.test", "false")
    weights = "[1, 1, 1, 1, 1, 1, 3, 1, 1, 1]"
    for name, flags in (("weights", ["--optim.class_weights", weights]), ("equal", ["--data.sampling", "balanced"])):
        whole, parts = tmp_path / name, tmp_path / f"{name}_parts"
        train(*common, *flags, "--output_dir", whole)
        train(*common, *flags, "--output_dir", parts, "--max_minutes", "0.001")
        train(*common, *flags, "--output_dir", parts, processes=2)
        summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, parts)]
        assert [summary["status"] for summary in summaries] == ["finished"] * 2
    wrong = train(*common, "--optim.class_weights", "[1, 2]", "--output_dir", tmp_path / "wrong", check=False)
    assert wrong.returncode == 2 and "has 2 numbers, but there are 10 classes" in wrong.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("processes", [1, 2])
def test_settings_without_effect_are_said_once_by_all_processes_together(processes: int, tmp_path: Path) -> None:
    npz = write_npz(tmp_path / "even.npz", 10, (64, 64))  # 240 training images, 24 of each class
    done = train(
        *("--config", ROOT / "configs/mlp.yaml", "--data.name", "npz", "--data.root", npz, "--data.val_size", 0),
        *("--batch.global_batch_size", 16, "--batch.micro_batch_size", 8, "--augment.size", 16, "--model.precision"),
        *("fp32", "--augment.saturation", 0.5, "--augment.hue", 0.1, "--augment.flip", 0, "--augment.shift", 0),
        *("--data.sampling", "balanced", "--optim.class_weights", str([2.0] * 10), "--output_dir", tmp_path / "run"),
        *("--dry_run", "true"),
        processes=processes,
    )
    for setting in ("augment.saturation 0.5", "augment.hue 0.1", "data.sampling balanced", "optim.class_weights"):
        assert done.stderr.count(f"{setting} has no effect: ") == 1, done.stderr
    # levels 1 and 2 of the 240 training images, at 32 and 16 px, for an output of 16: 300 KiB
    assert f", pyramid {240 * (32 * 32 + 16 * 16) / 2**20:.1f} MiB; " in done.stdout
