"""A trained run, called on images, gives the logits of evaluation and the features its classifier takes."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN
from conftest import warm_train as train
from PIL import Image
from small import command, write_small_data

from fmnist.apps.export.__main__ import main as export_main
from fmnist.apps.monitor.__main__ import main as monitor_main
from fmnist.apps.predict.__main__ import main as predict_main
from fmnist.apps.search.__main__ import main as search_main
from fmnist.checkpoint.contents import verify
from fmnist.data.fashion_mnist import load_split
from fmnist.data.split import Split
from fmnist.metrics import predict
from fmnist.runtime.compute import Compute
from fmnist.trained import open_trained


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(SMALL_RUN)
    train("--config", folder / "small.yaml", "--output_dir", folder / "run")
    return folder / "run"


def test_logits_are_those_of_evaluation_and_features_make_them(run_directory: Path, train_images: Split) -> None:
    trained = open_trained(run_directory, "cpu")
    logits, features = trained(train_images.images[:300])
    part = replace(train_images, images=train_images.images[:300], labels=train_images.labels[:300])
    with Compute() as compute:
        expected = predict(trained.model, part, trained.augment, trained.cfg.evaluation, compute)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert features.shape == (300, 32)  # the small CNN's last width
    assert torch.allclose(trained.model.head(features), logits, atol=1e-5)
    assert trained(train_images.images[:0])[1].shape == (0, 32)


def test_a_device_that_is_not_there_is_one_line(run_directory: Path) -> None:
    with pytest.raises(ValueError, match="device is meta_gpu"):
        open_trained(run_directory, "meta_gpu")


def test_paths_are_those_that_the_user_gave(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_directory.parent)
    checkpoint = max((run_directory / "checkpoints").glob("step_*")).relative_to(run_directory.parent)
    trained = open_trained(Path("run"), "cpu")
    assert (trained.directory, trained.weights) == (Path("run"), Path("run/model.safetensors"))
    assert trained.folder("evaluation", "test") == Path("run/evaluation/test")
    trained = open_trained(checkpoint, "cpu")
    assert (trained.directory, trained.checkpoint) == (Path("run"), checkpoint.name)
    assert open_trained(run_directory, "cpu").directory == run_directory

    # Of a checkpoint that is reached in another way the run has to be found.
    (tmp_path / "latest").symlink_to(run_directory.parent / checkpoint)
    monkeypatch.chdir(checkpoint)
    for path in (Path("."), tmp_path / "latest", Path(f"../{checkpoint.name}")):
        trained = open_trained(path, "cpu")
        assert (trained.directory.resolve(), trained.checkpoint) == (run_directory.resolve(), checkpoint.name)
    monkeypatch.chdir(run_directory)
    trained = open_trained(Path("."), "cpu")
    assert (trained.name, trained.checkpoint, trained.directory.resolve()) == ("run", "", run_directory.resolve())


def test_a_config_that_was_changed_after_the_training_is_refused(run_directory: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_directory, tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    assert "  size: 28\n" in text
    (run / "config.yaml").write_text(text.replace("  size: 28\n", "  size: 32\n", 1))
    with pytest.raises(ValueError, match="config.yaml was changed after the training: augment.size was 28, now 32"):
        open_trained(run, "cpu")
    (run / "config.yaml").write_text(text.replace("batch_size: 500", "batch_size: 100"))  # which changes no answer
    assert open_trained(run, "cpu").cfg.evaluation.batch_size == 100


def test_a_run_opens_wherever_the_command_starts(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(run_directory, tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub("output_dir: .*", "output_dir: .", text))  # trained in its own folder
    (tmp_path / "My Project").mkdir()
    for place in ("/", tmp_path / "My Project", run):
        monkeypatch.chdir(place)
        assert open_trained(run, "cpu").cfg.output_dir == "."


def test_what_is_made_of_a_checkpoint_stays_out_of_it(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMNIST_DATA", str(write_small_data(tmp_path)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(load_split("test", None, 1000)[0][:20].numpy()):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{number}.png")
    checkpoint = max((run_directory / "checkpoints").glob("step_*"))
    command(search_main, "index", checkpoint, "--folder", "pictures")
    assert "the 10 nearest of 1,000 images" in command(search_main, "query", checkpoint, "test:3")
    command(search_main, "evaluate", checkpoint)
    command(export_main, checkpoint, "--to", "onnx")
    command(predict_main, checkpoint, "pictures")
    monkeypatch.delenv("FMNIST_DATA")  # what is usual is said by the run's own images
    assert "20 pictures" in command(monitor_main, checkpoint, "pictures", status=None, lines=None)
    verify(checkpoint)  # a further file would be an error
    for made in (
        "search/{}/index.safetensors",
        "search/{}/search.csv",
        "features/{}/train.safetensors",
        "evaluation/{}/test/retrieval.json",
        "export/{}/model.onnx",
    ):
        assert (run_directory / made.format(checkpoint.name)).is_file()
