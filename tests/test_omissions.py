"""Nothing is left out, and no setting is without effect, in silence."""

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from small import command, rows_of, untrained
from torch import nn

from fmnist.apps.duplicates import main as duplicates
from fmnist.apps.monitor.__main__ import main as monitor
from fmnist.apps.predict.__main__ import main as predict
from fmnist.apps.search.__main__ import main as search
from fmnist.config.conflicts import REFUSED, SAID, Length, sizes_by_epoch, validate, without_effect
from fmnist.config.parse import parse_config
from fmnist.config.schema import (
    OPTIONS,
    AugmentConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ScheduleConfig,
    flatten,
    unflatten,
)
from fmnist.data.augment import Augment
from fmnist.data.augment_torch import resample
from fmnist.data.fashion_mnist import INFO, load, load_indexed, load_split, published
from fmnist.data.info import DATA_FILE
from fmnist.data.photos import find_pictures, open_picture
from fmnist.data.split import Split
from fmnist.data.whole_pixels import check_whole_pixels, shift_and_flip
from fmnist.evaluation.calibration import average_probabilities
from fmnist.evaluation.findings import findings
from fmnist.evaluation.misclassified import confident_errors
from fmnist.evaluation.numbers import summarize
from fmnist.evaluation.outcome import Request, evaluate
from fmnist.metrics import predict as predict_split
from fmnist.network import build_network
from fmnist.optim import Schedule
from fmnist.report.write import class_table, predictions_csv
from fmnist.runtime.compute import Compute
from fmnist.runtime.processes import Processes
from fmnist.trained import open_trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps 500 validation images of the published data."""
    return untrained(tmp_path_factory.mktemp("omissions") / "run", ModelConfig(name="mlp", options={"width": 16}), 28)


def shoe(folder: Path, *names: str) -> None:
    """Draw a shoe on white under each name, in the format of its suffix."""
    image = Image.new("RGB", (640, 480), "white")
    outline = [(200, 60), (330, 60), (330, 270), (480, 330), (500, 400), (190, 400)]
    ImageDraw.Draw(image).polygon(outline, fill=(60, 40, 30))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)


# Settings


def with_options(**options: Any) -> Config:
    return unflatten(flatten(Config()) | {name.replace("__", "."): value for name, value in options.items()})


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (10, {0: 20, 4: 28}),  # the recipe as it is
        (5, {0: 20, 4: 28}),
        (4.5, {0: 20, 4: 28}),
        (4, {0: 20, 3: 28}),
        (3, {0: 20, 2: 28}),  # what people try first
        (2.5, {0: 20, 2: 28}),
        (2.4, {0: 20, 1: 28}),  # half an epoch at least
        (2, {0: 20, 1: 28}),
        (1, {0: 28}),
        (0.1, {0: 28}),
    ],
)
def test_the_size_schedule_ends_with_the_run(epochs: float, expected: dict[int, int]) -> None:
    cfg = parse_config(["--schedule.epochs", str(epochs), "--schedule.warmup_epochs", "0"])
    assert cfg.augment.size == {0: 20, 4: 28} and sizes_by_epoch(cfg) == expected
    model, augment = build_network(cfg, INFO, CPU, load_weights=False)
    assert augment.final_size == 28 and augment.sizes == expected
    # The last size is the one judged, and it is reached within the run.
    assert augment.size(max(0, int(epochs - 1e-9))) == 28
    lines = without_effect(cfg, Length(round(429 * epochs), 429))
    said = f"augment.size {{0: 20, 4: 28}} becomes {expected}: the run has {epochs} epoch{'s' * (epochs != 1)}"
    assert [line for line in lines if "augment.size" in line] == ([said] if expected != cfg.augment.size else [])


def test_more_sizes_than_epochs_and_steps_instead_of_epochs() -> None:
    sizes = {0: 96, 4: 128, 8: 224}
    assert sizes_by_epoch(Config(augment=AugmentConfig(size=sizes), schedule=ScheduleConfig(epochs=12))) == sizes
    for epochs, expected in ((6, {0: 96, 4: 128, 5: 224}), (3, {0: 96, 1: 128, 2: 224}), (2, {0: 128, 1: 224})):
        cfg = Config(augment=AugmentConfig(size=sizes), schedule=ScheduleConfig(epochs=epochs))
        assert sizes_by_epoch(cfg) == expected
        # 55,000 // 128 = 429 steps an epoch
        steps = replace(cfg, schedule=ScheduleConfig(epochs=50, steps=429 * epochs))
        assert sizes_by_epoch(steps) == expected
    assert sizes_by_epoch(Config(augment=AugmentConfig(size=64), schedule=ScheduleConfig(steps=1))) == {0: 64}


REFUSED_CASES = {
    "augment.mix_probability": {"augment__mix_probability": 0.5},
    "augment.mixup_alpha": {"augment__mixup_alpha": 0.2, "augment__mix_probability": 0.0},
    "augment.cutmix_alpha": {"augment__cutmix_alpha": 1.0, "augment__mix_probability": 0.0},
    "augment.flip_in_turn": {"augment__flip_in_turn": True, "augment__flip": 0.0},
    "augment.crop_aspect": {"augment__crop_aspect": 2.0},
    "optim.beta2": {"optim__beta2": 0.9, "optim__name": "sgd"},
    "data.stored_size": {"data__stored_size": 64},
    "data.fit": {"data__fit": "pad"},
    "data.holdout": {"data__holdout": 0.2},
    "data.bad_files": {"data__bad_files": "skip"},
    "data.fold": {"data__fold": 1},
    "schedule.min_lr": {"schedule__min_lr": 1e-4, "schedule__name": "constant"},
}
SAID_CASES = {
    "checkpoint.every_steps": {"checkpoint__every_steps": 13},
    "log.every_steps": {"log__every_steps": 13},
    "evaluation.every_steps": {"evaluation__every_steps": 13},
    "evaluation.every_epochs": {"evaluation__every_epochs": 1.2},
    "profile": {"profile": 5},
    "augment.flip_in_turn": {"augment__flip_in_turn": True},
    "augment.shift": {"augment__shift": 0.01},
    "augment.saturation": {"augment__saturation": 0.4},
    "augment.hue": {"augment__hue": 0.1},
    "schedule.warmup_epochs": {"schedule__warmup_epochs": 0.04},
    "optim.head_only_epochs": {"optim__head_only_epochs": 0.04},
    "data.val_size": {"data__val_size": 1000, "data__folds": 5, "data__fold": 0},
    "optim.lr": {"optim__lr": 0.0},
    "log.project": {"log__project": "team", "log__wandb": "disabled"},
    "model.channels_last": {"model__channels_last": True, "model__name": "mlp"},
}


def test_every_row_of_the_tables_has_its_case() -> None:
    assert [name for name, *_ in REFUSED] == list(REFUSED_CASES)
    assert [name for name, *_ in SAID] == list(SAID_CASES)
    assert {*REFUSED_CASES, *SAID_CASES} <= {*OPTIONS}


@pytest.mark.parametrize("name", REFUSED_CASES)
def test_a_setting_without_effect_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}.* has no effect: "):
        validate(with_options(**REFUSED_CASES[name]))


@pytest.mark.parametrize("name", SAID_CASES)
def test_a_setting_without_effect_in_a_short_run_is_said(name: str) -> None:
    # 10 steps in all, which are an epoch; the periods are of 12 and 13 steps
    cfg = with_options(**SAID_CASES[name])
    validate(cfg)
    (line,) = without_effect(cfg, Length(10, 10))
    assert line.startswith(name) and ("has no effect" in line or "longer than the run" in line)
    # ... and nothing in a run in which it has one.
    if name not in ("augment.shift", "data.val_size", "optim.lr", "log.project", "model.channels_last"):
        assert without_effect(cfg, Length(4000, 100, channels=3)) == []


def test_a_shift_of_less_than_a_pixel_has_its_effect_where_pixels_are_interpolated() -> None:
    for other in ({"augment__rotation": 1.0}, {"augment__crop": 0.9}, {"augment__size": 32}, {"augment__shift": 0.02}):
        assert without_effect(with_options(**{"augment__shift": 0.01} | other), Length(100, 10)) == []


@pytest.mark.parametrize(
    ("epochs", "warmup_epochs", "steps", "becomes"),
    [
        (1, 1.0, 10, "1.0 becomes 0.1, a tenth of the whole: the run has 1 epoch"),
        (1, 2.0, 10, "2.0 becomes 0.1, a tenth of the whole: the run has 1 epoch"),
        (0.5, 1.0, 5, "1.0 becomes 0.05, a tenth of the whole: the run has 0.5 epochs"),
        (0.01, 1.0, 0, "1.0 becomes 0, a tenth of the whole: the run has 0.01 epochs"),
        (1.01, 1.0, 100, ""),  # shorter than the run, if only by a step
        (2, 1.0, 100, ""),
    ],
)
def test_a_warm_up_in_epochs_that_would_be_the_whole_run_is_a_tenth_of_it(
    epochs: float, warmup_epochs: float, steps: int, becomes: str
) -> None:
    cfg = with_options(schedule__epochs=epochs, schedule__warmup_epochs=warmup_epochs)
    schedule = Schedule.from_config(cfg, 100)
    assert (schedule.total_steps, schedule.warmup_steps) == (round(100 * epochs), steps)
    lines = [line for line in without_effect(cfg, Length(schedule.total_steps, 100)) if "warmup" in line]
    assert lines == ([f"schedule.warmup_epochs {becomes}"] if becomes else [])
    # in steps it is what was asked for, and nothing is said
    cfg = with_options(schedule__epochs=1.0, schedule__warmup_epochs=5.0, schedule__warmup_steps=7)
    assert Schedule.from_config(cfg, 100).warmup_steps == 7 and without_effect(cfg, Length(100, 100)) == []


def test_every_shipped_recipe_can_be_tried_for_an_epoch() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        schedule = Schedule.from_config(parse_config(["--config", str(path), "--schedule.epochs", "1"]), 430)
        assert schedule.total_steps == 430 and schedule.warmup_steps in (43, 215), path  # the CNN's: half an epoch


def test_the_shipped_recipes_say_nothing() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        cfg = parse_config(["--config", str(path)])
        per_epoch = 55_000 // cfg.batch.global_batch_size
        assert without_effect(cfg, Length(round(cfg.schedule.epochs * per_epoch), per_epoch)) == [], path


def test_phases_longer_than_the_run_are_refused() -> None:
    for options, name in (
        ({"optim__head_only_epochs": 50.0}, "optim.head_only_epochs is 50.0, 500 steps, but the run has 10"),
        ({"schedule__warmup_steps": 10}, "schedule.warmup_steps is 10, but the run has 10 steps"),
    ):
        with pytest.raises(ValueError, match=name):
            Schedule.from_config(with_options(schedule__steps=10, **options), 10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "mlp", "options": {"widht": 3}}, "model.options: mlp has no widht; valid: width"),
        ({"name": "cnn", "pretrained": True}, "model.pretrained: cnn has no pretrained weights"),
        (
            {"name": "cnn", "drop_path_rate": 0.1},
            "model.drop_path_rate 0.1 has no effect: cnn has no stochastic depth; valid: 0",
        ),
    ],
)
def test_options_that_a_model_would_ignore_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_network(Config(model=ModelConfig(**options)), INFO, CPU, load_weights=True)


# Augmentation by whole pixels


def matrix(*rows: float) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.float32)


@pytest.mark.parametrize(
    "matrices",
    [
        matrix(1, 0, 0, 0, 1, 0),
        matrix(-1, 0, 2 * 3 / 28, 0, 1, -2 * 2 / 28),  # mirrored, 3 pixels across and 2 down
        matrix(1, 0, 0, 0, -1, 0),  # upside down: no augmentation of today, and drawn all the same
        matrix(-1, 0, 2 / 28, 0, -1, -8 / 28),
    ],
)
def test_whole_pixels_are_what_the_matrix_says(matrices: torch.Tensor, train_images: Split) -> None:
    images = train_images.images[:1, None]
    check_whole_pixels(matrices, 28)
    assert torch.allclose(shift_and_flip(images, matrices, 28), resample(images, matrices, 28), atol=1e-5)


@pytest.mark.parametrize(
    "matrices",
    [
        matrix(0, 1, 0, -1, 0, 0),  # a quarter turn
        matrix(1, 0.1, 0, 0, 1, 0),
        matrix(1.1, 0, 0, 0, 1, 0),
        matrix(1, 0, 0.01, 0, 1, 0),
    ],
)
def test_what_whole_pixels_cannot_do_fails(matrices: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="other than flips and whole shifts"):
        check_whole_pixels(matrices, 28)


# The data set's own index


def test_a_position_in_a_split_is_never_shown_for_the_published_index(run_directory: Path) -> None:
    images, labels = load("train")
    parts = [load_indexed(name, None, 500) for name in ("train", "val")]  # type: ignore[arg-type]
    for part_images, part_labels, index in parts:
        assert torch.equal(images[index], part_images) and torch.equal(labels[index], part_labels)
    assert torch.equal(torch.cat([part[2] for part in parts]).sort().values, torch.arange(60_000))

    trained = open_trained(run_directory, "cpu")
    with Compute(device="cpu") as compute:
        outcome = evaluate(trained, compute, Request(split="val", quick=True))
    assert outcome is not None and outcome.published is not None
    assert not len(outcome.images)  # which a quick one has no use for
    outcome = replace(outcome, images=parts[1][0])
    assert outcome.indices == parts[1][2].tolist() != list(range(500))
    for error in confident_errors(outcome)[:20]:
        assert torch.equal(images[error.index], torch.as_tensor(error.row(outcome)["picture"]))
    summary = summarize(outcome.logits, outcome.labels, outcome.class_names)
    assert summary["num_images"] == 500
    table = predictions_csv(findings(outcome, quick=True)).decode().splitlines()[1:]
    assert [int(line.partition(",")[0]) for line in table] == outcome.indices


def test_search_names_images_by_the_published_index(run_directory: Path, tmp_path: Path) -> None:
    images = load("train")[0]
    val = load_indexed("val", None, 500)[2].tolist()
    query = next(index for index in val if index > 26_226)
    search_of = ("query", run_directory, f"val:{query}", "--split", "val", "--output", tmp_path, "--sheet", 0)
    command(search, *search_of)
    found = [row["item"] for row in rows_of(tmp_path / "search.csv")]
    assert all(int(item.removeprefix("val:")) in val for item in found) and f"val:{query}" not in found
    # The nearest has the similarity that its published image gives.
    trained = open_trained(run_directory, "cpu")
    indices = torch.tensor([query, int(found[0].removeprefix("val:"))])
    features = nn.functional.normalize(trained(images[indices])[1], dim=1)
    cosine = float(rows_of(tmp_path / "search.csv")[0]["similarity"])
    assert float(features[0] @ features[1]) == pytest.approx(cosine, abs=2e-3)
    said = command(search, "query", run_directory, f"train:{query}", "--split", "val", "--output", tmp_path, status=2)
    assert f"train:{query}: train has 5" in said and "the rest are of other splits" in said


@pytest.mark.thorough
def test_near_copies_are_named_by_the_published_index(tmp_path: Path) -> None:
    command(duplicates, "--split", "val", "--val_size", 3000, "--output", tmp_path / "pairs.csv")
    images = load("train")[0].flatten(1).double()
    val, rows = set(load_indexed("val", None, 3000)[2].tolist()), rows_of(tmp_path / "pairs.csv")
    assert rows
    for row in rows:
        index, partner = int(row["index"]), int(row["train_index"])
        correlation = np.corrcoef(images[index], images[partner])[0, 1]
        assert index in val and partner not in val and correlation == pytest.approx(float(row["correlation"]), abs=1e-6)


# Pictures


def test_every_format_is_read_and_what_is_left_out_is_counted(run_directory: Path, tmp_path: Path) -> None:
    names = [f"a{suffix}" for suffix in (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")]
    shoe(tmp_path / "in", *names)
    (tmp_path / "in" / "a.jfif").write_bytes((tmp_path / "in" / "a.jpg").read_bytes())
    for name in ("b.heic", "c.AVIF", "notes.txt", "more.txt", "Makefile"):
        (tmp_path / "in" / name).write_bytes(b"no picture")
    options = ("--output", tmp_path / "out", "--sheet", 0)
    said = command(predict, run_directory, tmp_path / "in", *options)
    assert "9 predicted" in said and "2 errors; left out: 2 .txt, 1 no suffix" in said
    counts = json.loads(command(predict, run_directory, tmp_path / "in", *options, "--json").splitlines()[-1])
    assert (counts["predicted"], counts["errors"]) == (9, 2)
    assert counts["left_out"] == {".txt": 2, "no suffix": 1}
    rows = {Path(row["file"]).name: row for row in rows_of(tmp_path / "out" / "predictions.csv")}
    assert len({row["prediction"] for name, row in rows.items() if not row["error"]}) == 1
    assert "not a JPEG, PNG, WEBP, GIF, BMP or TIFF picture" in rows["b.heic"]["error"] == rows["c.AVIF"]["error"]


def test_unread_pictures_count_for_the_monitor(run_directory: Path, tmp_path: Path) -> None:
    for index, image in enumerate(load_split("val", None, 500)[0][:20].numpy()):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    for index in range(200):
        (tmp_path / f"{index}.avif").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("")
    found = json.loads(command(monitor, run_directory, tmp_path, "--json", status=1, lines=None))
    assert found["verdict"] == "alert" and found["num_errors"] == 200
    assert found["unreadable"] == {".avif": 200} and found["left_out"] == {".txt": 1}
    assert "200 unreadable (200 .avif), left out 1 .txt" in found["line"]
    assert "more than 10% of the files unreadable" in found["line"]


def test_a_handful_of_validation_images_is_too_few(run_directory: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name in ("config.yaml", "model.safetensors"):
        (few / name).write_bytes((run_directory / name).read_bytes())
    text = (few / "config.yaml").read_text()
    assert "val_size: 500" in text
    (few / "config.yaml").write_text(text.replace("val_size: 500", "val_size: 20"))
    (few / DATA_FILE).write_text(json.dumps(published(20).to_json()))
    np.save(tmp_path / "day.npy", load_split("test", None, 0)[0][:300].numpy())
    said = command(monitor, few, tmp_path / "day.npy", status=2, lines=None)
    assert "few has 20 validation images: too few to say what is usual; valid: 100 and more (data.val_size, or " in said


def test_what_this_project_made_is_no_picture(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shoe(tmp_path, "shoe.jpg", "predictions/of_a_friend.png")
    (tmp_path / "runs" / "cnn").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "runs" / "cnn" / name).write_text("")
    shoe(tmp_path, "runs/cnn/learning_curves.png")
    for again in range(3):
        command(predict, run_directory, ".", "predictions/*.png")
        rows = rows_of(tmp_path / "predictions" / "predictions.csv")
        assert [row["file"] for row in rows] == ["./shoe.jpg", "./predictions/of_a_friend.png"], again
    # Named itself, it is what the user wants.
    assert list(find_pictures(["predictions/predictions.png"])) == [("predictions/predictions.png", "")]


def test_a_bad_picture_in_a_search_is_a_row(run_directory: Path, tmp_path: Path) -> None:
    shoe(tmp_path, "a.jpg", "folder/b.png", "globbed/c.webp", "globbed/d.webp")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "folder" / "notes.txt").write_text("")
    asked = [tmp_path / name for name in ("a.jpg", "bad.jpg", "folder", "globbed/*.webp", "absent.png")]
    options = ("--split", "val", "--k", 2, "--output", tmp_path / "out", "--sheet", 1)
    said = command(search, "query", run_directory, *asked, "test:3", *options, status=1, lines=None)
    assert "2 not read; left out: 1 .txt" in said and "search.png of the first 1 queries" in said
    rows = rows_of(tmp_path / "out" / "search.csv")
    read = [Path(row["query"]).name for row in rows if not row["error"]]
    assert read == [name for name in ("a.jpg", "b.png", "c.webp", "d.webp", "test:3") for _ in range(2)]
    errors = {Path(row["query"]).name: row["error"] for row in rows if row["error"]}
    assert errors["absent.png"] == "no such file or folder" and "not a JPEG" in errors["bad.jpg"]
    # None that can be read: the table says why, and the status that there is no result.
    command(search, "query", run_directory, tmp_path / "bad.jpg", *options, status=1, lines=None)
    assert [row["error"] for row in rows_of(tmp_path / "out" / "search.csv")] == [errors["bad.jpg"]]


def test_a_huge_jpeg_is_decoded_small(tmp_path: Path) -> None:
    path = tmp_path / "huge.jpg"
    image = Image.new("L", (12_000, 9_000), 250)  # 108 megapixels: more than Pillow opens
    image.paste(30, (4_000, 3_000, 8_000, 6_000))
    image.save(path, quality=60)
    assert open_picture(path).size == (512, 384)
    # Four times its limit is not decoded, not even small: height and width stand in the frame header.
    content = bytearray(path.read_bytes())
    place = content.index(struct.pack(">HH", 9_000, 12_000))
    content[place : place + 4] = struct.pack(">HH", 60_000, 60_000)
    path.write_bytes(content)
    with pytest.raises(Image.DecompressionBombError):
        open_picture(path)


def test_text_beside_a_picture_is_passed_over(tmp_path: Path) -> None:
    for compressed in (False, True):
        about = PngInfo()
        about.add_text("history", "x" * 3_000_000, zip=compressed)
        Image.new("RGB", (90, 60), "red").save(tmp_path / "a.png", pnginfo=about)
        assert open_picture(tmp_path / "a.png").size == (90, 60)
    # A bomb of text is still one: 200 MB in 200 kB.
    head, tail = (tmp_path / "a.png").read_bytes()[:33], (tmp_path / "a.png").read_bytes()[33:]
    data = b"zTXt" + b"history\0\0" + zlib.compress(bytes(200_000_000))
    (tmp_path / "a.png").write_bytes(
        head + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)) + tail
    )
    with pytest.raises(ValueError, match="too large"):
        open_picture(tmp_path / "a.png")


# Numbers


def test_a_class_without_images_is_no_part_of_the_mean() -> None:
    # Classes a and b with 2 images each, c with none, one image of b taken for c: recall 1 and 1/2.
    logits = torch.eye(3)[[0, 0, 1, 2]] * 5
    summary = summarize(logits, torch.tensor([0, 0, 1, 1]), ["a", "b", "c"])
    assert summary["per_class"]["c"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert summary["macro_avg"]["recall"] == 0.75 and summary["macro_avg"]["num_classes"] == 2
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    table = class_table(summary)
    assert [line.split() for line in table.splitlines() if line.split()[:1] == ["c"]] == [["c", "-", "-", "-", "0"]]
    assert "macro avg: over the 2 of 3 classes that have images" in table


class Sure(nn.Module):
    """Logits 3,000 apart, the other way round for the mirror image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        left = images[:, 0, :, :14].mean((1, 2)) > images[:, 0, :, 14:].mean((1, 2))
        logits = torch.zeros(len(images), 10)
        logits[:, 0], logits[:, 1] = 3000.0 * left, 3000.0 * ~left
        return logits


def test_flip_averaging_of_sure_models_is_finite(train_images: Split) -> None:
    augment = Augment(AugmentConfig(), num_classes=10, mean=(0.3,), std=(0.3,))
    split = Split(images=train_images.images[:50], labels=train_images.labels[:50])
    logits = predict_split(Sure(), split, augment, EvaluationConfig(tta="flip"), Processes(0, 1))
    assert logits.isfinite().all()
    # Both classes with one half, each: log(1/2); the others with 1 in e to the 3,000.
    assert torch.allclose(logits[:, :2], torch.full((50, 2), 0.5).log())
    assert torch.allclose(logits[:, 2:], torch.full((50, 8), -3000.0))
    mixed = average_probabilities([torch.tensor([[3000.0, 0.0]]), torch.tensor([[3000.0, 0.0]])])
    assert torch.equal(mixed, torch.tensor([[0.0, -3000.0]]))


def test_a_folder_that_is_not_there_is_not_filled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected train-images-idx3-ubyte.*found no such folder"):
        Split.load("test", DataConfig(root=str(tmp_path / "nope")), CPU)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "fashion-mnist_test.csv").write_text("label,pixel1")
    with pytest.raises(ValueError, match=r"found fashion-mnist_test.csv; leave data.root out"):
        Split.load("test", DataConfig(root=str(tmp_path / "csv")), CPU)
