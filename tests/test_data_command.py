"""`fmnist data`: what a run would see, as numbers and sheets; the numbers by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from other_sets import names, untrained_on, write_npz
from PIL import Image
from small import command

from fmnist.apps.data.__main__ import main
from fmnist.apps.data.show import COLUMNS, augmented, choose, samples
from fmnist.apps.duplicates import main as duplicates_main
from fmnist.config.parse import load_config, parse_config
from fmnist.config.schema import DataConfig, to_yaml
from fmnist.data.named import flags_of
from fmnist.data.split import Split


def test_the_numbers_and_sheets_of_an_npz_file(tmp_path: Path) -> None:
    npz = write_npz(tmp_path / "set.npz", 7, (9, 12, 3))
    args = (npz, "--output", tmp_path / "out", "--augment.size", 12, "--augment.rotation=20")
    facts = json.loads(command(main, *args, "--json"))
    assert facts["images"] == {"train": 240, "val": 120, "test": 160} and facts["shape"] == [3, 9, 12]
    assert list(facts["classes"]) == names(7)
    # 240 = 7 * 34 + 2, 120 = 7 * 17 + 1, 160 = 7 * 22 + 6
    assert facts["classes"]["kind 000"] == {"train": 35, "val": 18, "test": 23}
    assert facts["classes"]["Ärmel"] == {"train": 34, "val": 17, "test": 22}
    assert facts["bytes_on_device"] == (240 + 120 + 160) * (3 * 9 * 12 + 8)
    assert [(row["copies"], row["contradicting"]) for row in facts["duplicates"]] == [(0, 0)] * 3
    for sheet in ("samples.png", "augmented.png"):
        pixels = np.asarray(Image.open(tmp_path / "out" / sheet).convert("RGB")).astype(int)
        assert np.ptp(pixels, axis=2).max() > 30  # in colour
    said = command(main, *args)
    assert "240 train, 120 val, 160 test" in said and "colour, 9 x 12 pixels" in said and "Ärmel" in said


def test_of_many_classes_the_largest_and_the_smallest_are_listed(tmp_path: Path) -> None:
    labels = np.concatenate([np.arange(50), np.zeros(100, int)])
    images = np.random.default_rng(0).integers(0, 256, (150, 8, 8), np.uint8)
    npz = write_npz(
        tmp_path / "set.npz", 50, (8, 8), train_images=images, train_labels=labels, val_images=None, val_labels=None
    )
    said = command(main, npz, "--output", tmp_path / "out", "--data.val_size", 0, "--augment.size", 8)
    table = said[said.index("50 classes") :].splitlines()
    assert len(table) == 1 + 10 + 1 + 10 + 2 and table[1].split() == ["kind", "000", "101", "0", "4"]
    assert "101.0 times as many training images" in table[-2]
    assert table[-1] == "fewer training images than a batch of 256: train with --batch.global_batch_size 32"


def test_a_small_folder_is_named_once_and_told_the_batch_that_a_training_needs(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"photos/{number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{number % 2}/{number}.png")
    args = (tmp_path / "photos", "--output", tmp_path / "out", "--augment.size", 8)
    said = command(main, *args)
    assert f"data      {tmp_path / 'photos'}\nimages    32 train, 4 val, 4 test\n" in said  # a tenth held out, twice
    # without --config a training takes configs/cnn.yaml, 256 images a step; 32 / 4 = 8
    assert "fewer training images than a batch of 256: train with --batch.global_batch_size 8\n" in said
    (tmp_path / "own.yaml").write_text("batch: {global_batch_size: 32}")
    assert "fewer" not in command(main, *args, "--config", tmp_path / "own.yaml")


def test_what_is_erased_has_the_mean_of_these_images(tmp_path: Path) -> None:
    """As in training; Fashion-MNIST's own mean would be darker."""
    images = np.full((20, 8, 8), 200, np.uint8)
    images[::2] += 2  # images of one colour are refused
    arrays = {"train_images": images, "train_labels": np.arange(20) % 2}
    np.savez(tmp_path / "set.npz", **arrays)
    flags = ["--data.name", "npz", "--data.root", str(tmp_path / "set.npz"), "--data.val_size", "0"]
    cfg = parse_config([*flags, "--augment.size", "16", "--augment.erase", "1.0", "--augment.shift", "0"])
    square = augmented(Split.load("train", cfg.data), torch.arange(10), cfg)
    assert torch.allclose(square, torch.tensor(201 / 255), atol=0.01)


def test_samples_are_of_each_class_and_the_same_are_augmented(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", 9, (8, 10))
    cfg = parse_config([*flags_of(str(tmp_path / "set.npz")), "--augment.size=10", "--augment.flip=0"])
    train = Split.load("train", cfg.data)
    chosen = choose(train)
    assert train.labels[chosen].tolist() == [label for label in range(9) for _ in range(COLUMNS)]
    shown = samples(train.images[chosen])
    assert shown.shape == (72, 10, 10, 3)
    assert torch.equal(shown[3, 1:9, :, 0], train.images[chosen[3]].float() / 255)  # a row of white above and below
    assert (shown[:, [0, 9]] == 1).all()
    square = augmented(train, chosen, cfg)
    assert square.shape == (72, 10, 10, 3) and square.min() >= 0 and square.max() <= 1


def test_large_images_are_shrunk_for_the_sheet() -> None:
    assert samples(torch.zeros(2, 3, 300, 200, dtype=torch.uint8)).shape == (2, 64, 64, 3)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_class_of_few_images_fills_its_row(size: int) -> None:
    images = torch.zeros(size + 8, 4, 4, dtype=torch.uint8)
    split = Split(images=images, labels=torch.tensor([0] * size + [1] * 8))
    assert split.labels[choose(split)].tolist()[: 2 * COLUMNS] == [0] * COLUMNS + [1] * COLUMNS


def test_a_data_set_is_named_by_its_name_its_files_or_a_run(tmp_path: Path, real_folder: Path) -> None:
    npz = write_npz(tmp_path / "set.npz", 5, (8, 8))
    run = untrained_on(npz, tmp_path / "run", size=8)
    (tmp_path / "photos/cat").mkdir(parents=True)
    assert flags_of("cifar10") == ["--data.name=cifar10"]
    assert flags_of(str(npz)) == ["--data.name=npz", f"--data.root={npz}"]
    assert flags_of(str(real_folder)) == ["--data.name=fashion_mnist", f"--data.root={real_folder}"]
    assert flags_of(str(tmp_path / "photos")) == ["--data.name=folder", f"--data.root={tmp_path / 'photos'}"]
    assert parse_config(flags_of(str(run))).data == DataConfig(name="npz", root=str(npz), val_size=0)
    with pytest.raises(ValueError, match=r"'nothing' is no data set; valid: fashion_mnist"):
        flags_of("nothing")


def test_a_run_whose_corrections_are_gone_says_the_way_out(tmp_path: Path) -> None:
    run = untrained_on(write_npz(tmp_path / "set.npz", 5, (8, 8)), tmp_path / "run", size=8)
    cfg = load_config(run / "config.yaml")
    (run / "config.yaml").write_text(to_yaml(replace(cfg, data=replace(cfg.data, corrections="gone.csv"))))
    as_given = ("--data.corrections", "null")
    for program, args in ((main, ("--output", tmp_path / "sheets")), (duplicates_main, ("--exact",))):
        said = command(program, run, *args, status=2)
        assert "data.corrections: there is no gone.csv; if it was moved, give its new place: " in said
        assert "--data.corrections FILE; with null the labels are used as given" in said
        command(program, run, *args, *as_given, lines=None)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nothing",), "'nothing' is no data set"),
        ((), "required: DATA"),
        (("fashion_mnist", "--data.val_size", "-1"), "data.val_size"),
        (("fashion_mnist", "--data.nonsense", "1"), "data.nonsense"),
        (("fashion_mnist", "--augment.size", "x"), "augment.size"),
        (("fashion_mnist", "--model.name", "mlp"), "unknown option --model.name"),
        (("fashion_mnist", "--output", "a.png"), "a.png"),
        (("npz",), "data.root"),
    ],
)
def test_mistakes_are_one_line(args: tuple[str, ...], words: str) -> None:
    assert words in command(main, *args, status=2)
