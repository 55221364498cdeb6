"""Evaluation counts every image once, for any process count and batch size."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss, top_k_accuracy_score

from fmnist.config.schema import AugmentConfig, EvaluationConfig
from fmnist.data.augment import Augment
from fmnist.data.split import Split
from fmnist.evaluation.numbers import summarize
from fmnist.metrics import predict, score, validate
from fmnist.models.cnn import Cnn
from fmnist.runtime.processes import Processes


class Share(Processes):
    """One of several ranks, played alone: the sum over them is left to the test."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(0, 1)
        self.rank, self.world_size = rank, world_size

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def broadcast(self, tensors: object) -> None:
        pass


class Alike(Processes):
    """One of several ranks that all have the same numbers."""

    def __init__(self, world_size: int) -> None:
        super().__init__(0, 1)
        self.world_size = world_size

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.world_size

    def broadcast(self, tensors: object) -> None:
        pass


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 6, 7])
def test_any_number_of_processes_reads_the_same_validation_numbers(
    world_size: int, train_images: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = 5 * F.one_hot(train_images.labels[:500], 10).float()
    logits[0] = logits[0].roll(1)  # 499 of 500 are right: a third of three times that is another number
    monkeypatch.setattr("fmnist.metrics.predict", lambda *_: logits)
    split = Split(images=train_images.images[:500], labels=train_images.labels[:500])
    augment = Augment(AugmentConfig(), num_classes=10, mean=(0.286,), std=(0.353,))
    found = validate(torch.nn.Identity(), split, augment, EvaluationConfig(), Alike(world_size))
    assert found == {name: float(value) for name, value in score(logits, split.labels).items()}
    assert found["top1"] == 499 / 500


@pytest.fixture(scope="module")
def model() -> Cnn:
    torch.manual_seed(0)
    return Cnn(10, widths=(8, 16)).train()


def run_share(model: Cnn, split: Split, rank: int, world_size: int, **kwargs: object) -> torch.Tensor:
    augment = Augment(AugmentConfig(), num_classes=10, mean=(0.286,), std=(0.353,))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    on_device = Split(images=split.images.to(device), labels=split.labels.to(device))
    share = Share(rank, world_size)
    return predict(model.to(device), on_device, augment, EvaluationConfig(**kwargs), share).cpu()


@pytest.mark.parametrize("count", [1, 3, 4, 5, 999])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_shares_add_up_to_the_logits_of_one_process(
    count: int, world_size: int, batch_size: int, model: Cnn, train_images: Split
) -> None:
    if count == 999 and batch_size < 256:
        pytest.skip("hundreds of forwards say no more than 5 do")
    split = Split(images=train_images.images[:count], labels=train_images.labels[:count])
    whole = run_share(model, split, 0, 1, batch_size=max(count, 1))
    summed = torch.stack(
        [run_share(model, split, rank, world_size, batch_size=batch_size) for rank in range(world_size)]
    )
    assert torch.allclose(summed.sum(0), whole, atol=1e-5)
    assert torch.equal(summed.sum(0).argmax(1), whole.argmax(1))  # so the integer confusion matrix is the same
    assert model.training


def test_score_equals_scikit_learn(model: Cnn, train_images: Split) -> None:
    logits = run_share(model, train_images, 0, 1)
    scores = score(logits, train_images.labels)
    probabilities = logits.double().softmax(1)
    assert float(scores["top1"]) == accuracy_score(train_images.labels, probabilities.argmax(1))
    expected = log_loss(train_images.labels, probabilities.numpy(), labels=list(range(10)))
    assert float(scores["loss"]) == pytest.approx(expected, abs=1e-9)


def drawn(num_images: int, num_classes: int, empty: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, a third of them right, and labels of uneven classes, the last `empty` of which have no images."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(num_images, generator=generator) ** 2 * (num_classes - empty)).long()
    logits = torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(0, num_images, 3), labels[::3]] += 3
    return logits, labels


@pytest.mark.parametrize("empty", [0, 1, 5])
@pytest.mark.parametrize("num_classes", [7, 20, 1000])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_macro_f1_balanced_accuracy_and_top5_equal_scikit_learn(num_classes: int, empty: int) -> None:
    logits, labels = drawn(3000, num_classes, empty)
    scores = {name: float(value) for name, value in score(logits, labels).items()}
    predictions, present = logits.argmax(1), labels.unique()
    assert scores["macro_f1"] == pytest.approx(
        f1_score(labels, predictions, labels=present, average="macro", zero_division=0), abs=1e-12
    )
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions), abs=1e-12)
    assert ("top5" in scores) == (num_classes >= 20)
    if "top5" in scores:
        assert scores["top5"] == top_k_accuracy_score(labels, logits, k=5, labels=range(num_classes))
    assert abs(scores["macro_f1"] - scores["top1"]) > 0.001  # uneven classes: else nothing was compared
    evaluated = summarize(logits, labels, [f"class {i}" for i in range(num_classes)])
    assert {name: evaluated[name] for name in scores} == scores
    assert evaluated["macro_avg"]["f1"] == pytest.approx(scores["macro_f1"], abs=1e-12)
    assert evaluated["macro_avg"]["recall"] == pytest.approx(scores["balanced_accuracy"], abs=1e-12)


def test_macro_numbers_by_hand() -> None:
    # Three images of class 0, one of class 1, none of class 2; predicted 0, 0, 2, 1.
    logits = torch.eye(3)[[0, 0, 2, 1]]
    scores = score(logits, torch.tensor([0, 0, 0, 1]))
    # Class 0: recall 2/3, F1 2 * 2 / (3 + 2) = 4/5. Class 1: both 1. Class 2 has none and is left out.
    assert float(scores["balanced_accuracy"]) == pytest.approx((2 / 3 + 1) / 2)
    assert float(scores["macro_f1"]) == pytest.approx((4 / 5 + 1) / 2)
    one = score(torch.zeros(1, 2), torch.tensor([1]))  # nothing right: 0, not 0 / 0
    assert (float(one["macro_f1"]), float(one["balanced_accuracy"])) == (0, 0)


def test_flip_averaging_is_the_mean_probability_of_image_and_mirror(model: Cnn, train_images: Split) -> None:
    split = Split(images=train_images.images[:50], labels=train_images.labels[:50])
    mirrored = Split(images=split.images.flip(-1), labels=split.labels)
    expected = (F.softmax(run_share(model, split, 0, 1), 1) + F.softmax(run_share(model, mirrored, 0, 1), 1)) / 2
    averaged = run_share(model, split, 0, 1, tta="flip")
    assert torch.allclose(averaged.softmax(1), expected, atol=1e-6)


def test_evaluation_may_use_another_size_and_changes_no_statistic(model: Cnn, train_images: Split) -> None:
    split = Split(images=train_images.images[:50], labels=train_images.labels[:50])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    small, large = run_share(model, split, 0, 1, size=28), run_share(model, split, 0, 1, size=40)
    assert not torch.equal(small, large)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
