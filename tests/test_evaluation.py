"""Evaluation: the same integer confusion matrix for every process count and batch size, and scikit-learn's numbers."""

import json
from pathlib import Path

import pytest
import sklearn.metrics
import torch
from conftest import ROOT, environment, metrics
from conftest import warm_train as train
from test_metrics import Share
from torch import Tensor, nn
from warm import run_program

from fmnist.config.schema import AugmentConfig, EvaluationConfig
from fmnist.data.augment import Augment
from fmnist.data.fashion_mnist import CLASS_NAMES, load_split
from fmnist.data.split import Split
from fmnist.evaluation.numbers import summarize
from fmnist.metrics import predict, score
from fmnist.models.cnn import Cnn
from fmnist.models.mlp import Mlp
from fmnist.runtime.files import sha256_of

WORLD_SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def images() -> Split:
    """10,001 real images."""
    pixels, labels = load_split("train", None, 5000)
    return Split(images=pixels[:10_001], labels=labels[:10_001])


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Two untrained models: their logits lie close together, so that a wrong rounding would show."""
    torch.manual_seed(0)
    return {"mlp": Mlp(10, image_size=28), "cnn": Cnn(10, widths=(4, 8))}


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts by hand: int64 [10, 10], rows true, columns predicted."""
    return torch.bincount(labels * 10 + logits.argmax(1), minlength=100).reshape(10, 10)


def evaluate(model: nn.Module, split: Split, world_size: int, batch_size: int) -> Tensor:
    """The sum of the ranks' shares, as an all-reduce makes it."""
    augment = Augment(AugmentConfig(), num_classes=10, mean=(0.286,), std=(0.353,))
    cfg = EvaluationConfig(batch_size=batch_size)
    shares = [predict(model, split, augment, cfg, Share(rank, world_size)) for rank in range(world_size)]
    counted = torch.stack([(share != 0).any(1) for share in shares]).sum(0)
    assert (counted == 1).all()  # each image on one rank
    return torch.stack(shares).sum(0)


def sweep(model: nn.Module, images: Split, counts: list[int], world_size: int, batch_sizes: list[int]) -> None:
    for count in counts:
        split = Split(images=images.images[:count], labels=images.labels[:count])
        expected = confusion(evaluate(model, split, 1, max(1, count)), split.labels)
        for batch_size in sorted({*batch_sizes, max(1, count)}):
            logits = evaluate(model, split, world_size, batch_size)
            found = confusion(logits, split.labels)
            assert torch.equal(found, expected), (count, world_size, batch_size)
            assert int(found.sum()) == count
        if count:
            classes = list(range(10))
            by_sklearn = sklearn.metrics.confusion_matrix(split.labels, logits.argmax(1), labels=classes)
            assert found.tolist() == by_sklearn.tolist()
            summary = summarize(logits, split.labels, CLASS_NAMES)
            assert summary["confusion_matrix"] == found.tolist()
            accuracy = sklearn.metrics.accuracy_score(split.labels, logits.argmax(1))
            assert summary["top1"] == float(score(logits, split.labels)["top1"]) == accuracy


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_few_images_give_one_confusion_matrix(
    name: str, world_size: int, images: Split, models: dict[str, nn.Module]
) -> None:
    few = sorted({1, world_size - 1, world_size, world_size + 1})  # none at all, too, and ranks without an image
    sweep(models[name], images, few, world_size, [1, 7, 256])


@pytest.mark.thorough
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_many_images_give_one_confusion_matrix(world_size: int, images: Split, models: dict[str, nn.Module]) -> None:
    sweep(models["mlp"], images, [9_999, 10_001], world_size, [256])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_every_count_process_count_and_batch_size_give_one_confusion_matrix(
    name: str, world_size: int, images: Split, models: dict[str, nn.Module]
) -> None:
    counts = sorted({1, world_size - 1, world_size, world_size + 1, 9_999, 10_000, 10_001})
    sweep(models[name], images, counts, world_size, [1, 7, 256])


def run_evaluate(run: Path, *more: object, processes: int = 1) -> dict:
    done = run_program(ROOT / "evaluate.py", run, *more, env=environment(), processes=processes)
    assert done.returncode == 0, done.stderr
    split = more[more.index("--split") + 1] if "--split" in more else "test"
    return json.loads((run / "evaluation" / str(split) / "metrics.json").read_text())


@pytest.mark.thorough
def test_what_two_processes_logged_is_what_evaluate_finds_with_one_or_two(tmp_path: Path, small_config: Path) -> None:
    run = tmp_path / "run"
    train("--config", small_config, "--output_dir", run, "--batch.micro_batch_size", 16, processes=2)
    in_training = json.loads((run / "evaluation/test/metrics.json").read_text())
    lines = metrics(run)
    best = max((line for line in lines if line["prefix"] == "val"), key=lambda line: (line["top1"], -line["step"]))
    test_line = next(line for line in lines if line["prefix"] == "test")

    alone = run_evaluate(run, "--batch_size", 333, "--quick")
    assert alone["confusion_matrix"] == in_training["confusion_matrix"]
    assert alone["top1"] == in_training["top1"] == test_line["top1"]
    assert alone["weights_sha256"] == in_training["weights_sha256"] == sha256_of(run / "model.safetensors")
    assert alone["loss"] == pytest.approx(test_line["loss"], abs=1e-6)
    assert alone["num_images"] == test_line["num_images"] == 10_000
    two = run_evaluate(run, "--batch_size", 7777, processes=2)
    assert two["confusion_matrix"] == alone["confusion_matrix"]
    assert two["subsets"]["all"]["top1"] == alone["top1"] and two["retrieval"]["num_queries"] == 10_000
    on_val = run_evaluate(run, "--split", "val", "--quick")
    assert on_val["top1"] == best["top1"]
    assert on_val["loss"] == pytest.approx(best["loss"], abs=1e-6)
    assert on_val["num_images"] == 1000
