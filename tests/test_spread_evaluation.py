"""Evaluations whose processes share the work: what one process finds, to the bit, and no device holds all images."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from other_sets import untrained_on, write_npz
from PIL import Image
from torch import Tensor
from warm import run_program

import fmnist
from fmnist.data.info import SplitName
from fmnist.data.split import Split
from fmnist.evaluation import features, near_copies, neighbours
from fmnist.evaluation.exact_copies import exact_copies
from fmnist.evaluation.features import features_of, kept_features
from fmnist.evaluation.near_copies import correlations, find_near_copies
from fmnist.evaluation.neighbours import Neighbours
from fmnist.evaluation.outcome import Request, evaluate
from fmnist.evaluation.retrieval import _pixels, measure_precision, retrieval_key
from fmnist.runtime.compute import Compute
from fmnist.runtime.processes import Processes
from fmnist.trained import Trained, open_trained

T = TypeVar("T")
CPU = torch.device("cpu")


class Threads(Processes):
    """A rank that is a thread: it meets the others where they gather."""

    def __init__(self, rank: int, world_size: int, met: threading.Barrier, sent: dict[int, Any]) -> None:
        super().__init__(0, 1)
        self.rank, self.world_size, self.met, self.sent = rank, world_size, met, sent

    def gather(self, value: T) -> list[T]:
        self.sent[self.rank] = value
        self.met.wait()
        values = [self.sent[rank] for rank in range(self.world_size)]
        self.met.wait()
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        return torch.cat(self.gather(rows))

    def on_main(self, action: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
        result = None if self.rank else action(*args, **kwargs)
        self.gather(None)
        return result


def on_ranks(world_size: int, work: Callable[[Processes], T]) -> list[T]:
    """Do something on so many ranks, and return what each found."""
    met, sent = threading.Barrier(world_size, timeout=60), dict[int, Any]()
    ranks = [Threads(rank, world_size, met, sent) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, ranks))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return untrained_on(write_npz(folder / "set.npz", 6, (9, 9, 3)), folder / "run")


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_exact_copies_by_shares(train_images: Split, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    monkeypatch.setattr("fmnist.evaluation.exact_copies.CHUNK", 64)  # 16 chunks of 1,000 images, 2 of 70, 1 of 50
    images, labels = train_images.tensors
    test = torch.cat((images[[5, 999, 64, 63]], images[1200:1246])), torch.cat((labels[[5, 999]], labels[1200:1248]))
    val = torch.cat((images[[128]], images[1300:1369])), labels[1300:1370]
    splits: dict[SplitName, Split] = {
        "train": replace(train_images, images=images[:1000], labels=labels[:1000]),
        "val": Split(images=val[0], labels=val[1]),
        "test": Split(images=test[0], labels=test[1]),
    }
    expected = exact_copies(splits)
    by_hand = {("val", "train"): ((0,), (128,)), ("test", "train"): ((0, 1, 2, 3), (5, 999, 64, 63))}
    found = {(pair.split, pair.other): (pair.indices, pair.partners) for pair in expected}
    assert {key: found[key] for key in by_hand} == by_hand
    assert on_ranks(world_size, lambda rank: exact_copies(splits, rank)) == [expected] * world_size


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_near_copies_by_shares(train_images: Split, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    images, training = train_images.images[:300], train_images.images[300:]
    training = torch.cat((training, training[:200]))  # ties: the one that comes first is the partner
    whole = find_near_copies(images, training, 0.9)
    assert len(whole.indices) > 100
    monkeypatch.setattr(near_copies, "REFERENCES", 128)  # 15 parts
    monkeypatch.setattr(near_copies, "CHUNK", 100)
    for found in on_ranks(world_size, lambda rank: find_near_copies(images, training, 0.9, processes=rank)):
        assert torch.equal(found.indices, whole.indices) and torch.equal(found.partners, whole.partners)
        assert torch.equal(found.correlations, whole.correlations)
    assert (whole.partners < 1700).all()


def test_no_near_copies_where_there_is_nothing(train_images: Split) -> None:
    for images, training in (
        (train_images.images[:0], train_images.images),
        (train_images.images, train_images.images[:0]),
    ):
        for found in on_ranks(2, lambda rank: find_near_copies(images, training, processes=rank)):  # noqa: B023
            assert len(found.indices) == 0 and found.num_images == len(images)


def test_correlations_are_numpy_s_in_whatever_batch(train_images: Split) -> None:
    one, other = train_images.images[:500], train_images.images[500:1000]
    same = torch.arange(500)[:, None].expand(-1, 2)  # each with the other's at its own place
    found = correlations(one, other, same)
    expected = [
        np.corrcoef(*pair)[0, 1] for pair in zip(one.flatten(1).double(), other.flatten(1).double(), strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(found, torch.cat([correlations(one, other, pair) for pair in same.split(1)]))
    assert len(correlations(one, other, same[:0])) == 0
    large = torch.randint(0, 256, (2, 3, 600, 600), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert correlations(large, large, same[:2]).tolist() == pytest.approx([1, 1], abs=1e-12)  # no sum overflows
    assert correlations(large, large // 255 * 0, same[:2]).tolist() == [0, 0]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_features_by_shares_are_kept_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr(features, "CHUNK", 50)  # 240 images: 5 parts

    def opened(name: str) -> Trained:  # each rank its own
        return replace(open_trained(run, "cpu", batch_size=20), directory=tmp_path / name)

    images, alone = opened("alone").split("train").images, opened("alone")
    (expected,) = on_ranks(1, lambda _: features_of(alone, "train", images))
    computed: list[int] = []
    compute = features.compute_features

    def counted(one: Any, part: Tensor) -> Any:
        computed.append(len(part))
        return compute(one, part)

    monkeypatch.setattr(features, "compute_features", counted)
    for _ in range(2):  # the second time they are read, by the main process alone
        for found in on_ranks(world_size, lambda rank: features_of(opened("shared"), "train", images, rank)):
            assert torch.equal(found.features, expected.features) and torch.equal(found.logits, expected.logits)
    assert sum(computed) == 240 and max(computed) <= 150
    kept = kept_features(alone, "train", images), kept_features(opened("shared"), "train", images)
    assert kept[0] is not None and kept[1] is not None
    assert torch.equal(kept[0].features, kept[1].features) and torch.equal(kept[0].logits, kept[1].logits)


def test_a_folder_of_features_that_is_refused_is_so_on_all_processes(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/features").symlink_to(tmp_path)

    def refused(rank: Processes) -> str:
        trained = replace(open_trained(run, "cpu"), directory=tmp_path / "run")
        with pytest.raises(ValueError, match="is a link out of the run directory") as caught:
            measure_precision(trained, processes=rank)
        return str(caught.value)

    assert len({*on_ranks(2, refused)}) == 1


def test_precision_reads_each_split_once(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained, reads = replace(open_trained(run, "cpu"), directory=tmp_path), list[str]()
    split = Trained.split
    monkeypatch.setattr(Trained, "split", lambda self, name, root=None: reads.append(name) or split(self, name, root))
    found = measure_precision(trained)
    assert reads == ["train", "test"]
    assert retrieval_key(trained, None).items() <= found.items()


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_neighbours_by_shares(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    monkeypatch.setattr(neighbours, "ITEMS_AT_ONCE", 64)
    monkeypatch.setattr(neighbours, "QUERIES_AT_ONCE", 50)
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(300, 24, generator=generator)  # 5 parts
    items[200:220] = items[7]  # equal ones in several shares
    queries, itself = items[:120], torch.arange(120)
    itself[::2] = -1
    for k in (1, 5, 70, 299):
        expected = Neighbours(items, CPU)(queries, k, itself)
        for found in on_ranks(world_size, lambda rank: Neighbours(items, CPU, rank)(queries, k, itself)):  # noqa: B023
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    large = torch.randint(0, 256, (70, 60, 60), dtype=torch.uint8, generator=generator)  # 2 parts, averaged over areas
    expected = Neighbours(_pixels(large), CPU)(_pixels(large[:9]), 3)
    for found in on_ranks(world_size, lambda rank: Neighbours(large, CPU, rank, _pixels)(_pixels(large[:9]), 3)):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    held = on_ranks(world_size, lambda rank: len(Neighbours(items, CPU, rank)._unit))
    assert sum(held) == 300 and max(held) <= 64 * -(-5 // world_size)
    with pytest.raises(ValueError, match="k is 301; valid range: 1 to 300"):
        Neighbours(items, CPU)(queries, 301)


def test_precision_by_shares(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(neighbours, "ITEMS_AT_ONCE", 50)

    def opened(name: str) -> Trained:
        return replace(open_trained(run, "cpu"), directory=tmp_path / name)

    (expected,) = on_ranks(1, lambda _: measure_precision(opened("alone")))
    assert on_ranks(3, lambda rank: measure_precision(opened("shared"), processes=rank)) == [expected] * 3


def test_an_evaluation_brings_one_batch_at_a_time_to_the_device(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = open_trained(run, "cpu", batch_size=32)
    brought: list[int] = []
    between = Split.between

    def noted(split: Split, first: int, last: int) -> Tensor:
        brought.append(min(last, len(split)) - first)
        return between(split, first, last)

    monkeypatch.setattr(Split, "between", noted)
    with Compute(device="cpu") as compute:
        quick = evaluate(trained, compute, Request(quick=True))
        whole = evaluate(trained, compute, Request())
    # 160 test images, quick and whole with and without flips: 15 batches of 32; 120 validation images: 3 and 24 more;
    # 160 for the 256 that are timed
    assert sorted(brought) == [24, *[32] * 18, 160]
    assert quick is not None and whole is not None and torch.equal(quick.logits, whole.logits)
    assert len(quick.images) == 0 and torch.equal(whole.images, trained.split("test").images)


def test_a_run_on_pictures_that_stay_in_their_file_ends_with_its_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMNIST_CACHE", str(tmp_path / "cache"))
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (60, 12, 12), np.uint8)):
        place = tmp_path / "root" / "ab"[index % 2] / f"{index:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    run = fmnist.train(
        ROOT / "configs/mlp.yaml",
        output_dir=str(tmp_path / "run"),
        data={"name": "folder", "root": str(tmp_path / "root"), "where": "host", "holdout": 0.2},
        batch={"global_batch_size": 8},
        schedule={"steps": 2, "warmup_epochs": 0},
        log={"wandb": "disabled"},
    )
    summary = json.loads((run.directory / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["test.num_images"] == 12


@pytest.mark.thorough
def test_two_processes_report_what_one_does(run: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = run_program(ROOT / "evaluate.py", run, "--output", folder, env=environment(), processes=processes)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics.pop("cost")["parameters"] > 0  # and times, which differ
        found.append((metrics, (folder / "predictions.csv").read_bytes()))
        for path in (run / "features").iterdir():
            path.unlink()
    assert found[0] == found[1]
    assert found[0][0]["retrieval"]["num_items"] == 240 and len(found[0][0]["duplicates"]) == 3


@pytest.mark.thorough
def test_a_spread_run_reports_at_its_end_what_evaluate_finds(tmp_path: Path, small_config: Path) -> None:
    run, found = tmp_path / "run", []
    program = [ROOT / "train.py", "--config", small_config, "--output_dir", run, "--data.where", "spread"]
    for argv in (program, [ROOT / "evaluate.py", run]):
        done = run_program(*argv, env=environment(), processes=2)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((run / "evaluation/test/metrics.json").read_text()))
    assert all(found[0][key] == found[1][key] for key in ("data", "confusion_matrix", "loss", "ece", "per_class"))
    subsets = found[1]["subsets"]  # of 10,000 images
    assert subsets["without_near_copies"]["num_images"] == 10_000 - 89
    assert subsets["without_similar"]["num_images"] == 10_000 - 682
