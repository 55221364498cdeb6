"""Find Fashion-MNIST: the search order, layouts that tools leave, folders that are refused and left alone."""

import gzip
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, execute
from idx_files import NAMES, TEST_LABELS, TRAIN_IMAGES, assert_one_line, write_small

from fmnist.config.schema import DataConfig
from fmnist.data import find
from fmnist.data.fashion_mnist import load, load_split
from fmnist.data.find import locate
from fmnist.data.split import Split

pytestmark = pytest.mark.usefixtures("no_data_named")


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder with its time of modification: what must not change where a folder is refused."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


# ---- where the files are found


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    debian = write_small(tmp_path / "debian")
    monkeypatch.setattr(find, "DEBIAN_FOLDER", debian)
    assert locate() == debian
    data = write_small(tmp_path / "data")
    assert locate() == data
    raw = write_small(tmp_path / "data" / "FashionMNIST" / "raw")
    assert locate() == raw
    named = write_small(tmp_path / "named")
    monkeypatch.setenv("FMNIST_DATA", str(named))
    assert locate() == named
    torchvision_raw = write_small(tmp_path / "torchvision" / "FashionMNIST" / "raw")
    assert locate(str(tmp_path / "torchvision")) == torchvision_raw
    assert locate(str(torchvision_raw)) == torchvision_raw
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/named") == named


def packed_two(folder: Path) -> None:
    for name in (TRAIN_IMAGES, TEST_LABELS):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()


def dotted(folder: Path) -> None:
    for name in NAMES:
        (folder / name).rename(folder / name.replace("-idx", ".idx"))


def dotted_and_packed(folder: Path) -> None:
    for name in NAMES:
        (folder / f"{name.replace('-idx', '.idx')}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()


def folder_for_each(folder: Path) -> None:
    for name in NAMES:
        (folder / name).rename(folder / "moving")
        (folder / name).mkdir()
        (folder / "moving").rename(folder / name / name)


def folder_beside_dotted(folder: Path) -> None:
    """Kaggle's archive of MNIST holds both."""
    folder_for_each(folder)
    for name in NAMES:
        (folder / name.replace("-idx", ".idx")).write_bytes((folder / name / name).read_bytes())


@pytest.mark.parametrize("arrange", [packed_two, dotted, dotted_and_packed, folder_for_each, folder_beside_dotted])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_layouts_that_tools_leave_are_read(arrange, below: str, tmp_path: Path) -> None:
    folder = write_small(tmp_path / "named" / below)
    expected = {split: load(split, str(folder)) for split in ("train", "test")}
    arrange(folder)
    for split, tensors in expected.items():
        found = load(split, str(tmp_path / "named"))
        assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))
    assert expected["train"][1].tolist() == [*range(10), *range(10)]
    assert expected["test"][1].tolist() == [*range(10)]


# ---- what is refused, and left as it was


def photos(folder: Path) -> str:
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"):
        (folder / name).write_bytes(b"\xff\xd8")
    return "found a.jpg, b.jpg, c.jpg, d.jpg and 2 more;"


def csv_files(folder: Path) -> str:
    folder.mkdir()
    for name in ("fashion-mnist_test.csv", "fashion-mnist_train.csv"):
        (folder / name).write_text("label,pixel1\n")
    return "found fashion-mnist_test.csv, fashion-mnist_train.csv;"


def odd_names(folder: Path) -> str:
    folder.mkdir()
    (folder / "a\n\x1b[31mred").write_text("")
    return "found a [31mred;"


def empty(folder: Path) -> str:
    folder.mkdir()
    return "found nothing;"


def absent(folder: Path) -> str:
    return "found no such folder;"


def a_file(folder: Path) -> str:
    folder.write_text("a file")
    return "found Not a directory;"


def circle(folder: Path) -> str:
    folder.symlink_to(folder)
    return "found Too many levels of symbolic links;"


@pytest.mark.parametrize("make", [photos, csv_files, odd_names, empty, absent, a_file, circle])
@pytest.mark.parametrize("origin", ["data.root", "$FMNIST_DATA"])
def test_a_named_folder_without_the_data_is_refused_and_left_alone(
    make, origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make(tmp_path / "named")
    root = None if origin == "$FMNIST_DATA" else str(tmp_path / "named")
    if root is None:
        monkeypatch.setenv("FMNIST_DATA", str(tmp_path / "named"))
    before = tree(tmp_path)
    with pytest.raises(ValueError) as error:
        locate(root, fetch=True)
    way_out = "unset FMNIST_DATA" if root is None else "leave data.root out"
    assert_one_line(
        error,
        f"{origin}: no Fashion-MNIST in {tmp_path / 'named'}: expected {', '.join(NAMES)} (plain or .gz), {found}",
        f"{way_out} and train.py fetches it into data/FashionMNIST/raw",
    )
    assert "\x1b" not in str(error.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("origin", ["data.root", "$FMNIST_DATA", "data"])
def test_an_incomplete_folder_is_refused(
    name: str, origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_small(tmp_path / ("data" if origin == "data" else "partial"))
    (folder / name).unlink()
    monkeypatch.setattr(find, "DEBIAN_FOLDER", tmp_path / "absent")
    if origin == "$FMNIST_DATA":
        monkeypatch.setenv("FMNIST_DATA", str(folder))
    before = tree(tmp_path)
    with pytest.raises(ValueError) as error:
        locate(str(folder) if origin == "data.root" else None, fetch=True)
    assert_one_line(error, f"{origin}: {folder} lacks {name} (plain or .gz), but holds the others")
    assert tree(tmp_path) == before


def test_only_a_caller_that_says_so_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """evaluate.py and the apps do not: one line says who does, and nothing is written."""
    monkeypatch.setattr(find, "DEBIAN_FOLDER", tmp_path / "absent")
    for load_it in (
        locate,
        lambda: load("test"),
        lambda: load_split("val", None, 5000),
        lambda: Split.load("train", DataConfig(), torch.device("cpu")),
    ):
        with pytest.raises(ValueError) as error:
            load_it()
        places = f"data/FashionMNIST/raw, data or {tmp_path / 'absent'}"
        assert_one_line(error, f"no Fashion-MNIST in {places}", "only train.py fetches it", "--data.root FOLDER")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_looked_for_before_torch_is_imported(tmp_path: Path) -> None:
    code = "import sys; from fmnist.data.find import locate; print(locate(sys.argv[1]), 'torch' in sys.modules)"
    folder = write_small(tmp_path / "named")
    done = execute(sys.executable, "-c", code, folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert done.stdout.split() == [str(folder), "False"]
