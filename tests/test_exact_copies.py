"""Images that stand in two splits, pixel for pixel: counted by hand, in the report, and as CSV."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from other_sets import names, untrained_on, write_npz
from small import command

from fmnist.apps.duplicates import EXACT, main
from fmnist.config.schema import DataConfig
from fmnist.data.info import SplitName
from fmnist.data.split import Split
from fmnist.evaluation.exact_copies import copies_line, exact_copies, exact_copies_of
from fmnist.evaluation.findings import findings
from fmnist.evaluation.outcome import Request, evaluate
from fmnist.report.page import context, render
from fmnist.report.write import report_text
from fmnist.runtime.compute import Compute
from fmnist.trained import open_trained


def split(values: list[int], labels: list[int]) -> Split:
    """Images of 2 x 2 equal pixels."""
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None].expand(-1, 2, 2)
    return Split(images=images, labels=torch.tensor(labels))


def test_copies_by_hand() -> None:
    splits: dict[SplitName, Split] = {
        "train": split([1, 2, 3, 3, 4, 4], [0, 0, 0, 1, 5, 5]),
        "val": split([9, 2, 3], [7, 0, 1]),
        "test": split([4, 9, 9, 8, 1], [6, 7, 8, 0, 0]),
    }
    val_train, test_train, test_val = exact_copies(splits)
    # 2 with its own class; 3 is in train as 0 and as 1, of which one contradicts
    assert (val_train.indices, val_train.partners, val_train.contradicting) == ((1, 2), (1, 2), (False, True))
    assert (test_train.indices, test_train.partners, test_train.contradicting) == ((0, 4), (4, 0), (True, False))
    assert (test_val.indices, test_val.partners, test_val.contradicting) == ((1, 2), (0, 0), (False, True))
    said = copies_line([pair.as_dict() for pair in (val_train, test_val)])
    assert said == (
        "exact copies: 2 of 3 val images in train (1 of another class); 2 of 5 test images in val (1 of another class)"
    )


def test_a_split_without_images_is_no_pair() -> None:
    empty = split([], [])
    assert exact_copies({"train": split([1], [0]), "val": empty, "test": empty}) == []
    (pair,) = exact_copies({"train": split([1], [0]), "val": empty, "test": split([2, 1], [0, 0])})
    assert (pair.split, pair.other, pair.indices) == ("test", "train", (1,))


def test_the_same_bytes_in_another_channel_are_no_copy() -> None:
    red, green = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    red[:, 0], green[:, 1] = 9, 9
    label = torch.tensor([0])
    (pair,) = exact_copies({"train": Split(images=red, labels=label), "test": Split(images=green, labels=label)})
    assert pair.indices == ()


def test_fashion_mnist_has_copies_between_train_and_test() -> None:
    found = {(pair.split, pair.other): pair for pair in exact_copies_of(DataConfig(val_size=0))}
    splits = {name: Split.load(name, DataConfig(val_size=0)) for name in ("train", "test")}  # type: ignore[arg-type]
    pair = found["test", "train"]
    # a second way: sums of pixels as candidates, then all pixels
    flat = {name: part.images.flatten(1).long() for name, part in splits.items()}
    weights = torch.arange(1, 785)
    sums = {name: (images * weights).sum(1) for name, images in flat.items()}
    expected = [
        i
        for i in torch.isin(sums["test"], sums["train"]).nonzero().flatten().tolist()
        if any(torch.equal(flat["test"][i], flat["train"][j]) for j in (sums["train"] == sums["test"][i]).nonzero())
    ]
    assert list(pair.indices) == expected


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images [9, 9, 3] of six classes, of whose test images 0, 1 and 7 are training images, 7 of class 2."""
    folder = tmp_path_factory.mktemp("copies")
    with np.load(write_npz(folder / "plain.npz", 6, (9, 9, 3))) as plain:
        test = plain["test_images"].copy()
        test[0], test[1], test[7] = plain["train_images"][6], plain["train_images"][1], plain["train_images"][2]
    return untrained_on(write_npz(folder / "copied.npz", 6, (9, 9, 3), test_images=test), folder / "run")


def test_the_report_counts_copies_and_leaves_them_out_once(copied: Path) -> None:
    trained = open_trained(copied, "cpu")
    with Compute(device="cpu") as compute:
        outcome = evaluate(trained, compute, Request())
    assert outcome is not None
    found = findings(outcome, None, None, exact_copies_of(trained.cfg.data))
    counts = {
        (row["split"], row["other"]): (row["copies"], row["contradicting"]) for row in found.metrics["duplicates"]
    }
    assert counts == {("val", "train"): (0, 0), ("test", "train"): (3, 1), ("test", "val"): (0, 0)}
    subset = found.metrics["subsets"]["without_exact_copies"]
    kept = torch.tensor([i for i in range(160) if i not in (0, 1, 7)])
    assert (subset["removed"], subset["num_images"]) == (3, 157)
    assert subset["top1"] == outcome.correct[kept].double().mean()
    assert "3 of 160 test images in train (1 of another class)" in report_text(found)
    page = render(context(found))
    assert "3 of 160 test images in train" in page and "without 3 exact copies" in page and "counted three ways" in page
    assert "human line" not in page.split("<body>")[1] and "Fashion-MNIST" not in page and "copied.npz" in page


def test_the_command_lists_them(copied: Path, tmp_path: Path) -> None:
    said = command(main, copied, "--output", tmp_path / "a.csv")
    assert "3 of 160 test images in train (1 of another class)" in said
    rows = list(csv.reader(io.StringIO((tmp_path / "a.csv").read_text())))
    labels = names(6)
    assert rows == [
        list(EXACT),
        ["test", "0", labels[0], "train", "6", labels[0]],
        ["test", "1", labels[1], "train", "1", labels[1]],
        ["test", "7", labels[1], "train", "2", labels[2]],
    ]
    npz = copied.parent / "copied.npz"
    assert "0 of 120 val images in train\n" in command(main, npz, "--split", "val", "--val_size", 0)
    assert "is no data set; valid: fashion_mnist" in command(main, tmp_path / "none", status=2)


def test_fashion_mnist_lists_exact_copies_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    said = command(main, "fashion_mnist", "--exact", "--split", "test", "--val_size", 5000)
    assert said.startswith(",".join(EXACT) + "\n") and "of 10,000 test images in train" in said
