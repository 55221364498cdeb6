"""Near copies: by hand on few images, against a plain product on real ones, and the command."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import execute
from small import command

from fmnist.apps.duplicates import NEAR_COPY, SIMILAR, main
from fmnist.config.schema import DataConfig
from fmnist.data.fashion_mnist import CLASS_NAMES, load
from fmnist.data.split import Split
from fmnist.evaluation import near_copies
from fmnist.evaluation.near_copies import find_near_copies, load_pair


def test_correlation_by_hand() -> None:
    # Centred: (0, 0, 30, 30) -> (-15, -15, 15, 15), (0, 10, 30, 40) -> (-20, -10, 10, 20):
    # (300 + 150 + 150 + 300) / (30 * sqrt(1000)) = 900 / 948.683 = 0.948683. Its brighter copy (100, 100, 230, 230)
    # correlates 1: brightness and contrast do not count. The constant image resembles none.
    images = torch.tensor([[0, 0, 30, 30], [0, 10, 30, 40], [7, 7, 7, 7]], dtype=torch.uint8).reshape(3, 2, 2)
    training = torch.tensor([[9, 9, 9, 9], [100, 100, 230, 230]], dtype=torch.uint8).reshape(2, 2, 2)
    found = find_near_copies(images, training, 0.9)
    assert found.indices.tolist() == [0, 1]  # the most alike first
    assert found.partners.tolist() == [1, 1]
    assert found.correlations.tolist() == pytest.approx([1.0, 900 / (30 * 1000**0.5)], abs=1e-12)
    assert found.above(0.95).tolist() == [0]
    assert len(find_near_copies(images[2:], training, 0.9).indices) == 0


def test_the_bound_loses_no_pair(train_images: Split) -> None:
    images, training = train_images.images[:400], train_images.images[400:2000]
    whole = np.corrcoef(images.flatten(1).double(), training.flatten(1).double())[:400, 400:]
    for threshold in (0.9, 0.95, 0.98):
        found = find_near_copies(images, training, threshold)
        expected = np.flatnonzero(whole.max(axis=1) > threshold)
        assert len(expected) > 0
        assert sorted(found.indices.tolist()) == expected.tolist()
        np.testing.assert_array_equal(found.partners, whole.argmax(axis=1)[found.indices])
        np.testing.assert_allclose(found.correlations, whole.max(axis=1)[found.indices], atol=1e-12)


def test_the_command_lists_the_89_and_counts_the_682(tmp_path: Path) -> None:
    told = command(main, "--output", tmp_path / "copies.csv")
    assert "89 of 10,000 test images" in told
    assert "682 above 0.98" in told
    with (tmp_path / "copies.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["index"] for row in rows}) == len(rows) == 89
    (images, labels), (training, training_labels) = load("test"), load("train")
    for row in rows[:: len(rows) - 1]:  # the first and the last
        index, partner = int(row["index"]), int(row["train_index"])
        pair = images[index].flatten(), training[partner].flatten()
        assert np.corrcoef(*pair)[0, 1] == pytest.approx(float(row["correlation"]), abs=1e-6)
        assert (row["label"], row["train_label"]) == (CLASS_NAMES[labels[index]], CLASS_NAMES[training_labels[partner]])


def test_a_run_of_few_images_is_compared_with_its_own() -> None:
    """Not with a part of another size of all 60,000: those that it trained on, and the ones held out of them."""
    data = DataConfig(limit=1000)
    split, training = load_pair("test", data)
    own = [Split.load(name, data).published for name in ("train", "val")]
    assert training.published is not None and len(split) == 10_000
    assert training.published.tolist() == [place for part in own if part is not None for place in part.tolist()]
    images, _ = load("train")
    assert torch.equal(training.images, images[training.published]) and len(training) == 6000


def test_pictures_that_are_all_alike_take_little_memory() -> None:
    """240 frames of a video are 28,680 pairs: 5 GB where all of them are multiplied at once."""
    code = """
import resource, torch
from fmnist.evaluation.near_copies import find_pairs
noise = torch.Generator().manual_seed(0)
base = torch.randint(0, 255, (1, 3, 48, 48), generator=noise)
images = (base + torch.randint(-2, 3, (240, 3, 48, 48), generator=noise)).clamp(0, 255).byte()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pairs, found = find_pairs(images)
print(len(pairs), len(found), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < 400)
"""
    done = execute(sys.executable, "-c", code, timeout=120)
    assert done.stdout.split() == ["28680", "28680", "True"], done.stderr


def test_a_threshold_below_what_is_searched_is_refused() -> None:
    assert (NEAR_COPY, SIMILAR) == (near_copies.NEAR_COPY, near_copies.SIMILAR)  # the command's, without torch
    assert "--threshold: '0.5' is not valid; valid range: 0.98 to 1" in command(main, "--threshold", 0.5, status=2)
