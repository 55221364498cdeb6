"""Every command after training speaks of the run's own data set: its classes, shape and splits."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import warm_train as train
from other_sets import SIZES, names, untrained_on, write_npz
from PIL import Image
from small import command

import evaluate
import fmnist
from fmnist.apps.doctor import check_data
from fmnist.apps.duplicates import main as duplicates_main
from fmnist.apps.export.__main__ import main as export_main
from fmnist.apps.monitor.__main__ import main as monitor_main
from fmnist.apps.monitor.batch import read_batch
from fmnist.apps.predict.__main__ import main as predict_main
from fmnist.apps.search.__main__ import main as search_main
from fmnist.apps.views import read_photo, view_of
from fmnist.checkpoint.run_directory import is_finished
from fmnist.config.schema import Config, DataConfig
from fmnist.data.fashion_mnist import INFO
from fmnist.data.photos import WORK_SIZE
from fmnist.data.registry import open_source
from fmnist.data.split import Split
from fmnist.evaluation.retrieval import _pixels
from fmnist.report.figures import shorten
from fmnist.trained import open_trained

NUM_CLASSES = 40


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images [24, 32, 3] of forty classes."""
    folder = tmp_path_factory.mktemp("colour")
    return untrained_on(write_npz(folder / "shapes.npz", NUM_CLASSES, (24, 32, 3)), folder / "run")


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on grey images [8, 8] of five classes, without test images."""
    folder = tmp_path_factory.mktemp("grey")
    npz = write_npz(folder / "tiny.npz", 5, (8, 8), test_images=None, test_labels=None)
    return untrained_on(npz, folder / "run")


def pixels(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, *channels), np.uint8))


def test_a_stored_image_saved_as_a_picture_is_seen_as_it_is_stored(colour: Path, tmp_path: Path) -> None:
    trained = open_trained(colour, "cpu")
    image = trained.split("test").images[5]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    photo = read_photo(str(tmp_path / "a.png"), trained.info)
    assert photo.cutout is not None and photo.cutout.box is None and not photo.cutout.inverted
    assert np.array_equal(photo.cutout.view, image.numpy())


@pytest.mark.parametrize(
    ("size", "shape", "fit", "box"),
    [
        ((100, 50), (3, 32, 32), "crop", (25, 0, 75, 50)),
        ((50, 101), (1, 32, 32), "crop", (0, 25, 50, 75)),
        ((64, 64), (3, 32, 32), "crop", None),
        ((60, 60), (3, 20, 40), "crop", (0, 15, 60, 45)),  # twice as wide as high
        ((1, 500), (3, 8, 8), "crop", (0, 249, 1, 250)),
        ((5, 3), (3, 224, 224), "crop", (1, 0, 4, 3)),
        ((100, 50), (3, 32, 32), "pad", None),
    ],
)
def test_a_picture_takes_the_shape_of_the_runs_images(size, shape, fit, box) -> None:
    info = replace(INFO, name="npz", shape=shape, mean=INFO.mean * shape[0], std=INFO.std * shape[0], fit=fit)
    for mode in ("RGB", "RGBA"):
        image = pixels(*size, mode)
        found = view_of(image, info)
        assert found.view.shape == info.image_shape and found.view.dtype == np.uint8 and found.box == box
        torch.from_numpy(found.view)  # positive strides
    seen = view_of(Image.new("RGB", size, (200, 10, 60)), info)  # one plain colour is no error here
    assert np.unique(seen.view).tolist() == (
        [10, 60, 200] if shape[0] == 3 else [73]
    )  # 72.51: 0.299 R + 0.587 G + 0.114 B


def test_padding_has_the_mean_colour_of_the_border_and_keeps_the_whole() -> None:
    info = replace(INFO, name="npz", shape=(1, 8, 8), fit="pad")
    image = Image.fromarray(np.full((4, 8), 90, np.uint8)).convert("RGB")
    assert np.unique(view_of(image, info).view).tolist() == [90]
    left_white = np.zeros((4, 8), np.uint8)
    left_white[:, 0] = 255
    # border of 4 x 8: 20 pixels, 4 of them white: 51
    view = view_of(Image.fromarray(left_white).convert("RGB"), info).view
    assert view[0].tolist() == [51] * 8 and view[4].tolist() == [255] + [0] * 7


def test_transparent_pixels_are_white() -> None:
    info = replace(INFO, name="npz", shape=(3, 8, 8), mean=INFO.mean * 3, std=INFO.std * 3)
    assert view_of(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), info).view.min() == 255


def test_predict_names_its_classes_and_shows_its_shape(colour: Path, tmp_path: Path) -> None:
    for i, (width, height) in enumerate([(300, 200), (31, 400), (32, 24)]):
        pixels(width, height).save(tmp_path / f"{i}.png")
    (tmp_path / "no.jpg").write_bytes(b"<html>")
    said = command(predict_main, colour, tmp_path, "--output", tmp_path / "out", "--top", 40)
    assert "3 predicted: " in said and "uncropped" not in said and "; 1 error\n" in said
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open(newline="", encoding="utf-8")))
    assert [row["cropped"] for row in rows] == ["yes", "yes", "no", ""]
    tops = [rows[0][f"top{place}"] for place in range(1, 41)]
    assert sorted(tops) == sorted(names(NUM_CLASSES))
    sheet = Image.open(tmp_path / "out/predictions.png").convert("RGB")
    assert any(red != green for red, green, _ in sheet.get_flattened_data())  # in colour


@pytest.mark.parametrize("option", ["--invert=always", "--invert=never", "--no-crop"])
def test_options_of_the_cut_out_are_refused_where_nothing_is_cut_out(option: str, colour: Path, tmp_path: Path) -> None:
    pixels(30, 30).save(tmp_path / "a.png")
    said = command(predict_main, colour, tmp_path / "a.png", option, "--output", tmp_path / "out", status=2)
    assert option.replace("=", " ") in said and "shapes" in said


def test_from_python_colour_arrays_may_have_their_channels_first_or_last(colour: Path, grey: Path) -> None:
    run = fmnist.open_run(colour, "cpu")
    first = run.trained.split("test").images[:3]
    last = first.movedim(1, -1).numpy()

    def classes(images) -> list[list[str]]:  # probabilities are equal to rounding: the batches differ
        return [[name for name, _ in row] for row in run.predict(images)]

    expected = classes(first)
    assert classes(last) == expected and classes(first[0]) == classes(last[0]) == expected[:1]
    assert classes([first[:2], last[2], Image.fromarray(last[1])]) == [*expected, expected[1]]
    assert set(expected[0]) <= set(names(NUM_CLASSES))
    for bad in (np.zeros((24, 32), np.uint8), np.zeros((5, 24, 32), np.uint8), np.zeros((1, 4, 24, 32), np.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 \[N, 3, H, W\]"):
            run.predict(bad)
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W\] or \[H, W\]"):
        fmnist.open_run(grey, "cpu").predict(last)


def test_search_finds_in_all_splits_there_are(colour: Path, grey: Path, tmp_path: Path) -> None:
    pixels(90, 60).save(tmp_path / "a.png")
    args = ("query", colour, "test:39", tmp_path / "a.png", "--split", "all", "--output", tmp_path / "out")
    assert f"of {sum(SIZES.values()):,} images" in command(search_main, *args)
    rows = list(csv.DictReader((tmp_path / "out/search.csv").open(newline="", encoding="utf-8")))
    assert len(rows) == 20 and {row["class"] for row in rows} <= set(names(NUM_CLASSES))
    said = command(search_main, "query", grey, "val:0", "--split", "all", "--output", tmp_path / "grey")
    assert f"of {SIZES['train'] + SIZES['val']:,} images" in said
    said = command(search_main, "query", grey, "test:0", "--output", tmp_path / "none", status=2)
    assert "tiny has no test images; run has train, val" in said


def test_an_index_of_colour_pictures_is_read_again_and_not_by_a_grey_run(
    colour: Path, grey: Path, tmp_path: Path
) -> None:
    (tmp_path / "shop").mkdir()
    for i in range(3):
        pixels(40 + i, 30).save(tmp_path / "shop" / f"{i}.png")
    index = tmp_path / "index.safetensors"
    command(search_main, "index", colour, "--folder", tmp_path / "shop", "--output", index)
    args = ("--index", index, "--output", tmp_path / "out")
    assert "the 2 nearest of 3" in command(search_main, "query", colour, tmp_path / "shop/0.png", *args)
    assert "is not an index" in command(search_main, "query", grey, tmp_path / "shop/0.png", *args, status=2)


def test_the_monitor_reads_batches_of_the_runs_shape(colour: Path, grey: Path, tmp_path: Path) -> None:
    info = open_trained(colour, "cpu").info
    first = np.random.default_rng(0).integers(0, 256, (6, 3, 24, 32), np.uint8)
    np.save(tmp_path / "first.npy", first)
    np.save(tmp_path / "last.npy", first.transpose(0, 2, 3, 1))
    for name in ("first", "last"):
        assert np.array_equal(next(read_batch(tmp_path / f"{name}.npy", info, Counter()))[0].numpy(), first)
    for shape in ((6, 24, 32), (6, 1, 24, 32), (6, 32, 24, 3), (3, 24, 32)):
        np.save(tmp_path / "bad.npy", np.zeros(shape, np.uint8))
        with pytest.raises(ValueError, match=r"expected uint8 \[N, 3, 24, 32\] or \[N, 24, 32, 3\]"):
            list(read_batch(tmp_path / "bad.npy", info, Counter()))
    found = json.loads(command(monitor_main, colour, tmp_path / "last.npy", "--json", status=None))
    assert found["num_images"] == 6 and list(found["batch_means"]["class_mix"]) == names(NUM_CLASSES)
    np.save(tmp_path / "grey.npy", np.zeros((9, 28, 28), np.uint8))
    said = command(monitor_main, grey, tmp_path / "grey.npy", status=2)
    assert "expected uint8 [N, 8, 8]" in said


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("T-shirt/top", "T-shirt/top"),
        ("x" * 24, "x" * 24),
        ("Chrysanthemum morifolium (red cross)", "Chrysanthem...red cross)"),
        ("two\nlines", "two lines"),
    ],
)
def test_long_class_names_keep_both_ends_in_figures(name: str, shown: str) -> None:
    assert shorten(name) == shown and len(shorten(name)) <= 24


def evaluated(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What evaluate.py --quick says of a run, whose files it writes."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), "--quick"])
    return command(lambda _: evaluate.main())


def test_without_test_images_val_is_evaluated_and_that_is_said(
    grey: Path, colour: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = evaluated(grey, monkeypatch)
    assert "tiny has no test images: its validation images are used" in said and "run: val images: top1" in said
    assert json.loads((grey / "evaluation/val/metrics.json").read_text())["num_images"] == SIZES["val"]
    assert "has no test images" not in evaluated(colour, monkeypatch)
    for args, words in (
        ((grey, "--split", "test"), "tiny has no test images; run has train, val"),
        ((grey, colour), "the runs are of different data sets (run: tiny, 5 classes, run: shapes, 40 classes)"),
    ):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, args), "--quick", "--comparison", str(tmp_path)])
        assert words in command(lambda _: evaluate.main(), status=2, lines=None)


def test_precision_is_measured_on_val_where_there_is_no_test(grey: Path, tmp_path: Path) -> None:
    said = command(search_main, "evaluate", grey)
    assert "120 val images among 240 training images" in said
    assert (grey / "evaluation/val/retrieval.json").is_file()


def test_large_images_are_compared_by_small_pixels() -> None:
    assert _pixels(torch.zeros(3, 3, 64, 64, dtype=torch.uint8)).shape == (3, 3 * 32 * 32)
    small = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(_pixels(small).view_as(small).to(torch.uint8), small)


@pytest.mark.parametrize("which", ["colour", "grey"])
def test_an_export_speaks_of_its_data_set_and_opens_without_the_run(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run: Path = request.getfixturevalue(which)
    evaluated(run, monkeypatch)
    split = "test" if which == "colour" else "val"
    assert f"{SIZES[split]} {split} images" in command(export_main, run, "--to", "hub", "--output", tmp_path / "hub")
    opened, trained = open_trained(tmp_path / "hub", "cpu"), open_trained(run, "cpu")
    assert opened.info == trained.info and opened.class_names == tuple(names(len(trained.class_names)))
    images = trained.split(split).images[:9]  # type: ignore[arg-type]
    assert torch.allclose(opened(images)[0], trained(images)[0], atol=1e-5)
    card = (tmp_path / "hub/README.md").read_text(encoding="utf-8")
    for word in (
        "Fashion",
        "fashion",
        "cloth",
        "Shirt",
        "light on black",
        "60,000",
        "28, 28",
        "28 x 28",
        "- mit",
        ": mit",
    ):
        assert word not in card
    title = trained.info.title
    assert f"classifies {title} at 16 px" in card and f"Source: {title}.npz" in card and "Licence: not stated" in card
    shape = "[N, 3, 24, 32]" if which == "colour" else "[N, 8, 8]"
    assert f"Take uint8 {shape}, 0 to 255" in card
    assert "240 training, 120 validation, " in card and f"one of {len(opened.class_names)} classes" in card
    assert str(run.parent) not in "".join(path.read_text("latin-1") for path in (tmp_path / "hub").iterdir())
    with pytest.raises(ValueError, match=r"data\.name is npz, which needs a file of arrays: --data\.root PATH"):
        opened.split("train")


def test_an_onnx_graph_takes_images_in_colour(colour: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert "160 test images" in command(export_main, colour, "--to", "onnx", "--output", tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    trained = open_trained(colour, "cpu")
    images = trained.split("val").images[:3]
    (logits, _) = session.run(None, {"images": images.numpy()})
    assert np.allclose(logits, trained(images)[0].numpy(), atol=1e-4)


def test_the_doctor_looks_at_the_data_set_that_is_named(colour: Path, tmp_path: Path) -> None:
    ok, bad = (list(check_data("npz", str(path))) for path in (colour.parent / "shapes.npz", tmp_path / "none.npz"))
    assert [line.state for line in (*ok, *bad)] == ["ok", "fail"]
    assert "shapes, 240 training images, 40 classes" in ok[0].text and "none.npz" in bad[0].text


def test_a_run_without_test_images_is_finished(tmp_path: Path) -> None:
    summary = {"status": "finished", "val.top1": 0.5, "test.num_images": 0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "model.safetensors").touch()
    assert is_finished(tmp_path, test=True, total_steps=1)
    (tmp_path / "summary.json").write_text(json.dumps({"status": "finished", "val.top1": 0.5}))
    assert not is_finished(tmp_path, test=True, total_steps=1)


@pytest.mark.thorough
def test_training_without_test_images_ends_with_val_and_is_finished(tmp_path: Path) -> None:
    npz = write_npz(tmp_path / "tiny.npz", 5, (8, 8), test_images=None, test_labels=None)
    args = ("--data.name", "npz", "--data.root", npz, "--model.name", "mlp", "--augment.size", 8)
    args += ("--schedule.steps", 6, "--schedule.warmup_epochs", 0, "--batch.global_batch_size", 40)
    args += ("--log.wandb", "disabled", "--output_dir", tmp_path / "run")
    said = train(*args).stderr
    assert "the data set has no test images: the validation images are evaluated" in said
    assert "finished: val top1 " in said and "report and figures in evaluation/val/" in said
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["test.num_images"] == 0 and "test.top1" not in summary
    assert (tmp_path / "run/evaluation/val/report.txt").is_file() and not (tmp_path / "run/evaluation/test").exists()
    assert "is finished: its data set has no test images" in train(*args).stderr


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_training_photo_is_seen_as_it_was_stored_bit_by_bit(
    fit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMNIST_CACHE", str(tmp_path / "cache"))
    sizes = [(900, 700), (64, 64), (333, 1200), (50, 20), (2000, 1500), (640, 641)]
    for i, size in enumerate(sizes * 4):
        folder = tmp_path / "photos" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = pixels(max(1, size[0] // 8), max(1, size[1] // 8)).resize(size)
        noise.rotate(i).save(folder / (f"{i}.jpg" if i % 3 else f"{i}.png"))
    source = open_source(DataConfig(name="folder", root=str(tmp_path / "photos"), stored_size=48, fit=fit, val_size=0))  # type: ignore[arg-type]
    seen = 0
    for part in ("train", "val", "test"):
        images, _, places = source.read(part)  # type: ignore[arg-type]
        for image, place in zip(images.read(), places.tolist(), strict=True):
            photo = read_photo(str(tmp_path / "photos" / source.files[place]), source.info)
            assert photo.cutout is not None and np.array_equal(photo.cutout.view, image.numpy())
            assert photo.image is not None and max(photo.image.size) <= WORK_SIZE
            if photo.cutout.box is not None:
                left, top, right, bottom = photo.cutout.box
                assert 0 <= left < right <= photo.image.width + 1 and 0 <= top < bottom <= photo.image.height + 1
            seen += 1
    assert seen == len(sizes) * 4


def test_large_stored_images_are_not_made_from_smaller_ones(tmp_path: Path) -> None:
    info = replace(INFO, name="folder", shape=(1, 800, 800))
    stripes = Image.fromarray(np.tile(np.array([0, 0, 255, 255], np.uint8), (800, 200)))
    stripes.save(tmp_path / "a.png")
    photo = read_photo(str(tmp_path / "a.png"), info)
    assert photo.cutout is not None and np.array_equal(photo.cutout.view, np.asarray(stripes))


def test_two_classes_are_enough_for_the_defaults(tmp_path: Path) -> None:
    labels = np.arange(40) % 2
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(
        tmp_path / "two.npz", train_images=images, train_labels=labels, val_images=images, val_labels=labels,
        test_images=images[:6], test_labels=labels[:6],
    )  # fmt: skip
    run = untrained_on(tmp_path / "two.npz", tmp_path / "run", size=8)
    pixels(20, 30).save(tmp_path / "a.png")
    command(predict_main, run, tmp_path / "a.png", "--output", tmp_path / "out")
    (row,) = csv.DictReader((tmp_path / "out/predictions.csv").open(newline=""))
    assert {row["top1"], row["top2"]} == {"0", "1"} and "top3" not in row
    assert len(fmnist.open_run(run, "cpu").predict(tmp_path / "a.png")[0]) == 2
    assert "valid range: 1 to 2" in command(predict_main, run, tmp_path / "a.png", "--top", 3, status=2)


@pytest.mark.parametrize("part", ["val", "test"])
def test_training_and_evaluation_name_images_alike(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {} if part == "test" else {"test_images": None, "test_labels": None}
    npz = write_npz(tmp_path / "set.npz", 5, (16, 16), val_images=None, val_labels=None, **absent)
    run = fmnist.train(
        Config(), data={"name": "npz", "root": str(npz), "val_size": 60}, batch={"global_batch_size": 60},
        model={"name": "mlp", "options": {"width": 8}}, schedule={"steps": 2}, log={"wandb": "disabled"},
        output_dir=str(tmp_path / "run"),
    ).directory  # fmt: skip
    table = run / "evaluation" / part / "predictions.csv"
    by_training = table.read_bytes()
    evaluated(run, monkeypatch)
    assert table.read_bytes() == by_training
    if part == "val":
        indices = [int(row["index"]) for row in csv.DictReader(by_training.decode().splitlines())]
        assert indices == Split.load("val", DataConfig(name="npz", root=str(npz), val_size=60)).published.tolist()


def test_images_of_a_folder_are_named_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMNIST_CACHE", str(tmp_path / "cache"))
    for part, count in (("train", 12), ("val", 6), ("test", 4)):
        for i in range(count):
            folder = tmp_path / "photos" / part / f"kind {i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (10, 10, 3), np.uint8)).save(folder / f"{i}.png")
    run = untrained_on(tmp_path / "photos", tmp_path / "run", size=10)
    evaluated(run, monkeypatch)
    rows = list(csv.DictReader((run / "evaluation/test/predictions.csv").open(newline="")))
    assert sorted(row["file"] for row in rows) == [f"test/kind {i % 2}/{i}.png" for i in (0, 2, 1, 3)]
    assert all(row["file"].split("/")[1] == f"kind {int(row['label'])}" for row in rows)
    assert "logits within" in command(export_main, run, "--to", "hub", "--output", tmp_path / "hub")
    command(search_main, "query", run, tmp_path / "photos/train/kind 0/0.png", "--k", 1, "--output", tmp_path / "out")
    (row,) = csv.DictReader((tmp_path / "out/search.csv").open(newline=""))
    assert row["file"] == "train/kind 0/0.png" and row["class"] == "kind 0"
    said = command(duplicates_main, run)  # each number has one picture, in all of its parts
    assert "test,test/kind 0/0.png,kind 0,train,train/kind 0/0.png,kind 0" in said
    assert "4 of 4 test images in train; 4 of 4 test images in val" in said
