"""Data sets that are arrays: .npz files, torchvision's sets, and what a run keeps of them."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from other_sets import untrained_on, write_npz
from scipy.io import savemat

from fmnist.checkpoint.fingerprint import STATISTICS, fingerprint, keep_fingerprint
from fmnist.config.schema import Config, DataConfig, ModelConfig
from fmnist.data.fashion_mnist import INFO, published
from fmnist.data.info import DATA_FILE, DataInfo, read_info
from fmnist.data.registry import open_source
from fmnist.data.sources.arrays import TORCHVISION, statistics
from fmnist.data.split import Split
from fmnist.network import build_network
from fmnist.trained import open_trained

GREY = np.random.default_rng(0).integers(0, 256, (20, 9, 12), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (20, 9, 12, 3), np.uint8)
LABELS = np.arange(20) % 4


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path / "set.npz", **arrays)
    return str(path / "set.npz")


@pytest.mark.parametrize(("images", "shape"), [(GREY, (9, 12)), (COLOUR, (3, 9, 12)), (GREY[..., None], (9, 12))])
def test_an_npz_file_becomes_three_splits(images: np.ndarray, shape: tuple[int, ...], tmp_path: Path) -> None:
    root = npz(
        tmp_path, train_images=images, train_labels=LABELS[:, None].astype(np.uint8), test_images=images[:3],
        test_labels=LABELS[:3], class_names=np.array(["a", "b", "c", "d"]),
    )  # fmt: skip
    cfg = DataConfig(name="npz", root=root, val_size=8)
    splits = {name: Split.load(name, cfg) for name in ("train", "val", "test")}  # type: ignore[arg-type]
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "val": 8, "test": 3}
    assert splits["val"].labels.bincount().tolist() == [2, 2, 2, 2]  # of every class 8/20
    assert splits["train"].class_names == ("a", "b", "c", "d") and splits["train"].info.title == "set"
    everything = sorted(splits["train"].published.tolist() + splits["val"].published.tolist())  # type: ignore[union-attr]
    assert everything == list(range(20))
    expected = images[..., 0] if images.shape[-1] == 1 else images
    expected = np.moveaxis(expected, -1, 1) if expected.ndim == 4 else expected
    assert splits["test"].images.shape[1:] == shape
    assert np.array_equal(splits["test"].images.numpy(), expected[:3])


def test_an_npz_file_with_its_own_validation_images_keeps_them(tmp_path: Path) -> None:
    root = npz(
        tmp_path, train_images=GREY, train_labels=LABELS, val_images=GREY[:5, ::-1], val_labels=LABELS[:5],
    )  # fmt: skip
    source = open_source(DataConfig(name="npz", root=root))  # val_size 5,000 holds nothing out here
    assert [len(source.read(name)[1]) for name in ("train", "val", "test")] == [20, 5, 0]  # type: ignore[arg-type]
    assert np.array_equal(source.read("val")[0].numpy(), GREY[:5, ::-1])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "holds nothing; expected train_images"),
        ({"x": GREY}, "holds x; expected train_images"),
        ({"train_images": GREY}, "train_labels is missing"),
        ({"train_images": GREY.astype(np.float32), "train_labels": LABELS}, "train_images is float32"),
        ({"train_images": GREY[0], "train_labels": LABELS}, "train_images is uint8 [9, 12]"),
        ({"train_images": COLOUR[..., :2], "train_labels": LABELS}, "expected uint8 [N, H, W] or [N, H, W, 3]"),
        ({"train_images": GREY, "train_labels": LABELS[:19]}, "expected 20 whole numbers"),
        ({"train_images": GREY, "train_labels": LABELS / 1.0}, "train_labels is float64"),
        ({"train_images": GREY, "train_labels": np.eye(20, dtype=int)}, "train_labels is int64 [20, 20]"),
        ({"train_images": GREY, "train_labels": LABELS - 1}, "train_labels from -1"),
        ({"train_images": GREY, "train_labels": LABELS * 0}, "needed: two classes"),
        ({"train_images": GREY, "train_labels": LABELS * 2}, "no training image of class '1'"),
        ({"train_images": GREY * 0, "train_labels": LABELS}, "one and the same colour"),
        ({"train_images": GREY, "train_labels": LABELS, "class_names": np.array(["a", "b"])}, "4 different names"),
        ({"train_images": GREY, "train_labels": LABELS, "class_names": np.array(list("aabc"))}, "4 different names"),
        (
            {"train_images": GREY, "train_labels": LABELS, "test_images": COLOUR, "test_labels": LABELS},
            "different shapes",
        ),
        ({"train_images": np.array([None]), "train_labels": LABELS}, "no .npz file of plain arrays"),  # a pickle
    ],
)
def test_a_bad_npz_file_is_one_line(arrays: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    cfg = DataConfig(name="npz", root=npz(tmp_path, **arrays), val_size=0)
    with pytest.raises(ValueError) as caught:
        open_source(cfg).read("train")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.array("abcd"), "4 different names"),
        (np.array([list("ab"), list("cd")]), "4 different names"),
        (np.array([1.0, 2.0, 3.0, 4.0]), "4 different names"),
        (np.array([b"a", b"b", b"c", b"\xff"]), "4 different names"),
        (np.array(["a\n", "b", "c", "d"]), r"holds 'a\\n'"),
        (np.array(["\x1b[31m", "b", "c", "d"]), r"holds '\\x1b"),
        (np.array(["\ud800", "b", "c", "d"]), r"holds '\\ud800'"),
        (np.array(["", "b", "c", "d"]), "holds ''"),
        (np.array([b"a", "\u00c4".encode(), b"c", b"d"]), None),
        (np.array([7, 8, 9, 10]), None),
    ],
)
def test_class_names_are_printable_texts_or_one_line(given: np.ndarray, words: str | None, tmp_path: Path) -> None:
    root = npz(tmp_path, train_images=GREY, train_labels=LABELS, class_names=given)
    cfg = DataConfig(name="npz", root=root, val_size=0)
    if words is None:
        names = open_source(cfg).info.class_names
        assert names == (("7", "8", "9", "10") if given.dtype.kind == "i" else ("a", "\u00c4", "c", "d"))
    else:
        with pytest.raises(ValueError, match=words):
            open_source(cfg)


def test_nothing_of_an_npz_is_left_out_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="fmnist")
    train = {"train_images": GREY, "train_labels": LABELS}
    cfg = DataConfig(name="npz", root=npz(tmp_path, **train, test_labels=LABELS), val_size=4)
    with pytest.raises(ValueError, match="has test_labels, but no test_images"):
        open_source(cfg)
    npz(tmp_path, **train, val_images=GREY[:0], val_labels=LABELS[:0], tset_images=GREY)
    source = open_source(cfg)  # an empty array holds no images of its own: val_size is taken from train
    assert [len(source.read(name)[1]) for name in ("train", "val", "test")] == [16, 4, 0]  # type: ignore[arg-type]
    stretched = "images of 12 x 9 pixels are stretched to squares"
    assert source.remarks(cfg) == [stretched] and "ignored arrays: tset_images" in caplog.text
    npz(tmp_path, **train, val_images=GREY, val_labels=LABELS)
    assert open_source(cfg).remarks(cfg) == [
        "data.val_size 4 has no effect: the data set has validation images of its own",
        stretched,
    ]


def test_a_colour_that_is_the_same_everywhere_has_std_1(tmp_path: Path) -> None:
    images = COLOUR.copy()
    images[..., 1] = 51
    info = open_source(
        DataConfig(name="npz", root=npz(tmp_path, train_images=images, train_labels=LABELS), val_size=0)
    ).info
    assert info.mean[1] == 0.2 and info.std[1] == 1.0 and 0.2 < info.std[0] < 0.4  # 51 / 255; uniform: 0.29


def test_a_member_that_is_no_array_is_one_line(tmp_path: Path) -> None:
    whole = npz(tmp_path, train_images=np.zeros((20, 8, 8), np.uint8), train_labels=LABELS)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "set2.npz", "w") as target:
        for name in source.namelist():
            target.writestr(name, b"" if name == "train_labels.npy" else source.read(name))  # as an interrupted np.save
    with pytest.raises(ValueError, match=r"set2\.npz is no \.npz file of plain arrays: train_labels is not an array"):
        open_source(DataConfig(name="npz", root=str(tmp_path / "set2.npz")))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_npz_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.npz") as caught:
        open_source(DataConfig(name="npz", root=str(tmp_path / "set.npz")))
    assert "\n" not in str(caught.value)


def test_too_many_validation_images_are_refused_with_a_number_that_does(tmp_path: Path) -> None:
    root = npz(tmp_path, train_images=GREY, train_labels=LABELS)
    with pytest.raises(ValueError, match=r"more than half of the 20 training images.*--data\.val_size 2$"):
        open_source(DataConfig(name="npz", root=root))


def test_statistics_are_exact() -> None:
    # two pixels of 0 and two of 255: mean 1/2, deviation 1/2; one of 51 among four: mean 0.05, deviation sqrt(3)/20
    grey = torch.tensor([[[0, 255]], [[255, 0]]], dtype=torch.uint8)
    colour = torch.stack((grey, torch.tensor([[[51, 0]], [[0, 0]]], dtype=torch.uint8), grey), dim=1)
    assert statistics(grey) == ((0.5,), (0.5,))
    assert statistics(colour) == ((0.5, 0.05, 0.5), (0.5, 0.0866, 0.5))


def test_fashion_mnist_has_its_published_statistics() -> None:
    source = open_source(DataConfig(val_size=0))
    assert statistics(source.read("train")[0]) == (INFO.mean, INFO.std)


def idx(images: np.ndarray) -> bytes:
    head = struct.pack(">BBBB", 0, 0, 8, images.ndim) + struct.pack(f">{images.ndim}I", *images.shape)
    return head + images.tobytes()


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_sets_in_the_files_of_mnist_are_read_under_their_own_names(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name.upper() / "raw"
    folder.mkdir(parents=True)
    images = np.random.default_rng(2).integers(0, 256, (30, 28, 28), np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    for part, count in (("train", 30), ("t10k", 5)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images[:count]))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels[:count]))
    train, test = (
        Split.load(part, DataConfig(name=name, root=str(tmp_path), val_size=0)) for part in ("train", "test")
    )  # type: ignore[arg-type]
    assert np.array_equal(train.images.numpy(), images) and np.array_equal(train.labels.numpy(), labels)
    assert len(test) == 5 and len(train.class_names) == 10 and train.info.name == name


def test_svhn_is_read_in_colour_with_the_digit_zero_as_label_zero(tmp_path: Path, monkeypatch) -> None:
    from torchvision.datasets import SVHN

    images = np.random.default_rng(3).integers(0, 256, (32, 32, 3, 20), np.uint8)
    labels = np.arange(1, 21)[:, None] % 10
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": np.where(labels == 0, 10, labels)})
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)  # these are not the published files
    split = Split.load("train", DataConfig(name="svhn", root=str(tmp_path), val_size=0))
    assert np.array_equal(split.images.numpy(), images.transpose(3, 2, 0, 1))
    assert np.array_equal(split.labels.numpy(), labels[:, 0])


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_a_set_that_is_not_there_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"data\.name {name}: torchvision cannot read it in") as caught:
        open_source(DataConfig(name=name, root=str(tmp_path)), fetch=True)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_run_keeps_what_is_to_know_of_its_data_set(tmp_path: Path) -> None:
    info = DataInfo(
        name="npz", title="set", class_names=("a", "b", "c"), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6),
        shape=(3, 9, 12), num_train=7, num_val=2,
    )  # fmt: skip
    (tmp_path / DATA_FILE).write_text(json.dumps(info.to_json()))
    assert read_info(tmp_path) == info
    model, augment = build_network(Config(model=ModelConfig(name="cnn")), info, torch.device("cpu"), load_weights=True)
    assert augment.mean == info.mean and model(torch.zeros(2, 3, 28, 28)).shape == (2, 3)


def test_a_run_knows_the_mean_of_images_that_its_limit_leaves_out(tmp_path: Path) -> None:
    """They are no part of the digests of its own images, but decide what the model sees of these."""
    found = []
    for changed in (False, True):
        images = GREY.copy()
        cfg = DataConfig(name="npz", root=npz(tmp_path, train_images=images, train_labels=LABELS), val_size=0, limit=8)
        left = sorted(set(range(20)) - set(open_source(cfg).read("train")[2].tolist()))
        if changed:
            images[left] = 255
            npz(tmp_path, train_images=images, train_labels=LABELS)
        split = Split.load("train", cfg)
        info = split.info
        found.append(fingerprint({"train": split.digest}, info.class_names, (*info.mean, *info.std), None))
    assert [name for name in found[0] if found[0][name] != found[1][name]] == [STATISTICS]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": [0.3]}, "does not hold the mean and std that the run was trained with"),
        ({"class_names": list("abcdefghij")}, "does not hold the class names that the run was trained with"),
        ({"class_names": list("abcdefghij"), "std": [0.1]}, "does not hold the class names and mean and std that"),
        (None, "is missing: it names the classes of the run"),
    ],
)
def test_another_data_json_than_the_runs_is_refused(change: dict[str, Any] | None, words: str, tmp_path: Path) -> None:
    set_of_five = write_npz(tmp_path / "five.npz", 5, (9, 12))
    run = untrained_on(set_of_five, tmp_path / "run")
    info = read_info(run)
    keep_fingerprint(fingerprint({}, info.class_names, (*info.mean, *info.std), None), run)
    assert open_trained(run, "cpu").info == info
    if change is None:
        (run / DATA_FILE).unlink()
    else:
        (run / DATA_FILE).write_text(json.dumps(info.to_json() | change))
    with pytest.raises(ValueError, match=f"data.json {words}"):
        open_trained(run, "cpu")


def test_fashion_mnist_has_all_but_the_validation_images_for_training() -> None:
    assert (published(5000).num_train, published(5000).num_val) == (55_000, 5000)


@pytest.mark.parametrize(
    "change", [{"mean": []}, {"std": [0.0]}, {"class_names": "ab"}, {"shape": [1, 28]}, {"mean": ["x"]}, {"name": None}]
)
def test_a_damaged_data_json_is_one_line(change: dict[str, object], tmp_path: Path) -> None:
    content = {key: value for key, value in (INFO.to_json() | change).items() if value is not None}
    (tmp_path / DATA_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"data\.json was not written by a run"):
        read_info(tmp_path)
