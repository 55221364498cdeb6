"""The flag is raised for its share of clothes, and for other pictures; features kept on disk are used only if valid."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from pictures import digits, learned_run, noise
from safetensors.torch import load_file, save_file
from small import NUM_TRAIN, untrained, write_small_data

from fmnist.apps.novelty import FLAGGED, NoveltyReference, open_reference
from fmnist.config.schema import ModelConfig
from fmnist.data.fashion_mnist import load_split, published
from fmnist.evaluation import features
from fmnist.trained import Trained, open_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    copy = tmp_path_factory.mktemp("novelty") / "run"  # these tests damage what is kept in it
    shutil.copytree(learned_run(tmp_path_factory), copy, ignore=shutil.ignore_patterns("features"))
    return open_trained(copy, "cpu")


@pytest.fixture(scope="module")
def reference(trained: Trained) -> NoveltyReference:
    return open_reference(trained)


def flagged(trained: Trained, reference: NoveltyReference, images: torch.Tensor) -> float:
    return float((reference.score(trained(images)[1]) > reference.threshold).double().mean())


def test_it_is_raised_for_its_share_of_clothes_and_for_other_pictures(
    trained: Trained, reference: NoveltyReference
) -> None:
    test = load_split("test", None, 2000)[0][:3000]
    # 5 % of 3,000 and of the 2,000 that set the threshold: each within four standard errors, 1.6 and 1.9 points.
    assert abs(flagged(trained, reference, test) - FLAGGED) < 0.03
    assert flagged(trained, reference, digits()[:500]) > 0.6
    assert flagged(trained, reference, noise(200)) > 0.5


def test_the_score_is_the_larger_distance_to_the_tenth_neighbour_by_direction_or_by_place() -> None:
    # Eleven directions at 0, 5, ..., 50 degrees: from 0 degrees the tenth nearest is at 45.
    angles = torch.deg2rad(torch.arange(0.0, 55.0, 5.0))
    bank = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    reference = NoveltyReference(bank, bank, torch.zeros(11, 10))
    # Of the bank itself the ends are farthest: their tenth nearest, themselves the first, is at 45 degrees; likewise of
    # the next. So both limits are those distances.
    direction, place = 1 - 0.5**0.5, 4 * math.sin(math.radians(22.5))
    assert reference.limits.tolist() == pytest.approx([direction, place], rel=1e-4)
    near, far, aside = reference.score(torch.tensor([[2.0, 0.0], [9.0, 0.0], [0.02, 0.0]])).tolist()
    assert near == pytest.approx(1, rel=1e-4)  # as far as they
    tenth = torch.cdist(torch.tensor([[9.0, 0.0], [0.02, 0.0]]), bank).topk(10, largest=False).values[:, -1]
    assert [far, aside] == pytest.approx((tenth / place).clamp_min(1).tolist(), rel=1e-4) and far > 4
    assert reference.score(torch.tensor([[-2.0, 0.0]])).item() == pytest.approx(
        (1 - math.cos(math.radians(175))) / direction, rel=1e-4
    )
    assert NoveltyReference(bank[:3], bank, torch.zeros(11, 10)).score(torch.zeros(0, 2)).shape == (0,)


def test_the_flag_is_raised_for_exactly_its_share_of_the_images_that_set_it() -> None:
    generator = torch.Generator().manual_seed(0)
    train, val = torch.randn(500, 8, generator=generator), torch.randn(400, 8, generator=generator)
    reference = NoveltyReference(train, val, torch.zeros(400, 10))
    assert int((reference.score(val) > reference.threshold).sum()) == 20
    far = 10 * val  # the same directions: places alone tell them
    assert float((reference.score(far) > reference.threshold).double().mean()) == 1


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_images_that_are_all_alike_are_familiar(size: float) -> None:
    """Of two kinds of flat images: distances are 0 but for rounding."""
    kinds = size * torch.rand(2, 256, generator=torch.Generator().manual_seed(0))
    reference = NoveltyReference(kinds.repeat(100, 1), kinds.repeat(50, 1), torch.zeros(100, 10))
    found = reference.score(torch.cat([kinds, 2 * kinds, kinds.flip(1)]))
    assert found.isfinite().all() and (found > 1).tolist() == [False, False, True, True, True, True]


def test_features_are_kept_and_read_again_only_if_valid(
    trained: Trained, reference: NoveltyReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained.folder("features")
    assert sorted(path.name for path in folder.iterdir()) == ["train_sample.safetensors", "val_sample.safetensors"]
    computed: list[int] = []
    compute = features.compute_features

    def count(trained: Trained, images: torch.Tensor) -> features.Features:
        computed.append(len(images))
        return compute(trained, images)

    monkeypatch.setattr(features, "compute_features", count)
    again = open_reference(trained)
    assert not computed and torch.equal(again.train, reference.train) and torch.equal(again.limits, reference.limits)

    path = folder / "val_sample.safetensors"
    content = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.write_bytes(content[: len(content) // 2])  # cut short
    assert torch.equal(open_reference(trained).val, reference.val)
    kept = load_file(path)
    assert computed == [2000] and kept.keys() == tensors.keys()  # computed and kept again
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors)
    save_file(tensors, path, metadata={"format": "1"})  # of other weights, so to say
    open_reference(trained)
    assert computed == [2000, 2000]
    (trained.directory / "model.safetensors").touch()
    open_reference(open_trained(trained.directory, "cpu"))
    assert computed == [2000, 2000]  # the same bytes are the same weights


def test_without_validation_images_other_training_images_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMNIST_DATA", str(write_small_data(tmp_path)))  # 2,000 training images: half and half
    run = untrained(tmp_path / "run", ModelConfig(name="mlp", options={"width": 32}), 28)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("val_size: 500", "val_size: 0"))
    (run / "data.json").write_text(json.dumps(published(0).to_json()))
    reference = open_reference(open_trained(run, "cpu"))
    assert len(reference.train) == len(reference.val) == len(reference.val_logits) == NUM_TRAIN // 2
    assert not (reference.val[:, None] == reference.train).all(2).any()  # and none is in both


def test_a_run_that_may_not_be_written_to_is_used(
    trained: Trained, reference: NoveltyReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(features, "write_atomic", refuse)
    path = trained.folder("features") / "val_sample.safetensors"
    path.unlink()
    assert torch.equal(open_reference(trained).val, reference.val)
    assert not path.exists()


def test_whole_splits_that_are_kept_are_not_computed_again(
    trained: Trained, reference: NoveltyReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = load_split("val", None, 2000)[0]
    features.features_of(trained, "val", images)  # as fmnist search does
    (trained.folder("features") / "val_sample.safetensors").unlink(missing_ok=True)
    monkeypatch.delattr(features, "compute_features")
    assert torch.equal(open_reference(trained).val, reference.val)
