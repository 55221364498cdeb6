"""The flag is raised for its share of clothes, and for what is none; what is kept is used only if it is sound."""

import shutil
from pathlib import Path

import pytest
import torch
from pictures import digits, learned_run, noise
from safetensors.torch import load_file, save_file
from small import NUM_TRAIN, untrained, write_small_data

from fmnist.apps.novelty import FILE, FLAGGED, Reference, compute_reference, open_reference
from fmnist.config.schema import ModelConfig
from fmnist.data.fashion_mnist import load_split
from fmnist.trained import Predictor, open_predictor


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    copy = tmp_path_factory.mktemp("unlike") / "run"  # these tests damage what is kept in it
    shutil.copytree(learned_run(tmp_path_factory), copy, ignore=shutil.ignore_patterns(FILE))
    return open_predictor(copy, "cpu")


@pytest.fixture(scope="module")
def reference(predictor: Predictor) -> Reference:
    return open_reference(predictor)


def flagged(predictor: Predictor, reference: Reference, images: torch.Tensor) -> float:
    return float((reference.score(predictor(images)[1]) > reference.threshold).double().mean())


def test_it_is_raised_for_its_share_of_clothes_and_for_what_is_none(predictor: Predictor, reference: Reference) -> None:
    test = load_split("test", None, 2000)[0][:3000]
    # 5 % of 3,000 and of the 2,000 that set the threshold: each within four standard errors, 1.6 and 1.9 points.
    assert abs(flagged(predictor, reference, test) - FLAGGED) < 0.03
    assert flagged(predictor, reference, digits()[:500]) > 0.6
    assert flagged(predictor, reference, noise(200)) > 0.5


def test_the_score_is_the_cosine_to_the_tenth_neighbour() -> None:
    # Eleven directions at 0, 5, ..., 50 degrees: from 0 degrees the tenth nearest is at 45.
    angles = torch.deg2rad(torch.arange(0.0, 55.0, 5.0))
    bank = torch.stack([angles.cos(), angles.sin()], dim=1)
    score = Reference(bank, bank, torch.zeros(11, 10)).score(torch.tensor([[7.0, 0.0]]))
    assert score.item() == pytest.approx(1 - 0.5**0.5, abs=1e-6)
    assert Reference(bank[:3], bank, torch.zeros(11, 10)).score(torch.zeros(0, 2)).shape == (0,)


def test_it_is_kept_and_read_again_only_if_sound(
    predictor: Predictor, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = predictor.trained.output / FILE
    assert path.is_file() and [item.name for item in path.parent.iterdir() if item.name.startswith(".")] == []
    computed = []

    def compute(*_: object) -> Reference:
        computed.append(True)
        return reference

    monkeypatch.setattr("fmnist.apps.novelty.compute_reference", compute)
    again = open_reference(predictor)
    assert not computed and torch.equal(again.train, reference.train) and again.threshold == reference.threshold

    content = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.write_bytes(content[: len(content) // 2])  # cut short
    open_reference(predictor)
    assert len(computed) == 1 and path.stat().st_size > len(content) // 2  # computed and kept again
    tensors["train"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "1"})  # of other weights, so to say
    open_reference(predictor)
    assert len(computed) == 2
    (predictor.trained.directory / "model.safetensors").touch()
    open_reference(predictor)
    assert len(computed) == 2  # the same bytes are the same weights


def test_without_validation_images_other_training_images_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMNIST_DATA", str(write_small_data(tmp_path)))  # 2,000 training images: half and half
    run = untrained(tmp_path / "run", ModelConfig(name="mlp", options={"width": 32}), 28)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("val_size: 500", "val_size: 0"))
    reference = compute_reference(open_predictor(run, "cpu"))
    assert len(reference.train) == len(reference.val) == len(reference.val_logits) == NUM_TRAIN // 2
    assert not (reference.val[:, None] == reference.train).all(2).any()  # and none is in both


def test_a_run_that_may_not_be_written_to_is_used(
    predictor: Predictor, reference: Reference, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> tuple[int, str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fmnist.apps.novelty.compute_reference", lambda *_: reference)
    monkeypatch.setattr("fmnist.apps.novelty.tempfile.mkstemp", refuse)
    (predictor.trained.output / FILE).unlink()
    assert open_reference(predictor) is reference
    assert not (predictor.trained.output / FILE).exists()
