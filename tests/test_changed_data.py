"""Images that changed between two starts of a run: the same resume, others are refused and named, nothing is lost."""

import gzip
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from idx_files import to_idx
from PIL import Image
from small import kill

import fmnist
from fmnist.checkpoint.contents import MODEL
from fmnist.checkpoint.fingerprint import CLASSES as CLASSES_KEY
from fmnist.checkpoint.fingerprint import IMAGES, STATISTICS, class_changes, fingerprint, what_changed
from fmnist.config.schema import DataConfig
from fmnist.data.registry import open_source
from fmnist.data.sources import cache as cache_file
from fmnist.data.sources.cache import cache_folder
from fmnist.data.sources.layout import Found, wait_for_another_time
from fmnist.data.split import Split
from fmnist.runtime.files import sha256_of
from fmnist.trained import open_trained

CLASSES = ("cat", "dog", "eel")
EACH = 12
Change = Callable[[Path], Path | None]  # of the images in a place; another place where they were moved


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMNIST_CACHE", str(tmp_path / "cache"))


def noise(*key: int) -> np.ndarray:
    return np.random.default_rng(key).integers(0, 256, (12, 12), dtype=np.uint8)


def save(path: Path, *key: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(*key)).save(path)


def folder(root: Path) -> Path:
    for number, name in enumerate(CLASSES):
        for index in range(EACH):
            save(root / name / f"{index:02}.png", number, index)
    return root


def arrays() -> dict[str, np.ndarray]:
    labels = np.arange(EACH * len(CLASSES)) % len(CLASSES)
    images = np.stack([noise(label, index) for index, label in enumerate(labels)])
    return {"train_images": images, "train_labels": labels, "class_names": np.array(CLASSES)}


def npz(root: Path) -> Path:
    root.parent.mkdir(parents=True, exist_ok=True)
    path = root.with_suffix(".npz")
    np.savez(path, **arrays())
    return path


def idx(root: Path) -> Path:
    root.mkdir(parents=True)
    images = np.stack([np.kron(noise(index), np.ones((3, 3), np.uint8))[:28, :28] for index in range(60)])
    labels = (np.arange(60) % 10).astype(np.uint8)
    for name, count in (("train", 40), ("t10k", 20)):
        (root / f"{name}-images-idx3-ubyte").write_bytes(to_idx((count, 28, 28), images[:count].tobytes()))
        (root / f"{name}-labels-idx1-ubyte").write_bytes(to_idx((count,), labels[:count].tobytes()))
    return root


MAKE = {"folder": folder, "npz": npz, "fashion_mnist": idx}


def go(run: Path, name: str, place: Path, steps: int = 4) -> fmnist.RunResults:
    """Train a few steps, with a checkpoint after each, or go on."""
    return fmnist.train(
        ROOT / "configs" / "mlp.yaml",
        output_dir=str(run),
        model={"name": "cnn", "options": {"widths": [4, 8]}, "precision": "fp32", "drop_rate": 0.0},
        data={"name": name, "root": str(place)} | ({"val_size": 6} if name != "folder" else {}),
        batch={"global_batch_size": 8},
        schedule={"steps": steps, "warmup_epochs": 0.0},
        evaluation={"every_steps": 2, "test": False},
        optim={"ema_decay": 0.0},
        checkpoint={"every_steps": 1, "keep_last": 4},
        log={"every_steps": 1, "wandb": "disabled"},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind of data."""
    above = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMNIST_CACHE", str(above / "cache"))
        return {name: go(above / name / "run", name, make(above / name / "images")).directory
                for name, make in MAKE.items()}  # fmt: skip


def state(directory: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): path.stat() for path in directory.rglob("*")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items() if not name.endswith(".lock")}


def rewritten(path: Path) -> None:
    """Write the same bytes again: another inode, another time."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def with_arrays(**changes: Any) -> Change:
    def change(path: Path) -> None:
        np.savez(path, **{name: value for name, value in (arrays() | changes).items() if value is not None})

    return change


def moved(place: Path) -> Path:
    return place.rename(place.with_name("moved" + place.suffix))


def linked(place: Path) -> Path:
    (link := place.with_name("link")).symlink_to(place)
    return link


def each_file(work: Callable[[Path], object]) -> Change:
    def change(place: Path) -> None:
        for path in [place] if place.is_file() else sorted(place.rglob("*.*g")) or sorted(place.iterdir()):
            work(path)

    return change


def packed(path: Path) -> None:
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())
    path.unlink()


def repacked(path: Path) -> None:
    """Write the same arrays compressed, in another order."""
    np.savez_compressed(path, **dict(reversed(arrays().items())))
    assert zipfile.ZipFile(path).infolist()[0].compress_type


def run_among_them(place: Path) -> None:
    """Keep other runs among the pictures, as whoever starts one in the folder does."""
    for name in ("runs/a", "runs/more/b"):
        for file in (
            "config.yaml",
            "metrics.jsonl",
            "learning_curves.png",
            "checkpoints/step_00000001/model.safetensors",
        ):
            (place / name / file).parent.mkdir(parents=True, exist_ok=True)
            (place / name / file).write_text("x")


def each_file_of_the_cache(place: Path) -> None:
    for path in cache_folder().iterdir():
        path.write_bytes(path.read_bytes()[:-1])


def beside(place: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "cat/notes.txt", "cat/.hidden.png", "@eaDir/x.png"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("x")


# What leaves the images as they are.
SAME: dict[str, tuple[str, Change]] = {
    "files touched": ("folder", each_file(os.utime)),
    "files written again": ("folder", each_file(rewritten)),
    "files closed to others": ("folder", each_file(lambda path: path.chmod(0o400))),
    "folder moved": ("folder", moved),
    "folder linked": ("folder", linked),
    "cache deleted": ("folder", lambda place: shutil.rmtree(cache_folder(), ignore_errors=True)),
    "cache damaged": ("folder", each_file_of_the_cache),
    "system files": ("folder", beside),
    "runs in the folder": ("folder", run_among_them),
    "npz touched": ("npz", each_file(os.utime)),
    "npz moved": ("npz", moved),
    "npz packed otherwise": ("npz", repacked),
    "idx touched": ("fashion_mnist", each_file(os.utime)),
    "idx moved": ("fashion_mnist", moved),
    "idx packed": ("fashion_mnist", each_file(packed)),
}


def kept_of(name: str, place: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """What a run that began on these images keeps of them: fingerprint.json and data.json."""
    source = open_source(DataConfig(name=name, root=str(place), val_size=6 if name != "folder" else 5_000))
    splits = {part: Split.load(part, source) for part in ("train", "val", "test")}  # type: ignore[arg-type]
    digests, info = {part: split.digest for part, split in splits.items()}, splits["train"].info
    kept = fingerprint(digests, info.class_names, (*info.mean, *info.std), None)
    return kept, info.to_json() | {f"num_{part}": len(split) for part, split in splits.items()}


@pytest.mark.parametrize("case", SAME)
def test_the_same_images_are_known_again(case: str, tmp_path: Path) -> None:
    name, change = SAME[case]
    place = MAKE[name](tmp_path / "images")
    before = kept_of(name, place)
    kept, about = kept_of(name, change(place) or place)
    assert kept == before[0] and about | {"title": before[1]["title"], "source": before[1]["source"]} == before[1]


def test_a_cache_of_another_version_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path / "images")
    before, files = kept_of("folder", place), state(cache_folder())
    monkeypatch.setattr(cache_file, "FORMAT", cache_file.FORMAT + 1)
    assert kept_of("folder", place) == before
    after = state(cache_folder())
    assert files.items() <= after.items() and len(after) == 2 * len(files)


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["folder moved", "npz packed otherwise", "idx packed"])
def test_a_stopped_run_resumes_on_them_with_the_same_bits(case: str, runs: dict[str, Path], tmp_path: Path) -> None:
    name, change = SAME[case]
    run = Path(shutil.copytree(runs[name], tmp_path / "run"))
    place = MAKE[name](tmp_path / "images")
    kill(run)
    assert go(run, name, change(place) or place).summary["status"] == "finished"
    assert sha256_of(run / MODEL) == sha256_of(runs[name] / MODEL)


def added(place: Path) -> None:
    save(place / "cat" / "new.png", 7)


def edited(place: Path) -> None:
    """Put another picture in place, of the same size in bytes, and give it the time of the one before."""
    path = place / "cat" / "00.png"
    status = path.stat()
    save(path, 8)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def in_parts(*names: str) -> Change:
    def change(place: Path) -> None:
        classes = sorted(place.iterdir())
        (place / "train").mkdir()
        for path in classes:
            path.rename(place / "train" / path.name)
        for number, name in enumerate(names, 50):
            for label in CLASSES:
                save(place / name / label / "0.png", number)

    return change


def relabelled(place: Path) -> None:
    (place / "cat" / "03.png").rename(place / "dog" / "moved.png")


def renamed(old: str, new: str) -> Change:
    def change(place: Path) -> None:
        (place / old).rename(place / new)

    return change


def idx_of(name: str, change: Callable[[bytes], bytes]) -> Change:
    def work(place: Path) -> None:
        path = place / f"{name}-ubyte"
        path.write_bytes(change(path.read_bytes()))

    return work


def fewer(images: np.ndarray) -> dict[str, np.ndarray]:
    return {"train_images": images[:-3], "train_labels": arrays()["train_labels"][:-3]}


IMAGES_OF = (
    "{} images in data.root was sha256 [0-9a-f]+, now sha256 [0-9a-f]+ \\({} as before, of other content or in another"
)
TRAIN, ANY = IMAGES_OF.format("training", 30), IMAGES_OF.format("(training|validation|test)", "(30|3)")
GONE = "there is no .*; if it was moved, give its new place: --data.root PATH"
# What makes them others, and what is said of it. Of 12 pictures a class one goes to val and one to test, whichever.
OTHER: dict[str, tuple[str, Change, str]] = {
    "file added": ("folder", added, "training images in data.root: 30 before, now 31"),
    "file removed": ("folder", lambda place: (place / "dog" / "05.png").unlink(), "training .*: 30 before, now 29"),
    "file edited": ("folder", edited, ANY),
    "file of another class": ("folder", relabelled, ANY),
    "file renamed": ("folder", renamed("cat/00.png", "cat/zz.png"), ANY),
    "class renamed": ("folder", renamed("dog", "wolf"), "class names in data.root: without dog and with wolf"),
    "class renamed and moved": ("folder", renamed("dog", "ant"), "names in data.root: without dog and with ant"),
    "class added": (
        "folder",
        lambda place: save(place / "fox" / "a.png", 9),
        "class names in data.root: with fox; training images in data.root: 30 before, now 31",
    ),
    "class removed": ("folder", lambda place: shutil.rmtree(place / "eel"), "class names in data.root: without eel; "),
    "class without pictures": ("folder", lambda place: (place / "fox").mkdir(), "fox holds no .*: an empty class"),
    "all in train": ("folder", in_parts(), "val_size is 5000, more than half of the 36 training"),
    "parts": ("folder", in_parts("val", "test"), "training images in data.root: 30 before, now 36; validation images"),
    "part beside classes": ("folder", lambda place: save(place / "val" / "cat" / "a.png", 9), "mixes two layouts"),
    "folder gone": ("folder", lambda place: shutil.rmtree(place), GONE),
    "npz relabelled": ("npz", with_arrays(train_labels=(arrays()["train_labels"] + 1) % 3), TRAIN),
    "npz fewer": ("npz", with_arrays(**fewer(arrays()["train_images"])), "training .*: 30 before, now 27"),
    "npz other pixels": ("npz", with_arrays(train_images=arrays()["train_images"] ^ 1), TRAIN),
    "npz class names": (
        "npz", with_arrays(class_names=np.array(["cat", "dog", "fox"])), "data.root: without eel and with fox$"
    ),
    "npz without class names": ("npz", with_arrays(class_names=None), "without cat, dog, eel and with 0, 1, 2$"),
    "npz class names in another order": (
        "npz", with_arrays(class_names=np.array(["dog", "cat", "eel"])), "data.root: the same in another order$"
    ),
    "npz with val": (
        "npz",
        with_arrays(val_images=noise(1)[None], val_labels=np.array([2])),
        "^training images in data.root: 30 before, now 36; validation images in data.root: 6 before, now 1$",
    ),
    "npz with test": (
        "npz",
        with_arrays(test_images=noise(1)[None], test_labels=np.array([2])),
        "^test images in data.root: 0 before, now 1$",
    ),
    "npz gone": ("npz", lambda place: place.unlink(), GONE),
    "idx relabelled": (
        "fashion_mnist", idx_of("train-labels-idx1", lambda content: content[:-1] + b"\x01"), "images in .* was sha256"
    ),
    "idx other test pixels": (
        "fashion_mnist",
        idx_of("t10k-images-idx3", lambda content: content[:-1] + b"\xff"),
        "^" + IMAGES_OF.format("test", 20) + r" order\)$",
    ),
    "idx cut short": ("fashion_mnist", idx_of("t10k-images-idx3", lambda content: content[:-1]), "t10k-images"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_other_images_are_told_by_what_changed(case: str, tmp_path: Path) -> None:
    name, change, words = OTHER[case]
    place = MAKE[name](tmp_path / "images")
    before = kept_of(name, place)
    try:
        now = kept_of(name, change(place) or place)
        said = "; ".join(what_changed(before[0], now[0], before[1], now[1]))
    except ValueError as error:
        said = str(error)
    assert re.search(words, said), said
    assert "\n" not in said


@pytest.mark.thorough
@pytest.mark.parametrize("case", OTHER)
def test_other_images_are_refused_by_what_changed_and_the_run_is_left_as_it_is(
    case: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    name, change, words = OTHER[case]
    run = Path(shutil.copytree(runs[name], tmp_path / "run"))
    place = MAKE[name](tmp_path / "images")
    kept_of(name, place)  # as the run read them: a folder has its cache
    kill(run)
    before = state(run)
    words = words.strip("^$") + (
        "[.] Restore what it began with, or give another --output_dir" if words.endswith("$") else ""
    )
    with pytest.raises(ValueError, match=words) as caught:
        go(run, name, change(place) or place)
    assert "\n" not in str(caught.value) and state(run) == before


@pytest.mark.thorough
def test_images_put_back_resume_where_the_run_stopped(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["folder"], tmp_path / "run"))
    place, aside = folder(tmp_path / "images"), tmp_path / "aside"
    kill(run)
    (place / "dog").rename(aside)
    with pytest.raises(
        ValueError, match="class names in data.root: without dog; training images .*: 30 before, now 20"
    ):
        go(run, "folder", place)
    aside.rename(place / "dog")
    assert go(run, "folder", place).summary["status"] == "finished"
    assert sha256_of(run / MODEL) == sha256_of(runs["folder"] / MODEL)


@pytest.mark.thorough
def test_a_run_in_the_folder_itself_resumes(runs: dict[str, Path], tmp_path: Path) -> None:
    place = folder(tmp_path / "images")
    run = place / "runs" / "mine"
    shutil.copytree(runs["folder"], run)
    kill(run)
    assert go(run, "folder", place).summary["status"] == "finished"
    assert sha256_of(run / MODEL) == sha256_of(runs["folder"] / MODEL)


def test_a_folder_of_something_beside_runs_is_a_class(tmp_path: Path) -> None:
    place = folder(tmp_path / "images")
    run_among_them(place)
    save(place / "runs" / "more" / "own.png", 3)
    assert open_source(DataConfig(name="folder", root=str(place))).info.class_names == (*CLASSES, "runs")


@pytest.mark.parametrize(
    ("age_ns", "waits"),
    [
        (1_000_001, 0.02),  # written a millisecond ago: another write could still get this time
        (30_000_001, 0),
        (-5_000_001, 0.02),  # a server's clock is ahead
        (1_000_000_000, 2),  # of whole seconds: FAT's clock
        (2_000_000_000, 0),
    ],
)
def test_files_just_written_are_decoded_when_their_time_is_over(
    age_ns: int, waits: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written again within a tick of the file system's clock would pass for what was decoded."""
    slept: list[float] = []
    now = 1_700_000_000 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: now)
    monkeypatch.setattr(time, "sleep", slept.append)
    old = Found("", "cat", "a.png", "cat/a.png", (9, 1, 1), "")
    wait_for_another_time([old, old._replace(version=(9, 5, now - age_ns)), old])
    assert sum(slept) == waits


@pytest.mark.thorough
def test_evaluation_refuses_images_of_other_classes(runs: dict[str, Path], tmp_path: Path) -> None:
    """A class that was renamed in the folder may stand in another place: its images would be scored as another's."""
    trained = open_trained(runs["folder"])
    for new, differ in (("ant", "without dog and with ant"), ("wolf", "without dog and with wolf")):
        place = folder(tmp_path / new)
        assert len(trained.split("test", str(place))) == 3
        (place / "dog").rename(place / new)
        with pytest.raises(ValueError, match=f"{new} does not hold the classes of run: {differ}"):
            trained.split("test", str(place))


def test_what_changed_is_said_as_far_as_it_is_known() -> None:
    train, classes = IMAGES["train"], CLASSES_KEY
    before, now = (
        {train: "a" * 64, classes: "b" * 64, STATISTICS: "c" * 64},
        dict.fromkeys((train, classes, STATISTICS), "d" * 64),
    )
    about, about_now = {"class_names": ["x", "y"], "num_train": 1000}, {"class_names": ["y", "x"], "num_train": 2000}
    digests = [
        f"{classes} was sha256 {'b' * 12}, now sha256 {'d' * 12}",
        f"{train} was sha256 {'a' * 12}, now sha256 {'d' * 12}",
    ]
    assert what_changed(before, before, about, about_now) == []
    assert what_changed(before, now, about, about_now) == [
        f"{classes}: the same in another order",
        f"{train}: 1,000 before, now 2,000",
    ]
    for unknown in ({}, {"class_names": None, "num_train": "many"}):  # a run from before data.json, or another's file
        assert what_changed(before, now, unknown, about_now) == digests
    assert what_changed({STATISTICS: "a"}, {STATISTICS: "b", train: "c"}, {}, {}) == [f"{STATISTICS} was a, now b"]
    assert class_changes([f"class {number}" for number in range(1000)], ["cat"]).startswith(
        "without class 0, class 1, "
    )
    assert len(class_changes([f"class {number}" for number in range(1000)], ["cat"])) < 300
    assert class_changes(["a\x1b[31m"], ["a"]).isprintable()
