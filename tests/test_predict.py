"""The command as a user runs it: pictures and bad files in, a CSV and a sheet out, an exit status."""

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, execute
from other_sets import untrained_on
from pictures import learned_run
from PIL import Image
from small import command
from test_photos import drawn

from fmnist.apps.cutout import Cutout
from fmnist.apps.novelty import open_reference
from fmnist.apps.predict.__main__ import PARSER, main
from fmnist.apps.predict.photo_sheet import GREY, MARGIN, ORANGE, Cell, draw_sheet
from fmnist.apps.predict.predictions import Prediction, captions, header, predict_pictures, row, sheet_cell
from fmnist.apps.views import CHUNK, Photo
from fmnist.data.fashion_mnist import CLASS_NAMES, load_split
from fmnist.runtime.files import csv_bytes
from fmnist.trained import open_trained


def predict(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return execute(sys.executable, "-m", "fmnist", "predict", *args, cwd=cwd)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learned_run(tmp_path_factory)


SHEET = """
import sys
from PIL import Image
from fmnist.apps.predict.photo_sheet import Cell, draw_sheet
sheet = draw_sheet([Cell(image=Image.new("RGB", (30, 20)), box=None, view=None, lines=[("shirt", "#111111")])], "title")
print(sheet[:8] == b"\\x89PNG\\r\\n\\x1a\\n", sorted({"matplotlib", "scipy"} & set(sys.modules)))
"""


def test_the_sheet_is_drawn_without_what_figures_need() -> None:
    done = subprocess.run([sys.executable, "-c", SHEET], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"  # importing those for one font took longer than 300 pictures


def on_the_sheet(picture: Image.Image, lines: list[tuple[str, str]], box: tuple[int, int, int, int] | None = None):  # type: ignore[no-untyped-def]
    """The pixels of a sheet of one cell, below its heading: [height, width, 3]."""
    cell = Cell(image=picture, box=box, view=None, lines=lines)
    with Image.open(io.BytesIO(draw_sheet([cell], "title"))) as sheet:
        return np.asarray(sheet)[2 * MARGIN + 18 :]


def test_a_small_picture_fills_its_square_pixel_by_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    drawn_pixels = on_the_sheet(Image.fromarray(pixels), [])
    # 112 = 4 * 28: each pixel becomes a square of 4 x 4
    assert np.array_equal(drawn_pixels[:112, MARGIN : MARGIN + 112], pixels.repeat(4, 0).repeat(4, 1))
    assert (drawn_pixels[:112, MARGIN + 112 : MARGIN + 116] == 255).all()
    # 14 x 28 pixels: 56 x 112, in the middle of the square, 28 grey pixels on either side
    narrow = on_the_sheet(Image.fromarray(pixels[:, :14]), [])[:112, MARGIN : MARGIN + 112]
    assert np.array_equal(narrow[:, 28:84], pixels[:, :14].repeat(4, 0).repeat(4, 1))
    assert (narrow[:, :28] == 0xF0).all() and (narrow[:, 84:] == 0xF0).all()
    # the frame of what the model sees is enlarged with it: from pixel 7 to 20, so from 28 to 83
    framed = on_the_sheet(Image.new("RGB", (28, 28)), [], (7, 7, 21, 21))[:112, MARGIN : MARGIN + 112]
    rows, columns = framed.any(2).nonzero()
    assert {rows.min(), columns.min()} == {28} and {rows.max(), columns.max()} == {83}
    # a large one is made smaller: 448 x 224 to 112 x 56
    large = on_the_sheet(Image.new("RGB", (448, 224)), [])[:112, MARGIN : MARGIN + 112]
    assert (large[28:84] == 0).all() and (large[:28] == 0xF0).all() and (large[84:] == 0xF0).all()


def test_a_caption_says_what_was_asked_and_stays_in_its_cell() -> None:
    photo = Photo(name="a/shoe.png", cutout=Cutout(view=np.zeros((28, 28), dtype=np.uint8), box=None, inverted=False))
    item = Prediction(photo=photo, top=(("Sneaker", 0.6), ("Sandal", 0.4)), score=0.2, unfamiliar=True)
    plain = [line for line, _ in sheet_cell(item).lines]
    assert plain == ["shoe.png", "Sneaker 60 %", "then Sandal 40 %", "unfamiliar (0.20)"]
    columns = ["set", "decision"]
    asked = sheet_cell(replace(item, trust=("Sneaker | Sandal", "person")), columns).lines
    assert [line for line, _ in asked] == [*plain[:3], "set: Sneaker | Sandal", "decision: person", plain[3]]
    assert asked[4][1] == ORANGE  # and a class of that name is not
    assert sheet_cell(replace(item, trust=("person",)), ["set"]).lines[3] == ("set: person", GREY)
    assert sheet_cell(replace(item, trust=("automatic",)), ["decision"]).lines[3] == ("decision: automatic", GREY)
    unread = sheet_cell(Prediction(photo=Photo(name="b", error="an empty file"), trust=("", "person")), columns)
    assert [line for line, _ in unread.lines] == ["b", "an empty file", "decision: person"]

    everything = " | ".join(CLASS_NAMES)
    pixels = on_the_sheet(Image.new("RGB", (28, 28)), [(f"set: {everything}", GREY), ("decision: automatic", GREY)])
    captions = pixels[112:]
    assert (captions[:, MARGIN + 228 :] == 255).all() and (captions[:, MARGIN : MARGIN + 228] < 255).any()
    assert len(captions) == 2 * 16 + 2 * MARGIN  # a row for each line


def test_files_of_one_name_are_told_apart_by_their_folder() -> None:
    names = ["set/circle/0.jpg", "set/square/0.jpg", "set/circle/1.jpg", "0.jpg"]
    assert captions(names) == ["circle/0.jpg", "square/0.jpg", "1.jpg", "0.jpg"]
    photo = Photo(name="set/square/0.jpg", error="an empty file")
    assert sheet_cell(Prediction(photo=photo), (), "square/0.jpg").lines[0] == ("square/0.jpg", GREY)


READ = """
import resource, statistics, sys, torch
from fmnist.apps.views import read_photos
from fmnist.data.fashion_mnist import INFO
torch.set_num_threads(2)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
found = []
for _ in range(9):
    before = faults()
    number = sum(len(photos) for photos in read_photos([(sys.argv[1], "")] * 96, INFO))
    found.append((faults() - before) / number)
print(statistics.median(found[2:]))  # a pass may find an arena of a thread that ended trimmed
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_picture_takes_the_memory_of_those_before(tmp_path: Path) -> None:
    drawn(load_split("test", None, 2000)[0][0].numpy()).resize((480, 480)).save(tmp_path / "a.jpg")
    done = subprocess.run(
        [sys.executable, "-c", READ, tmp_path / "a.jpg"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 30  # pages; about 110 where freed memory goes back, about 3 where it is kept


def test_a_folder_with_good_and_bad_files(run_directory: Path, tmp_path: Path) -> None:
    images = load_split("test", None, 2000)[0][:12]
    photos = tmp_path / "photos"
    photos.mkdir()
    for index, image in enumerate(images.numpy()):
        drawn(image).save(photos / f"{index:02}.{('jpg', 'png', 'webp')[index % 3]}", quality=90)
    Image.fromarray(images[0].numpy()).save(tmp_path / "=1+1.png")  # what a spreadsheet would run
    (photos / "12.jpg").write_bytes(b"")
    (photos / "13.png").write_bytes((photos / "01.png").read_bytes()[:2000])
    (tmp_path / "nothing").mkdir()
    done = predict(run_directory, "photos", "=1+1.png", "nothing", "no*.jpg", "--output", "out", cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # a pattern matches no file
    told, summary = done.stdout.splitlines()[:10], done.stdout.splitlines()[10]
    assert re.fullmatch(r"13 predicted: \d+ flagged as unfamiliar, \d+ used uncropped; 4 errors", summary)

    with (tmp_path / "out" / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == header(3) and len(rows) == 12 + 2 + 1 + 2
    good = [line for line in rows if not line["error"]]
    expected = open_trained(run_directory, "cpu")(images)[0].argmax(1)
    for line, said in zip(good, told, strict=False):  # of the first ten of 13
        percent = f"{100 * float(line['confidence']):.0f} %" + ", unfamiliar" * (line["unfamiliar"] == "yes")
        assert said == f"{line['file']}  {line['prediction']} {percent}"
    names = [CLASS_NAMES[label] for label in expected]
    agree = sum(line["prediction"] == name for line, name in zip(good, names, strict=False))
    assert agree >= 10, agree  # of 12 drawn at 600 px with noise: as the pictures they were drawn from
    for line in good:
        chances = [float(line[f"p{place}"]) for place in (1, 2, 3)]
        assert line["top1"] == line["prediction"] and float(line["confidence"]) == chances[0]
        assert chances == sorted(chances, reverse=True) and sum(chances) <= 1.00001
        assert (
            line["unfamiliar"] in ("yes", "no") and float(line["score"]) >= -1e-6 and line["cropped"] in ("yes", "no")
        )
    errors = {line["file"]: line["error"] for line in rows if line["error"]}
    assert set(errors) == {"photos/12.jpg", "photos/13.png", "nothing", "no*.jpg"}
    assert rows[14]["file"] == "./=1+1.png"
    with Image.open(tmp_path / "out" / "predictions.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.csv", "predictions.png"]
    predict(run_directory, "photos/00.jpg", "--sheet", 0, "--output", "out", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.csv"]  # no sheet of other pictures


def test_exit_status_and_one_line_errors(run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    said = command(main, run_directory, "bad.jpg", "--output", "out", status=1, lines=None)
    assert "0 predicted: 0 flagged" in said and "bad.jpg: not a JPEG, PNG, WEBP, GIF, BMP or TIFF picture" in said
    assert "not a run directory" in command(main, tmp_path, "bad.jpg", status=2)
    assert "--output is bad.jpg" in command(main, run_directory, "bad.jpg", "--output", "bad.jpg", status=2)
    # Where nothing of what was named is there, that is said before the model is opened.
    assert "absent.jpg: no such file" in command(main, run_directory, "absent.jpg", "no*.png", status=2)
    assert "--top is 11; valid range: 1 to 10" in command(main, run_directory, "bad.jpg", "--top", 11, status=2)
    for wrong, said in (
        (["--top", "0"], "--top: '0' is not valid; valid range: 1 and more"),
        (["--sheet", "-1"], "--sheet: '-1' is not valid; valid range: 0 to 1000"),
        (["--invert", "perhaps"], "--invert: invalid choice"),
        (["--outptu", "x"], "unknown option --outptu (did you mean --output?)"),
    ):
        assert said in command(main, run_directory, "bad.jpg", *wrong, status=2)


def test_counts_as_json(run_directory: Path, tmp_path: Path) -> None:
    for index, image in enumerate(load_split("test", None, 2000)[0][:3].numpy()):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    said = command(
        main, run_directory, tmp_path, tmp_path / "absent", "--output", tmp_path / "out", "--json", status=1, lines=0
    )
    found = json.loads(said)
    assert (found["predicted"], found["uncropped"], found["errors"]) == (3, 3, 1)  # 28 x 28 is used as it is
    assert found["unfamiliar"] in range(4) and found["output"] == str(tmp_path / "out")


def test_pictures_are_held_a_chunk_at_a_time(run_directory: Path, tmp_path: Path) -> None:
    trained = open_trained(run_directory, "cpu")
    Image.fromarray(load_split("test", None, 2000)[0][0].numpy()).save(tmp_path / "a.png")
    taken = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal taken
        while True:
            taken += 1
            yield str(tmp_path / "a.png"), ""

    items = predict_pictures(
        trained, open_reference(trained), endless(), PARSER.parse_args([str(run_directory), "a.png"])
    )
    first = next(items)
    assert taken == 2 * CHUNK and len(first.top) == 3


def test_a_row_has_a_cell_for_every_column() -> None:
    top = tuple((name, 0.1) for name in CLASS_NAMES)
    cutout = Cutout(view=np.zeros((28, 28), dtype=np.uint8), box=None, inverted=False)
    for count in (1, 3, 10):
        good = Prediction(photo=Photo(name="a", cutout=cutout), top=top[:count])
        bad = Prediction(photo=Photo(name="b", error="an empty file"))
        assert len(row(good, count)) == len(row(bad, count)) == len(header(count))
        names = header(count, (), CLASS_NAMES)
        good = replace(good, probabilities=(0.1,) * 10)
        assert len(row(good, count, CLASS_NAMES)) == len(row(bad, count, CLASS_NAMES)) == len(names)
        assert header(count) == names[:-10] and names[-10:] == [f"p_{name}" for name in CLASS_NAMES]


def test_each_class_has_its_probability(run_directory: Path, tmp_path: Path) -> None:
    images = load_split("test", None, 2000)[0][:9]
    for index, image in enumerate(images.numpy()):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    (tmp_path / "x.png").write_bytes(b"")
    for flags in ([], ["--no-calibrate"]):
        more = ("--probabilities", "--sheet", 0, "--coverage", 0.9, *flags)
        command(main, run_directory, tmp_path, *more, "--output", tmp_path / "out")
        with (tmp_path / "out" / "predictions.csv").open(newline="") as stream:
            *rows, unread = csv.DictReader(stream)
        trained = open_trained(run_directory, "cpu")
        expected = trained.probabilities(trained(images)[0], calibrate=not flags)
        columns = [f"p_{name}" for name in CLASS_NAMES]
        assert list(unread)[-11:] == ["error", *columns] and {unread[name] for name in columns} == {""}
        for found, chances in zip(rows, expected.tolist(), strict=True):
            given = [float(found[name]) for name in columns]
            assert given == pytest.approx(chances, rel=1e-8) and sum(given) == pytest.approx(1, abs=1e-8)
            assert found["prediction"] == CLASS_NAMES[given.index(max(given))]
            assert found["confidence"] == f"{max(given):.6f}" == found["p1"]


def test_classes_of_any_name_have_a_column(tmp_path: Path) -> None:
    names = ['a, "b"', "=1+1", "file", "error", "two; three", "L\u00fc", "p1", "back\\slash"]
    path = tmp_path / "set.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 12, 12), dtype=np.uint8)
    np.savez(path, train_images=images, train_labels=np.arange(40) % 8, val_images=images[:8],
             val_labels=np.arange(8), class_names=np.array(names))  # fmt: skip
    run = untrained_on(path, tmp_path / "run")
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    command(main, run, tmp_path / "a.png", "--probabilities", "--sheet", 0, "--output", tmp_path / "out")
    header_cells, cells = csv.reader((tmp_path / "out" / "predictions.csv").read_text().splitlines())
    assert header_cells[-8:] == [f"p_{name}" for name in names] and len(set(header_cells)) == len(header_cells)
    assert sum(map(float, cells[-8:])) == pytest.approx(1, abs=1e-8)


def test_a_name_that_breaks_a_line_does_not_break_the_table() -> None:
    """No data set of ours has such a class; a file of somebody else's may name one."""
    table = csv_bytes(header(1, (), ["a\nb", "c\rd"]), [["x"]]).decode()
    assert len(table.splitlines()) == 2 and table.splitlines()[0].endswith(",p_a\\nb,p_c\\rd")
