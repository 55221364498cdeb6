"""The predictor gives what evaluation gives, and the features its classifier takes."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, train

from fmnist.data.batches import Split
from fmnist.metrics import predict
from fmnist.predictor import classifier, open_predictor
from fmnist.run import Run


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictor")
    (folder / "small.yaml").write_text(SMALL_RUN)
    train("--config", folder / "small.yaml", "--output_dir", folder / "run")
    return folder / "run"


def test_logits_are_those_of_evaluation_and_features_make_them(run_directory: Path, train_images: Split) -> None:
    predictor = open_predictor(run_directory, "cpu")
    logits, features = predictor(train_images.images[:300])
    part = Split(images=train_images.images[:300], labels=train_images.labels[:300])
    cfg = predictor.trained.cfg
    expected = predict(predictor.model, part, predictor.augment, cfg.evaluation, Run(cfg, run_directory))
    assert torch.allclose(logits, expected, atol=1e-5)
    assert features.shape == (300, 32)  # the small CNN's last width
    assert torch.allclose(classifier(predictor.model)(features), logits, atol=1e-5)
    assert predictor(train_images.images[:0])[1].shape == (0, 32)


def test_a_device_that_is_not_there_is_one_line(run_directory: Path) -> None:
    with pytest.raises(ValueError, match="device is meta_gpu"):
        open_predictor(run_directory, "meta_gpu")
