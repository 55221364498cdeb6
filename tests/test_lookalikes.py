"""The training images nearest to an error: those of a search in float64; left out, in one line, where not at hand."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import NUM_TRAIN, VAL_SIZE, untrained

from fmnist.config.schema import ModelConfig
from fmnist.data.fashion_mnist import CLASS_NAMES, load, load_indexed
from fmnist.evaluation.features import features_of
from fmnist.evaluation.findings import NUM_SHOWN, findings
from fmnist.evaluation.lookalikes import lookalikes
from fmnist.evaluation.outcome import Outcome
from fmnist.report.page import context, render
from fmnist.trained import open_trained


@pytest.fixture(scope="module")
def run(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("near") / "run", ModelConfig(name="cnn", options={"widths": [4, 8]}), 28)


@pytest.fixture
def outcome(run: Path, tmp_path: Path) -> Outcome:
    """An evaluation of 200 test images, of which an untrained model gets most wrong; the features are kept."""
    trained = open_trained(Path(shutil.copytree(run, tmp_path / "run")), "cpu")
    images, labels, published = load_indexed("test", None, VAL_SIZE)
    logits, _ = trained(images[:200])
    features_of(trained, "train", load_indexed("train", None, VAL_SIZE)[0])
    return Outcome(
        name="run", model="cnn", directory=tmp_path / "out", split="test", tta="none", images=images[:200],
        labels=labels[:200], logits=logits, class_names=CLASS_NAMES, by_tta={"none": logits, "flip": logits},
        trained=trained, published=published[:200],
    )  # fmt: skip


def distances(outcome: Outcome, positions: list[int]) -> torch.Tensor:
    """1 - cosine in float64 between images of an outcome and all training images: [P, N]."""
    assert outcome.trained is not None
    queries = outcome.trained(outcome.images[positions])[1].double()
    items = outcome.trained(load_indexed("train", None, VAL_SIZE)[0])[1].double()
    return 1 - torch.nn.functional.cosine_similarity(queries[:, None], items[None], dim=2)


def test_they_are_those_of_a_search_by_hand_under_their_published_index(outcome: Outcome) -> None:
    positions = [3, 17, 100]
    found, by_hand = lookalikes(outcome, positions), distances(outcome, positions)
    images, labels = load("train")
    assert [len(near) for near in found] == [3, 3, 3]
    for near, row in zip(found, by_hand, strict=True):
        assert [each.distance for each in near] == pytest.approx(row.sort().values[:3].tolist(), abs=1e-3)  # float16
        for each in near:
            assert torch.equal(each.image, images[each.index]) and each.label == CLASS_NAMES[labels[each.index]]
            assert 0 <= each.index < NUM_TRAIN


def test_a_training_image_is_not_its_own_neighbour(outcome: Outcome) -> None:
    images, labels, published = load_indexed("train", None, VAL_SIZE)
    own = replace(outcome, split="train", images=images[:50], labels=labels[:50], published=published[:50])
    for position, near in zip((0, 9), lookalikes(own, [0, 9]), strict=True):
        assert len(near) == 3 and int(published[position]) not in {each.index for each in near}


def test_a_file_of_corrections_that_is_gone_leaves_the_labels_as_given(
    outcome: Outcome, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert outcome.trained is not None
    cfg = outcome.trained.cfg
    gone = replace(cfg, data=replace(cfg.data, corrections=str(tmp_path / "gone.csv")))
    other = replace(outcome, trained=replace(outcome.trained, cfg=gone))
    found, expected = ([[e.index for e in near] for near in lookalikes(each, [3, 17])] for each in (other, outcome))
    assert found == expected and list(map(len, found)) == [3, 3]
    assert "gone.csv is gone: labels are used as given" in caplog.text


def test_the_page_shows_them_under_the_errors(outcome: Outcome) -> None:
    found = findings(outcome)
    assert len(found.nearest) == NUM_SHOWN == 24
    values = context(found)
    assert [len(shown["nearest"]) for shown in values["errors"]] == [3] * NUM_SHOWN
    text = render(values)
    assert text.count('class="near"') == 3 * NUM_SHOWN and "the three training images nearest to it" in text
    # in the order of the page: the map under the picture, its drop in the caption, the neighbours below
    assert len(found.maps) == NUM_SHOWN
    assert text.index("Under each, what it looked at") < text.index("Last, the three training images nearest")
    assert text.index('class="px why') < text.index("<br>covered: down by ") < text.index('class="near"')
    first = found.nearest[0][0]
    assert f'title="training image {first.index}"' in text and f"<small>{first.distance:.3f}</small>" in text
    assert findings(outcome, quick=True).nearest == []


def test_where_they_are_not_at_hand_they_are_left_out_in_one_line(
    outcome: Outcome, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fmnist")
    assert lookalikes(replace(outcome, trained=None), [3]) == lookalikes(outcome, []) == []
    assert caplog.messages == []  # an ensemble has no features, and without errors there is nothing to show

    assert outcome.trained is not None
    other = replace(outcome.trained, fingerprint={"training images in data.root": "0" * 64})
    assert lookalikes(replace(outcome, trained=other), [3]) == []
    left_out = "the nearest training images of its errors are left out: "
    assert [line for line in caplog.messages if line.startswith("the ")] == [left_out + "the run was trained on others"]
    shutil.rmtree(tmp_path / "run/features")
    caplog.clear()
    text = render(context(findings(outcome)))
    assert caplog.text.count(left_out) == 1 and f"`fmnist search evaluate {tmp_path / 'run'}` makes them" in caplog.text
    assert 'class="near"' not in text and text.count("The training images nearest to each are left out") == 1
