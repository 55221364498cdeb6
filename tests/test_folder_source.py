"""Folders of pictures by class: every layout and file its tensors or one line, decoded once, whatever stops that."""

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, metrics
from idx_files import to_idx
from PIL import Image
from safetensors.torch import load_file

import fmnist
from fmnist.apps.data.__main__ import main as data_main
from fmnist.checkpoint.fingerprint import CLASSES, IMAGES, kept_fingerprint
from fmnist.config.schema import DataConfig
from fmnist.data.fashion_mnist import CLASS_NAMES, load
from fmnist.data.photos import DRAWN, find_pictures
from fmnist.data.registry import open_source
from fmnist.data.sources import decode, facts, fill
from fmnist.data.sources.cache import Cache, cache_folder
from fmnist.data.sources.facts import split_by_content
from fmnist.data.sources.folder import Decoded, read_folder
from fmnist.data.sources.layout import list_pictures
from fmnist.data.split import Split
from fmnist.runtime.files import read_json
from fmnist.trained import open_trained

OPTIONS: dict[str, Any] = {"stored_size": None, "fit": "crop", "bad_files": "refuse", "holdout": 0.1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FMNIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(root: Path, **options: Any) -> Decoded:
    return read_folder(root, **OPTIONS | options)


def noise(seed: int, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def two_classes(root: Path, number: int = 4, **options: Any) -> Path:
    """Write classes cat and dog of so many PNG of noise each."""
    for label in ("cat", "dog"):
        for index in range(number):
            save(root / label / f"{index:03}.png", noise(hash_of(f"{label}{index}"), **options))
    return root


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def names_of(decoded: Decoded, part: str) -> list[str]:
    return [decoded.files[at] for at in decoded.parts.get(part, torch.zeros(0, dtype=torch.int64))]


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in root.rglob("*")}


# The same tensors


def test_fashion_mnist_as_png_is_fashion_mnist(tmp_path: Path, real_folder: Path) -> None:
    images, labels = load("train", str(real_folder))
    for index in range(300):
        name = CLASS_NAMES[labels[index]].replace("/", "_")
        save(tmp_path / "png" / name / f"{index:05}.png", Image.fromarray(images[index].numpy()))
    before = snapshot(tmp_path / "png")
    decoded = read(tmp_path / "png")
    assert torch.equal(decoded.images[:, 0], images[:300]) and decoded.images.dtype == torch.uint8
    names = [decoded.class_names[label] for label in decoded.labels]
    assert names == [CLASS_NAMES[label].replace("/", "_") for label in labels[:300]]
    assert decoded.class_names == tuple(sorted(set(names))) and decoded.labels.dtype == torch.int64
    train = images[decoded.parts["train"]].double() / 255
    assert decoded.mean == (round(train.mean().item(), 4),)
    assert decoded.std == (round(train.std(correction=0).item(), 4),)
    for part, positions in decoded.parts.items():
        split = Split(images=images[positions], labels=decoded.labels[positions])
        assert decoded.digests[part] == split.digest
    assert snapshot(tmp_path / "png") == before
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".npy", ".json", ".lock"}


# The 2,000 training images from here on have the mean and std of all 60,000 to four digits, 0.2860 and 0.3530. A folder
# is normalised by its own, Fashion-MNIST's files by those published: with others the weights would rightly differ.
FIRST, NUM_TRAIN, NUM_TEST = 10014, 2000, 500


@pytest.mark.thorough
@pytest.mark.parametrize("model", [{"name": "mlp"}, {"name": "cnn", "options": {"widths": [8, 16, 32]}}], ids=str)
def test_a_run_on_png_files_ends_with_the_bits_of_one_on_idx_files(
    model: dict[str, Any], tmp_path: Path, real_folder: Path
) -> None:
    (tmp_path / "idx").mkdir()
    for part, prefix, first, count in (("train", "train", FIRST, NUM_TRAIN), ("test", "t10k", 0, NUM_TEST)):
        images, labels = (tensor[first : first + count] for tensor in load(part, str(real_folder)))  # type: ignore[arg-type]
        idx = tmp_path / "idx" / prefix
        idx.with_name(f"{prefix}-images-idx3-ubyte").write_bytes(to_idx((count, 28, 28), images.numpy().tobytes()))
        idx.with_name(f"{prefix}-labels-idx1-ubyte").write_bytes(to_idx((count,), labels.byte().numpy().tobytes()))
        for index, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
            name = f"{label} {CLASS_NAMES[label]}".replace("/", "_")
            save(tmp_path / "png" / part / name / f"{index:05}.png", Image.fromarray(image), compress_level=1)

    def run(source: str, folder: str) -> Path:
        return fmnist.train(
            ROOT / "configs" / "mlp.yaml",
            output_dir=str(tmp_path / source),
            model={"options": {}, "precision": "fp32"} | model,
            data={"name": source, "root": str(tmp_path / folder), "val_size": 200},
            batch={"global_batch_size": 64},
            augment={"rotation": 10.0, "shift": 0.1, "erase": 0.25},
            schedule={"steps": 30, "warmup_epochs": 0.5},
            evaluation={"every_steps": 15},
            log={"every_steps": 5, "wandb": "disabled"},
        ).directory

    png, idx = run("folder", "png"), run("fashion_mnist", "idx")
    assert metrics(png) == metrics(idx) and metrics(png)[-1]["step"] == 30
    kept = [kept_fingerprint(directory) for directory in (png, idx)]
    assert [kept[0][name] for name in IMAGES.values()] == [kept[1][name] for name in IMAGES.values()]
    assert kept[0][CLASSES] != kept[1][CLASSES]  # the folders' names are "0 T-shirt_top" and so on
    weights, others = (load_file(directory / "model.safetensors") for directory in (png, idx))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    tested = [read_json(directory / "summary.json") for directory in (png, idx)]
    assert tested[0]["test.num_images"] == NUM_TEST and tested[0]["test.loss"] == tested[1]["test.loss"]
    (png / "data.json").unlink()
    with pytest.raises(ValueError, match=r"data.json is missing: it names the classes of the run$"):
        open_trained(png)


@pytest.mark.slow
def test_all_of_fashion_mnist_as_png(tmp_path: Path, real_folder: Path) -> None:
    expected = {}
    for part in ("train", "test"):
        images, labels = expected[part] = load(part, str(real_folder))  # type: ignore[arg-type]
        for index, (image, label) in enumerate(zip(images.numpy(), labels, strict=True)):
            save(
                tmp_path / "png" / part / str(int(label)) / f"{index:05}.png", Image.fromarray(image), compress_level=1
            )
    decoded = read(tmp_path / "png")
    assert decoded.mean == (0.2860,) and decoded.std == (0.3530,)
    for part, (images, labels) in expected.items():
        assert torch.equal(decoded.images[decoded.parts[part], 0], images)
        assert torch.equal(decoded.labels[decoded.parts[part]], labels)


def test_colours_mean_and_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "CHUNK_BYTES", 3000)  # of 20 images of 432 bytes
    decoded = read(two_classes(tmp_path / "root", 10), holdout=0.2)
    assert decoded.images.shape == (20, 3, 12, 12)
    first = np.asarray(Image.open(tmp_path / "root" / decoded.files[3])).transpose(2, 0, 1)
    assert np.array_equal(decoded.images[3].numpy(), first)
    train = decoded.images[decoded.parts["train"]].double() / 255
    assert decoded.mean == tuple(round(value, 4) for value in train.mean((0, 2, 3)).tolist())
    assert decoded.std == tuple(round(value, 4) for value in train.std((0, 2, 3), correction=0).tolist())
    assert {part: len(at) for part, at in decoded.parts.items()} == {"train": 12, "val": 4, "test": 4}
    at = decoded.parts["train"]
    assert decoded.digests["train"] == Split(images=decoded.images[at], labels=decoded.labels[at]).digest


def test_pixels_that_are_written_to_stay_in_memory(tmp_path: Path) -> None:
    first = read(two_classes(tmp_path / "root"))
    kept = first.images.clone()
    first.images.zero_()
    assert torch.equal(read(tmp_path / "root").images, kept)


def test_a_channel_of_one_value_has_std_1(tmp_path: Path) -> None:
    for index in range(6):
        save(tmp_path / "root" / "ab"[index % 2] / f"{index}.png", Image.new("RGB", (9, 9), (index, 255, 0)))
    decoded = read(tmp_path / "root")
    assert decoded.mean[1:] == (1.0, 0.0) and decoded.std[1:] == (1.0, 1.0)


# Layouts


def test_parts_that_are_there_are_taken(tmp_path: Path) -> None:
    for part, number in (("train", 3), ("val", 1), ("test", 2)):
        two_classes(tmp_path / "root" / part, number)
    save(tmp_path / "root" / "train" / "bird" / "deep" / "er" / "z.png", noise(5))  # in train alone, in sub-folders
    (tmp_path / "root" / "test" / "empty").mkdir()
    (tmp_path / "root" / "annotations").mkdir()
    (tmp_path / "root" / "annotations" / "boxes.csv").write_text("")
    decoded = read(tmp_path / "root", holdout=0.4)
    assert decoded.class_names == ("bird", "cat", "dog")
    assert decoded.files == (
        *("train/cat/000.png", "train/dog/000.png", "train/cat/001.png", "train/dog/001.png", "train/cat/002.png"),
        *("train/dog/002.png", "train/bird/deep/er/z.png", "val/cat/000.png", "val/dog/000.png", "test/cat/000.png"),
        *("test/dog/000.png", "test/cat/001.png", "test/dog/001.png"),
    )
    assert {part: at.tolist() for part, at in decoded.parts.items()} == {
        "train": [*range(7)],
        "val": [7, 8],
        "test": [*range(9, 13)],
    }
    shutil.rmtree(tmp_path / "root" / "val")
    assert set(read(tmp_path / "root").parts) == {"train", "test"}
    shutil.rmtree(tmp_path / "root" / "test")
    assert {part: len(at) for part, at in read(tmp_path / "root").parts.items()} == {"train": 7}


def test_classes_may_be_called_as_a_part(tmp_path: Path) -> None:
    two_classes(tmp_path / "flat")
    save(tmp_path / "flat" / "train" / "a.png", noise(9))  # a picture, so no part
    assert read(tmp_path / "flat").class_names == ("cat", "dog", "train")
    two_classes(tmp_path / "parts" / "train")
    save(tmp_path / "parts" / "train" / "train" / "a.png", noise(9))
    decoded = read(tmp_path / "parts")
    assert decoded.class_names == ("cat", "dog", "train") and set(decoded.parts) == {"train"}


def test_odd_names_and_links_are_read(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "root")
    for index, name in enumerate(
        (b'it\'s "a".png', b"new\nline.PNG", "emoji \N{CAT FACE}.JPG".encode(), b"\xff\xfe.png")
    ):
        shutil.copy(save(tmp_path / "one.png", noise(100 + index)), os.path.join(os.fsencode(root / "cat"), name))
    save(root / "l'\N{DOG FACE} $x_1$" / "a.png", noise(7))
    save(tmp_path / "elsewhere" / "far.png", noise(8))
    (root / "dog" / "link.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (root / "fish").symlink_to(tmp_path / "elsewhere")
    decoded = read(root)
    assert decoded.class_names == ("cat", "dog", "fish", "l'\N{DOG FACE} $x_1$")
    assert len(decoded.files) == 8 + 4 + 1 + 1 + 1 and "fish/far.png" in decoded.files
    assert os.fsdecode(b"cat/\xff\xfe.png") in read(root).files  # from the cache too
    assert json.loads(next((tmp_path / "cache").glob("*.json")).read_text())["facts"]["shape"] == [15, 3, 12, 12]


def test_what_is_no_picture_is_counted_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = two_classes(tmp_path / "root")
    for name in ("cat/Thumbs.db", "cat/notes.txt", "dog/more.txt", "README", ".DS_Store", "dog/._000.png"):
        (root / name).write_text("x")
    for name in ("run/config.yaml", "run/metrics.jsonl", "cat/run/config.yaml", "cat/run/metrics.jsonl"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    save(root / "run" / "learning_curves.png", noise(1))
    save(root / "__MACOSX" / "cat" / "a.png", noise(2))
    save(root / "dog" / "@eaDir" / "000.png" / "thumbnail.jpg", noise(3))
    save(root / ".ipynb_checkpoints" / "a.png", noise(4))
    with caplog.at_level(logging.INFO):
        assert len(read(root).files) == 8
    (line,) = [record.getMessage() for record in caplog.records if "no pictures" in record.getMessage()]
    assert all(
        f"{count} {kind}" in line for count, kind in ((5, "made by fmnist"), (3, "hidden"), (2, ".txt"), (1, ".db"))
    )


def test_what_this_program_draws_into_a_data_set_is_no_picture_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = two_classes(tmp_path / "root", 10)
    monkeypatch.chdir(root)  # where `fmnist data .` writes its folder samples
    for _ in range(2):
        assert data_main([".", "--json"]) == 0
        assert sorted(path.name for path in (root / "samples").iterdir()) == ["augmented.png", "samples.png"]
    assert data_main([".", "--output", "."]) == 0 and data_main([".", "--output", "cat"]) == 0
    decoded = read(root)
    assert decoded.class_names == ("cat", "dog") and len(decoded.files) == 20
    left_out = Counter[str]()
    assert len(list(find_pictures([str(root)], left_out))) == 20 and left_out == {"made by fmnist": 6}
    save(root / "cat" / "learning_curves.png", noise(1))  # somebody's own
    assert len(read(root).files) == 21


def test_every_picture_that_the_program_names_is_known_as_its_own() -> None:
    texts = [path.read_text() for path in (ROOT / "fmnist").rglob("*.py") if path.parts[-2] != "benchmark"]
    names = {name for text in texts for name in re.findall(r'"([a-z_]+\.png)"', text)}
    assert names == DRAWN and {"samples.png", "search.png"} < names


@pytest.mark.parametrize("place", ["", "cat", "dog/deep", "link"])
def test_a_run_among_the_pictures_is_refused_and_beside_them_is_not(tmp_path: Path, place: str) -> None:
    root = two_classes(tmp_path / "root")
    save(root / "dog" / "deep" / "a.png", noise(1))
    (root.parent / "link").symlink_to(root)
    before = sorted(root.rglob("*"))

    def go(directory: Path) -> None:
        fmnist.train(
            "configs/mlp.yaml",
            output_dir=str(directory),
            data={"name": "folder", "root": str(root)},
            batch={"global_batch_size": 2},
            augment={"size": 28},
            schedule={"steps": 1, "warmup_epochs": 0.0},
        )

    with pytest.raises(ValueError, match=r"output_dir .* holds the pictures of data.root; give another place"):
        go(root.parent / "link" if place == "link" else root / place)
    assert sorted(root.rglob("*")) == before
    go(root / "runs" / "x")
    assert len(read(root).files) == 9


# The split


def contents(decoded: Decoded, root: Path) -> dict[str, set[bytes]]:
    return {part: {(root / name).read_bytes() for name in names_of(decoded, part)} for part in decoded.parts}


def test_the_split_depends_on_the_content_alone(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "root", 40)
    before = contents(read(root), root)
    assert {part: len(files) for part, files in before.items()} == {"train": 64, "val": 8, "test": 8}
    moved = tmp_path / "moved"
    for index, path in enumerate(sorted(root.rglob("*.png"), reverse=True)):
        target = moved / {"cat": "zebra", "dog": "ant"}[path.parent.name] / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    assert contents(read(moved), moved) == before
    for index in range(4):
        save(root / "cat" / f"new{index}.png", noise(1000 + index))
    after = contents(read(root), root)
    moves = sum(len(before[part] - after[part]) for part in before)
    assert moves <= 4 and not before["val"] & after["test"] and not before["test"] & after["val"]


def test_each_class_has_its_share() -> None:
    def sizes(count: int, holdout: float = 0.1) -> tuple[int, ...]:
        parts = split_by_content([0] * count, [str(hash_of(str(at))) for at in range(count)], holdout)
        assert sorted(at for positions in parts.values() for at in positions) == [*range(count)]
        return tuple(len(parts[name]) for name in ("train", "val", "test"))

    assert [sizes(count) for count in (1, 2, 3, 4, 10, 100, 105)] == [
        *((1, 0, 0), (2, 0, 0), (1, 1, 1), (2, 1, 1), (8, 1, 1), (80, 10, 10)),
        (85, 10, 10),  # 10.5 is 10
    ]
    assert sizes(5, 0.45) == (1, 2, 2) and sizes(50, 0.0) == (50, 0, 0)


def test_copies_stay_together_where_that_can_be() -> None:
    # Twenty files in ten pairs, a tenth each: a pair to val, a pair to test.
    parts = split_by_content([0] * 20, [f"{at // 2}" for at in range(20)], 0.1)
    assert (parts["val"], parts["test"]) == ([0, 1], [18, 19])
    # Ten files of one content cannot be kept apart: they still have a val and a test.
    parts = split_by_content([0] * 10, ["a"] * 10, 0.1)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [8, 1, 1]


# Pixels


def in_shape(path: Path, shape: tuple[int, int, int], fit: Any = "crop") -> np.ndarray:
    with path.open("rb") as stream:
        return decode.in_shape(stream, shape, fit)


def test_a_picture_that_fits_is_not_resampled(tmp_path: Path) -> None:
    image = noise(0, (40, 29))
    path = save(tmp_path / "a.png", image)
    pixels = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(in_shape(path, (3, 29, 29)), pixels[:, :, 5:34])  # the middle: 11 columns less, 5 on the left
    assert np.array_equal(in_shape(path, (3, 29, 40)), pixels)
    padded = in_shape(path, (3, 40, 40), "pad")
    assert np.array_equal(padded[:, 6:35], pixels)  # 11 rows more, 6 above
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1)
    assert np.array_equal(padded[:, 0, 0], np.rint(border.mean(1)))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (37, 51), (1200, 900)])
def test_resizing_is_antialiased(tmp_path: Path, size: tuple[int, int]) -> None:
    smooth = noise(1, (9, 7)).resize(size, Image.Resampling.BICUBIC)
    for name, tolerance in (("a.png", 1.5), ("a.jpg", 3.0)):
        path = save(tmp_path / name, smooth, **({"quality": 98, "subsampling": 0} if name == "a.jpg" else {}))
        width, height = size
        side = min(size)
        box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
        expected = np.asarray(smooth.crop(box).resize((64, 64), Image.Resampling.LANCZOS), dtype=float)
        found = in_shape(path, (3, 64, 64)).transpose(1, 2, 0)
        assert np.abs(found - expected).mean() < tolerance
        scaled = [max(1, round(64 * each / max(size))) for each in size]
        padded = in_shape(path, (3, 64, 64), "pad").transpose(1, 2, 0)
        top, left = ((64 - each + 1) // 2 for each in (scaled[1], scaled[0]))
        expected = np.asarray(smooth.resize((scaled[0], scaled[1]), Image.Resampling.LANCZOS), dtype=float)
        assert np.abs(padded[top : top + scaled[1], left : left + scaled[0]] - expected).mean() < tolerance
    # Lines of one pixel average to grey: no aliasing.
    lines = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (512, 256)))
    found = in_shape(save(tmp_path / "lines.png", lines), (1, 64, 64))
    middle = found[:, 4:-4, 4:-4]
    assert middle.min() >= 120 and middle.max() <= 135


def test_a_large_picture_keeps_its_detail(tmp_path: Path) -> None:
    # 1,000 px to 800: what was shrunk to 512 before would have lost its stripes of 4 px.
    stripes = Image.fromarray(np.tile(np.repeat(np.array([0, 255], np.uint8), 4), (1000, 125)))
    for name in ("a.png", "a.jpg"):
        assert in_shape(save(tmp_path / name, stripes), (1, 800, 800)).std() > 90
    huge = Image.new("L", (12_000, 9_000), 250)  # more than Pillow opens; read at an eighth
    assert in_shape(save(tmp_path / "huge.jpg", huge), (1, 64, 64)).mean() == pytest.approx(250, abs=1)


def test_every_kind_of_file_gives_its_pixels(tmp_path: Path) -> None:
    grey, colour = noise(0, mode="L"), noise(0)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    clear = colour.convert("RGBA")
    clear.putalpha(Image.new("L", (12, 12), 0))
    half = Image.new("LA", (12, 12), (0, 128))
    animated = [noise(5, mode="L"), noise(6, mode="L")]
    for name, image, shape, expected in (
        ("l.png", grey, 1, grey),
        ("l.png", grey, 3, grey.convert("RGB")),
        ("rgb.png", colour, 3, colour),
        ("deep.png", deep, 1, grey),
        ("deep.tif", deep, 1, grey),
        ("1.png", grey.convert("1"), 1, grey.convert("1").convert("L")),
        ("p.png", colour.quantize(200), 3, colour.quantize(200).convert("RGB")),
        ("p.gif", grey, 1, grey),
        ("rgb.bmp", colour, 3, colour),
        ("rgb.webp", colour, 3, colour),
        ("clear.png", clear, 3, Image.new("RGB", (12, 12), "white")),
        ("half.png", half, 1, Image.new("L", (12, 12), 127)),  # 255 * (1 - 128 / 255)
    ):
        options = {"lossless": True} if name.endswith(".webp") else {}
        found = in_shape(save(tmp_path / name, image, **options), (shape, 12, 12))
        pixels = np.asarray(expected)
        assert np.array_equal(found, pixels[None] if shape == 1 else pixels.transpose(2, 0, 1)), name
        header = decode.read_header(tmp_path / name)
        assert header == (12, 12, name not in ("rgb.png", "p.png", "rgb.bmp", "rgb.webp", "clear.png")), name
    animated[0].save(tmp_path / "moving.gif", save_all=True, append_images=animated[1:], duration=100)
    assert np.array_equal(in_shape(tmp_path / "moving.gif", (1, 12, 12))[0], np.asarray(animated[0]))
    plain = Image.new("RGB", (64, 64), (200, 60, 20))
    cmyk = in_shape(save(tmp_path / "cmyk.jpg", plain.convert("CMYK"), quality=95), (3, 64, 64))
    assert np.abs(cmyk.mean((1, 2)) - (200, 60, 20)).max() < 4


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_turns_pictures_before_they_are_measured(tmp_path: Path, suffix: str) -> None:
    upright = Image.new("L", (40, 20), 0)
    upright.paste(255, (0, 0, 10, 20))  # light on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    save(tmp_path / "root" / "a" / f"0.{suffix}", upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    save(tmp_path / "root" / "b" / "1.png", upright)
    decoded = read(tmp_path / "root")
    assert decoded.images.shape[-2:] == (20, 40)  # one size: they are kept as they are
    assert decoded.images[0, 0, :, :8].min() > 240 and decoded.images[0, 0, :, 14:].max() < 15


def test_a_turn_that_xmp_tells_counts_too(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image = Image.new("L", (20, 40))
    for name in ("a.jpg", "b.webp"):
        assert decode.read_header(save(tmp_path / name, image, xmp=xmp)) == (40, 20, name == "a.jpg")
        assert in_shape(tmp_path / name, (3, 20, 40)).shape == (3, 20, 40)


def test_stored_sizes(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "root", size=(30, 20))
    assert read(root).images.shape == (8, 3, 20, 30)
    assert read(root, stored_size=20).images.shape == (8, 3, 20, 20)
    assert read(root, stored_size=48, fit="pad").images.shape == (8, 3, 48, 48)
    padded = read(root, fit="pad")
    assert padded.images.shape == (8, 3, 30, 30) and np.array_equal(padded.images[..., 5:25, :], read(root).images)
    given = DataConfig(name="folder", root=str(root))
    assert open_source(given).remarks(given) == [
        "images of 30 x 20 pixels are stretched to squares; data.fit pad keeps their proportions"
    ]
    assert open_source(replace(given, fit="pad")).remarks(given) == []
    save(root / "dog" / "other.png", noise(3, (31, 20)))
    assert read(root).images.shape == (9, 3, 256, 256)
    large = two_classes(tmp_path / "large", 2, size=(513, 20))
    assert read(large).images.shape == (4, 3, 256, 256)
    grey = two_classes(tmp_path / "grey", 3, mode="L")
    assert read(grey).images.shape == (6, 1, 12, 12)
    save(grey / "cat" / "a.png", noise(3))
    assert read(grey).images.shape == (7, 3, 12, 12)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_extreme_pictures(tmp_path: Path, size: tuple[int, int], fit: str) -> None:
    two_classes(tmp_path / "root", 2)
    for name in ("z.png", "z.jpg"):
        save(tmp_path / "root" / "cat" / name, Image.new("RGB", size, (50, 100, 150)))
    decoded = read(tmp_path / "root", fit=fit)
    assert decoded.images.shape == (6, 3, 256, 256)
    at = decoded.files.index("cat/z.png")
    assert (decoded.images[at].amax((1, 2)) - decoded.images[at].amin((1, 2))).max() == 0


# Room


def test_what_does_not_fit_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "root", 5)
    asked: list[int] = []

    def fits(number: int) -> str:
        asked.append(number)
        return "" if number <= 10 * 3 * 100 * 100 else "the device has 300,000 bytes"

    def never(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(fill, "read_picture", never)
    with pytest.raises(ValueError, match=r"the device has 300,000 bytes; .*--data.stored_size 96$") as caught:
        read(root, stored_size=256, fits=fits)
    assert asked[0] == 10 * 3 * 256 * 256 and "10 images of 3 x 256 x 256" in str(caught.value)
    with pytest.raises(ValueError, match="nor would a smaller size"):
        read(root, stored_size=256, fits=lambda number: "no room")
    monkeypatch.setattr(Cache, "room", lambda self: 10 * 3 * 64 * 64)
    with pytest.raises(ValueError, match=r"GB free.*FMNIST_CACHE.*--data.stored_size 64$"):
        read(root, stored_size=65)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"] * 2
    monkeypatch.undo()
    monkeypatch.setenv("FMNIST_CACHE", str(tmp_path / "cache"))
    assert read(root, stored_size=96, fits=fits).images.shape == (10, 3, 96, 96)
    with pytest.raises(ValueError, match="too small a device"):  # a cache that a larger machine made
        read(root, stored_size=96, fits=lambda number: "too small a device")


def test_few_pictures_are_in_memory_at_a_time() -> None:
    done = []
    results = decode.in_threads(lambda item: done.append(item) or item, range(1000), "test")  # type: ignore[func-returns-value]
    assert [next(results) for _ in range(10)] == [*range(10)]
    time.sleep(0.2)
    assert len(done) <= 11 + decode.AHEAD * decode.available_cores()
    results.close()


# Bad folders


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def half_a_jpeg() -> bytes:
    path = Path(os.environ["FMNIST_CACHE"]).with_name("whole.jpg")
    return save(path, noise(0, (200, 200))).read_bytes()[:9000]


def write(name: str, content: Callable[[], bytes] | bytes = b"x") -> Callable[[Path], object]:
    def change(root: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content())

    return change


def in_parts(*parts: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        shutil.rmtree(root)
        for part in parts:
            two_classes(root / part)

    return change


def then(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for each in changes:
            each(root)

    return change


def picture(name: str | bytes) -> Callable[[Path], object]:
    return lambda root: save(Path(os.fsdecode(os.path.join(os.fsencode(root), os.fsencode(name)))), noise(77))


def only(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    """Begin with an empty folder."""
    return then(shutil.rmtree, Path.mkdir, *changes)


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda root: (root / name).symlink_to(root if target == "ROOT" else target)


def folder_at(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).mkdir()


# What happens to a good folder, root, with classes cat and dog, and what is said.
LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (shutil.rmtree, "root cannot be read: no such file or directory"),
    "a file": (then(shutil.rmtree, Path.touch), "root cannot be read: not a directory"),
    "a link to itself": (then(shutil.rmtree, link(".", "ROOT")), "root cannot be read: too many levels of symbolic"),
    "empty": (only(), "root holds no pictures"),
    "one class": (only(picture("cat/a.png")), "one class only, cat; expected a folder a class, two or more"),
    "too deep": (only(picture("all/cat/a.png"), picture("all/dog/a.png")), r"one class only, all; .*is .*/all meant\?"),
    "parts too deep": (only(picture("all/train/a/1.png"), picture("all/test/b/1.png")), r"; is .*root/all meant\?"),
    "an empty class": (folder_at("fish"), "root/fish holds no pictures .*an empty class"),
    "a class of text files": (write("fish/a.txt"), "root/fish holds no pictures"),
    "pictures in no class": (picture("a.png"), "root/a.png: a picture in no class"),
    "a part beside classes": (picture("train/cat/a.png"), "mixes two layouts: train .*beside cat"),
    "a part beside pictures": (
        then(in_parts("train"), picture("test/1.png")),
        "root/test holds pictures directly, such as 1.png",
    ),
    "a picture in a part": (
        then(in_parts("train", "test"), picture("train/a.png")),
        "root/train holds pictures .*a.png",
    ),
    "no train": (in_parts("val", "test"), "has val and test, but no train"),
    "valid for val": (in_parts("train", "valid"), "root/valid holds folders.*call it val"),
    "Train for train": (in_parts("Train", "Test"), "root/Test holds folders.*call it test"),
    "parts without classes": (
        only(picture("train/a.png"), picture("test/b.png")),
        "hold pictures directly; expected a folder a class in each",
    ),
    "parts in classes": (
        only(*(picture(f"{label}/{part}/a.png") for label in ("cat", "dog") for part in ("train", "test"))),
        "root/cat/test: a part inside a class; expected test/cat",
    ),
    "a class that train lacks": (
        then(in_parts("train", "test"), picture("test/fish/a.png")),
        "root/test/fish: train has no pictures of this class; its classes: cat, dog",
    ),
    "a class empty in train": (
        then(in_parts("train", "test"), folder_at("train/fish")),
        "root/train/fish holds no pictures",
    ),
    "names that differ in case": (picture("Cat/a.png"), "folders Cat and cat differ in upper and lower case only"),
    "names that differ in form": (
        then(picture("e\u0301/a.png"), picture("\u00e9/a.png")),
        r"'e\\u0301' and '\\xe9' differ in how Unicode",
    ),
    "a line break in a class": (picture("a\nb/a.png"), r"class folder 'a\\nb' has a control character"),
    "bytes in a class": (picture(b"a\xffb/a.png"), r"class folder 'a\\udcffb' has .*no UTF-8"),
    "a loop": (link("cat/up", "ROOT"), "one folder; a link may not lead to it again"),
    "a loop to the class": (link("cat/again", "."), "root/cat/again and .*root/cat are one folder"),
    "one folder twice": (link("kitten", "cat"), "kitten and .*cat are one folder"),
    "a lost class": (link("fish", "/nowhere"), "root/fish: a link to nothing"),
    "a run beside one class": (
        only(picture("cat/a.png"), write("run/config.yaml"), write("run/metrics.jsonl")),
        "one class only, cat",
    ),
}

FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "text": (write("cat/a.jpg", b"no picture\n" * 9), "cat/a.jpg", "not a JPEG, PNG, WEBP, GIF, BMP or TIFF picture"),
    "zero bytes": (write("cat/a.jpg", b""), "cat/a.jpg", "an empty file"),
    "truncated": (write("dog/a.jpg", half_a_jpeg), "dog/a.jpg", "truncated"),
    "a bomb": (write("dog/a.png", bomb), "dog/a.png", "pixels"),
    "another format": (write("dog/a.heic"), "dog/a.heic", ".heic is not read; convert it to JPEG or PNG"),
    "a lost link": (link("cat/a.png", "/nowhere/a.png"), "cat/a.png", "a link to nothing"),
    "a link to itself": (link("cat/a.png", "a.png"), "cat/a.png", "a link to nothing"),
    "a lost folder": (link("cat/more", "/nowhere"), "cat/more", "a link to nothing"),
    "a pipe": (lambda root: os.mkfifo(root / "cat" / "a.png"), "cat/a.png", "not a regular file"),
    "a device": (link("cat/a.png", "/dev/zero"), "cat/a.png", "regular file"),
    "a line break": (write("cat/a\nb.png"), "cat/a\nb.png", "not a JPEG"),
    "bytes": (write(os.fsdecode(b"cat/\xff.png")), os.fsdecode(b"cat/\xff.png"), "not a JPEG"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_folder_of_neither_layout_is_refused(tmp_path: Path, case: str) -> None:
    root = two_classes(tmp_path / "root")
    change, expected = LAYOUTS[case]
    change(root)
    for bad_files in ("refuse", "skip"):
        with pytest.raises(ValueError, match=expected) as caught:
            read(root, bad_files=bad_files)
        assert str(caught.value).isprintable()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_refused_or_skipped(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    root = two_classes(tmp_path / "root")
    expected = read(root)
    change, name, why = FILES[case]
    change(root)
    with pytest.raises(ValueError) as caught:
        read(root)
    message = str(caught.value)
    assert "1 of 9 pictures that cannot be read" in message and why in message and message.isprintable()
    assert "--data.bad_files skip" in message
    for _ in range(2):  # decoded, and from the cache
        caplog.clear()
        decoded = read(root, bad_files="skip")
        ((skipped, reason),) = decoded.skipped
        assert skipped == name and why in reason
        assert decoded.files == expected.files and torch.equal(decoded.images, expected.images)
        assert [
            record.getMessage().isprintable() for record in caplog.records if "skipped 1 of 9" in record.message
        ] == [True]


def test_many_bad_files_are_counted(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "root")
    for index in range(20):
        write(f"dog/z{index:02}.jpg", half_a_jpeg)(root)  # known only when they are decoded
    with pytest.raises(
        ValueError, match=r"20 of 28 pictures that cannot be read: .*z00.*z01.*z02.* and 17 more; repair"
    ):
        read(root)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    decoded = read(root, bad_files="skip")
    assert len(decoded.skipped) == 20 and decoded.images.shape == (8, 3, 12, 12)
    for path in (root / "dog").glob("0*"):
        path.unlink()
    with pytest.raises(ValueError, match="no picture of class dog to train on can be read; 20 of 24"):
        read(root, bad_files="skip")
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no picture of class cat to train on can be read; 4 of 24"):
        read(root, bad_files="skip")


def test_files_that_go_or_change_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "root")
    real = fill.stored_shape

    def change(*args: Any) -> Any:  # after the headers, before the pixels
        monkeypatch.setattr(fill, "stored_shape", real)
        (root / "cat" / "001.png").unlink()
        save(root / "dog" / "002.png", noise(99))
        (root / "dog" / "003.png").chmod(0)
        return real(*args)

    def refusing(path: Path) -> Any:
        if path.name == "003.png" and path.parent.name == "dog":
            raise PermissionError(13, "Permission denied", str(path))  # root may read everything
        return open_regular(path)

    open_regular = decode.open_regular
    monkeypatch.setattr(fill, "stored_shape", change)
    decoded = read_with(monkeypatch, refusing, root)
    assert decoded.skipped == (
        ("cat/001.png", "No such file or directory"),
        ("dog/002.png", "changed while the folder was read"),
        ("dog/003.png", "Permission denied"),
    )
    monkeypatch.undo()
    monkeypatch.setenv("FMNIST_CACHE", str(tmp_path / "cache"))
    again = read(root, bad_files="skip")  # the folder is another one now
    assert not again.skipped and len(again.files) == 7


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(30, 50), (30, 40)])
def test_a_skipped_picture_decides_nothing(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1400)  # Pillow itself opens twice as many
    root = two_classes(tmp_path / "root", mode="L")
    expected = read(root)
    # Its header is good, of colour and of another size, or of more pixels than are decoded.
    path = save(root / "cat" / "0.png", Image.new("RGB", size))
    path.write_bytes(path.read_bytes()[:-30] if size == (30, 40) else path.read_bytes())
    decoded = read(root, bad_files="skip")
    assert [name for name, _ in decoded.skipped] == ["cat/0.png"] and decoded.digests == expected.digests
    assert torch.equal(decoded.images, expected.images) and decoded.images.shape == (8, 1, 12, 12)


def test_what_fits_is_asked_again_without_the_skipped(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "root", 2, size=(400, 400))
    write("dog/a.jpg", half_a_jpeg)(root)  # of 200 px: with it all would be kept at 256
    with pytest.raises(ValueError, match="4 images of 3 x 400 x 400 .* do not fit: no room; .*--data.stored_size 256"):
        read(root, bad_files="skip", fits=lambda number: "no room" if number > 5 * 3 * 256 * 256 else "")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert read(root, bad_files="skip").images.shape == (4, 3, 400, 400)


def test_every_bad_file_is_in_the_count(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "root")
    for change, _, _ in (FILES["zero bytes"], FILES["truncated"], FILES["a lost folder"]):
        change(root)
    with pytest.raises(ValueError, match="3 of 11 pictures that cannot be read: .*empty.*nothing.*truncated"):
        read(root)


def read_with(monkeypatch: pytest.MonkeyPatch, opener: Callable[[Path], Any], root: Path) -> Decoded:
    monkeypatch.setattr(decode, "open_regular", opener)
    return read(root, bad_files="skip")


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scandir = two_classes(tmp_path / "root"), os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match="root/dog cannot be read: permission denied"):
        read(root, bad_files="skip")


# The cache


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded."""
    real, seen = fill.read_picture, []

    def noted(path: Path, *args: Any) -> Any:
        seen.append(path)
        return real(path, *args)

    monkeypatch.setattr(fill, "read_picture", noted)
    return seen


def test_a_folder_is_decoded_once(tmp_path: Path, decoding: list[Path]) -> None:
    root = two_classes(tmp_path / "root")
    first = read(root)
    assert len(decoding) == 8
    second = read(root)
    assert len(decoding) == 8 and torch.equal(first.images, second.images)
    for name in ("labels", "class_names", "files", "mean", "std", "skipped", "digests"):
        one, other = getattr(first, name), getattr(second, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert all(torch.equal(second.parts[part], at) for part, at in first.parts.items())
    for options in ({"stored_size": 8}, {"fit": "pad"}, {"holdout": 0.3}, {"bad_files": "skip"}):
        decoding.clear()
        read(root, **options)
        assert len(decoding) == 8


def test_a_change_of_any_file_is_seen(tmp_path: Path, decoding: list[Path]) -> None:
    root = two_classes(tmp_path / "root")
    path = root / "cat" / "000.png"
    for change in (
        lambda: save(root / "cat" / "new.png", noise(1)),
        lambda: path.rename(root / "cat" / "renamed.png"),
        lambda: (root / "cat" / "001.png").rename(root / "dog" / "moved.png"),
        lambda: (root / "dog" / "000.png").unlink(),
        lambda: os.utime(root / "dog" / "001.png", ns=(1, 1)),
    ):
        read(root)
        decoding.clear()
        change()
        read(root)
        assert decoding
    # Another picture with the size and the time of the one before.
    path, status = root / "dog" / "001.png", (root / "dog" / "001.png").stat()
    content = bytearray(path.read_bytes())
    save(tmp_path / "other.bmp", noise(1))
    path.write_bytes(content[:-1] + b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    decoding.clear()
    read(root, bad_files="skip")
    assert decoding


@pytest.mark.parametrize(
    "damage", ["short", "long", "empty", "header", "gone", "dtype", "json", "value", "list", "nothing"]
)
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, cache: Path, damage: str, decoding: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = two_classes(tmp_path / "root")
    kept = read(root).images.clone()
    (array,), (mark,) = cache.glob("*.npy"), cache.glob("*.json")
    content, text = array.read_bytes(), mark.read_text()
    if damage == "gone":
        array.unlink()
    elif damage == "dtype":
        np.save(array, np.zeros(kept.shape, np.int8))
    elif damage in ("short", "long", "empty", "header"):
        array.write_bytes({"short": content[:-1], "long": content + b"x", "empty": b"", "header": b"x" * 90}[damage])
    else:
        other = text.replace('"labels": [0', '"labels": [1')
        mark.write_text({"json": text[:-9], "value": other, "list": "[]", "nothing": ""}[damage])
    decoding.clear()
    caplog.clear()
    decoded = read(root)
    assert torch.equal(decoded.images, kept) and decoded.labels[0] == 0 and len(decoding) == 8
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "root is decoded again" in warnings[0]
    decoding.clear()
    read(root)
    assert not decoding and sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]


@pytest.mark.parametrize("parts", [("",), ("train",), ("train", "test"), ("train", "val", "test")])
@pytest.mark.parametrize("options", [{}, {"limit": 6}, {"folds": 2, "fold": 0}])
def test_damaged_pixels_are_refused_however_they_are_divided(
    tmp_path: Path, cache: Path, parts: tuple[str, ...], options: dict[str, Any]
) -> None:
    for part in parts:
        two_classes(tmp_path / "root" / part, 8)
    cfg = DataConfig(name="folder", root=str(tmp_path / "root"), val_size=4, **options)
    source = open_source(cfg)
    whole = {name: source.read(name) for name in ("train", "val", "test")}  # type: ignore[arg-type]
    assert len(whole["val"][1]) == {("",): 2, ("train",): 4, ("train", "test"): 4}.get(parts, 16) or cfg.folds
    (array,) = cache.glob("*.npy")
    content = bytearray(array.read_bytes())
    for at in range(128, len(content), 3 * 12 * 12):  # a bit of each image, behind the header
        content[at] ^= 1
    array.write_bytes(content)
    damaged = open_source(cfg)
    for name in ("train", "val"):
        with pytest.raises(
            ValueError, match=r"data.root: the decoded \w+ images of \S+ are damaged: delete their cache"
        ):
            damaged.read(name)  # type: ignore[arg-type]


# Of the splits train, val and test: those whose images and labels are what the cache's parts were checked as, or a cut.
@pytest.mark.parametrize(
    ("parts", "options", "known"),
    [
        (("",), {}, {"train", "val", "test"}),
        (("train",), {}, {"train", "val"}),  # validation images are held out of its train, and it has no test
        (("train", "test"), {}, {"train", "val", "test"}),
        (("train", "val", "test"), {}, {"train", "val", "test"}),
        (("train", "val"), {"limit": 3}, {"val"}),
        (("train", "val"), {"corrections": "audit.csv"}, {"val"}),
        (("train", "val"), {"folds": 2, "fold": 1}, set()),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pixels_compared_with_their_digest_are_not_hashed_again(
    tmp_path: Path, parts: tuple[str, ...], options: dict[str, Any], known: set[str], mode: str
) -> None:
    for part in parts:
        two_classes(tmp_path / "root" / part, 8, mode=mode)
    if "corrections" in options:
        row = "1,train,0,cat,dog,0.1,relabel\n"
        (tmp_path / "audit.csv").write_text(f"rank,split,index,label,suggested,own_probability,decision\n{row}")
        options = {"corrections": str(tmp_path / "audit.csv")}
    source = open_source(DataConfig(name="folder", root=str(tmp_path / "root"), val_size=4, holdout=0.2, **options))
    splits = {name: Split.load(name, source) for name in ("train", "val", "test")}  # type: ignore[arg-type]
    assert {name for name, split in splits.items() if "digest" in vars(split)} == known
    for split in splits.values():
        assert split.digest == Split(images=split.images, labels=split.labels).digest


@pytest.mark.parametrize(
    ("parts", "hashed"),
    [
        (("",), 1),
        (("train", "val", "test"), 1),
        (("train", "test"), 1 + 2 / 3),  # train, two of three pictures, by its digest and by those of its two splits
    ],
)
def test_a_start_reads_the_pixels_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[str, ...], hashed: float
) -> None:
    for part, count in zip(parts, (8, 4, 4) if len(parts) == 2 else (8, 8, 8), strict=False):
        two_classes(tmp_path / "root" / part, count)
    bytes_of: Counter[str] = Counter()

    def counting(module: str) -> Any:
        def make(start: bytes = b"") -> Any:
            real = hashlib.sha256(start)

            def update(data: Any) -> None:
                bytes_of[module] += memoryview(data).nbytes * (memoryview(data).format == "B")  # pixels, and few others
                real.update(data)

            return SimpleNamespace(update=update, hexdigest=real.hexdigest)

        return SimpleNamespace(sha256=make)

    for module in ("mapped", "sources.folder", "sources.facts"):
        monkeypatch.setattr(f"fmnist.data.{module}.hashlib", counting(module))
    pixels = 12 * 12 * 3 * len(list((tmp_path / "root").rglob("*.png")))
    digests = []
    for expected in ({"sources.facts": 1, "sources.folder": hashed - 1}, {"sources.folder": hashed}):
        bytes_of.clear()
        source = open_source(DataConfig(name="folder", root=str(tmp_path / "root"), val_size=4))
        splits = [Split.load(name, source, read=False) for name in ("train", "val", "test")]  # type: ignore[arg-type]
        placed = [replace(split, sha256=split.digest) for split in splits]  # as `place` does
        digests.append([split.digest for split in placed])  # as the fingerprint does
        assert {module: round(count / pixels, 1) for module, count in bytes_of.items() if count > 200} == {
            module: round(times, 1) for module, times in expected.items() if times
        }
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("parts", "unused"),
    [
        (("",), ["val_size 3"]),
        (("train",), ["holdout 0.2"]),
        (("train", "test"), ["holdout 0.2"]),
        (("train", "val"), ["val_size 3", "holdout 0.2"]),
    ],
)
def test_options_that_a_folder_has_no_use_for_are_said(
    tmp_path: Path, parts: tuple[str, ...], unused: list[str]
) -> None:
    for part in parts:
        two_classes(tmp_path / "root" / part)
    given = DataConfig(name="folder", root=str(tmp_path / "root"), val_size=3, holdout=0.2)
    said = open_source(given).remarks(given)
    assert [line.partition(" has no effect: ")[0] for line in said] == [f"data.{name}" for name in unused]
    assert open_source(given).remarks(DataConfig(name="folder")) == []


def test_a_cache_that_may_not_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "root")
    kept = read(root).images

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr("fmnist.data.sources.cache.FileLock", refused)
    assert torch.equal(read(root).images, kept)
    with pytest.raises(ValueError, match=r"cache, where .*cannot be written: permission denied; set FMNIST_CACHE to"):
        read(root, stored_size=16)


def test_a_wait_for_another_process_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fmnist.data.sources.cache.SAY_AFTER_S", 0.1)
    root = two_classes(tmp_path / "root")
    with ThreadPoolExecutor() as pool, caplog.at_level(logging.INFO):
        with Cache(root, OPTIONS, list_pictures(root)[0]).locked():
            reading, until = pool.submit(read, root), time.monotonic() + 60
            while not caplog.records and time.monotonic() < until:
                time.sleep(0.02)
            assert caplog.messages == [f"waiting for another process that reads {root}"]
            assert not list((tmp_path / "cache").glob("*.npy"))
        assert len(reading.result(timeout=60).files) == 8


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "root")
    for place, message in (("/dev/null/x", "not a directory"), ("/proc/nowhere", ""), (str(root / "cat"), "lies in")):
        monkeypatch.setenv("FMNIST_CACHE", place)
        with pytest.raises(ValueError, match=f"{message}.*FMNIST_CACHE"):
            read(root)
    assert not (root / "cat" / "x").exists() and len(list((root / "cat").iterdir())) == 4
    monkeypatch.setenv("FMNIST_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fmnist"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fmnist"
    monkeypatch.setenv("FMNIST_CACHE", "~/there")
    assert cache_folder() == tmp_path / "there"
    monkeypatch.setenv("FMNIST_CACHE", "x" * 5000)
    with pytest.raises(ValueError, match="cannot be written: file name too long; set FMNIST_CACHE"):
        read(root)
    monkeypatch.setenv("FMNIST_CACHE", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # an account without a home
    with pytest.raises(ValueError, match="there is no home folder .*set FMNIST_CACHE"):
        read(root)


def test_a_full_disk_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "root")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fill, "Kept", full)
    with pytest.raises(ValueError, match="cannot be written: no space left on device; set FMNIST_CACHE"):
        read(root)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_caches_of_earlier_contents_go_when_they_are_old(tmp_path: Path, cache: Path) -> None:
    root = two_classes(tmp_path / "root")
    other = two_classes(tmp_path / "other")
    read(root), read(other), read(root, stored_size=16)
    (cache / "notes-of-somebody.npy").write_text("x")
    save(root / "cat" / "new.png", noise(1))
    read(root)
    assert len(list(cache.glob("*.json"))) == 4  # the earlier one may be in use
    for path in cache.iterdir():
        os.utime(path, (1, 1))
    read(root)  # which is used again
    save(root / "cat" / "newer.png", noise(2))
    read(root)
    assert len(list(cache.glob("*.json"))) == 4 and len(list(cache.glob("*.npy"))) == 5


PROGRAM = """
import json, sys, time
from pathlib import Path
from fmnist.data.sources import fill, folder
pause, real = float(sys.argv[2]), fill.read_picture
def slow(*args):
    time.sleep(pause)
    return real(*args)
fill.read_picture = slow
print("ready", flush=True)
decoded = folder.read_folder(Path(sys.argv[1]), stored_size=16, fit="crop", bad_files="refuse", holdout=0.1)
print(json.dumps([decoded.digests, fill.read_picture.__name__]), flush=True)
"""


def program(root: Path, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(root), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )


def parts_of(cache: Path) -> list[Path]:
    return [path for path in cache.glob(".*.part") if path.stat().st_size] if cache.exists() else []


@pytest.mark.thorough
def test_killed_while_it_decodes_it_begins_again(tmp_path: Path, cache: Path) -> None:
    root = two_classes(tmp_path / "root", 30)
    first = program(root, 0.2)
    deadline = time.monotonic() + 60
    while not list(cache.glob(".*.part")) if cache.exists() else True:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not list(cache.glob("*.npy")) and not list(cache.glob("*.json"))
    save(root / "cat" / "new.png", noise(1))  # what was left is of another content
    decoded = read(root, stored_size=16)
    assert len(decoded.files) == 61
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]


@pytest.mark.thorough
def test_processes_share_one_decoding(tmp_path: Path, cache: Path) -> None:
    root = two_classes(tmp_path / "root", 20)
    pair = [program(root, 0.1) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    digests = [json.loads(out.splitlines()[-1])[0] for out, _ in told]
    assert digests[0] == digests[1] == read(root, stored_size=16).digests
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]


@pytest.mark.thorough
def test_two_runs_wait_for_a_third_that_is_killed_and_share_one_decoding(tmp_path: Path, cache: Path) -> None:
    root = two_classes(tmp_path / "root", 30)
    flags = ("--config", ROOT / "configs" / "mlp.yaml", "--log.wandb", "disabled", "--threads", 1)
    flags += ("--data.name", "folder", "--data.root", root, "--data.stored_size", 16, "--model.precision", "fp32")
    flags += ("--schedule.steps", 4, "--schedule.warmup_epochs", 0, "--batch.global_batch_size", 8)
    first = program(root, 600)  # it holds the lock, and decodes one picture in ten minutes
    try:
        started = time.monotonic()
        while not list(cache.glob(".*.part")) if cache.exists() else True:
            assert time.monotonic() < started + 60 and first.poll() is None
            time.sleep(0.05)
        logs = [(tmp_path / name).open("w+") for name in "ab"]
        runs = [
            subprocess.Popen(
                [sys.executable, "train.py", *map(str, flags), "--output_dir", str(tmp_path / f"run{number}")],
                stdout=log,
                stderr=log,
                env=environment(),
                cwd=ROOT,
            )
            for number, log in enumerate(logs)
        ]
        while not all("waiting for another process that reads" in Path(log.name).read_text() for log in logs):
            assert time.monotonic() < started + 200 and all(run.poll() is None for run in runs)
            time.sleep(0.2)
        assert not list(cache.glob("*.json"))
    finally:
        first.kill()
        first.communicate()
    assert [run.wait(timeout=200) for run in runs] == [0, 0], [Path(log.name).read_text()[-2000:] for log in logs]
    said = [Path(log.name).read_text() for log in logs]
    assert sorted(f"decoding 60 pictures of {root}" in text for text in said) == [False, True]
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]
    weights = [(tmp_path / f"run{number}" / "model.safetensors").read_bytes() for number in range(2)]
    assert weights[0] == weights[1]
